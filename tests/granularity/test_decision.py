import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from cedm_ray.granularity.decision import TieSet, Trained, pareto_front, tie_set

Z95 = 1.6448536269514722


def once(scores: Mapping[int, float]) -> list[Trained]:
    return [Trained(c, (score,)) for c, score in scores.items()]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_one_training_each_ties_up_to_the_quantile_of_the_difference(confidence: float) -> None:
    margin = stats.norm.ppf(confidence) * math.sqrt(2) * 0.02
    inside, outside = 3 * (1 + 0.999 * margin), 3 * (1 + 1.001 * margin)
    found = tie_set(once({40: 3.0, 7: inside, 300: inside, 12: outside}), retrain_spread=0.02, confidence=confidence)
    assert (found.best, found.clusters, found.smallest) == (40, (7, 40, 300), 7)
    assert found.margin == pytest.approx(margin, rel=1e-12)
    assert (found.low, found.high) == (3.0, pytest.approx(3 * (1 + margin), rel=1e-12))
    assert (found.retrain_spread, found.sampling_spread) == (0.02, None)


def test_the_scale_of_the_scores_and_the_order_of_the_trainings_do_not_matter() -> None:
    trained = [Trained(9, (5.0, 5.1)), Trained(3, (5.02,)), Trained(9, (5.3,)), Trained(4, (5.9, 5.8, 6.1))]
    found = tie_set(trained)
    for order in itertools.permutations(trained):
        other = tie_set([Trained(each.num_clusters, tuple(7 * score for score in each.scores)) for each in order])
        assert (other.best, other.clusters, other.smallest) == (found.best, found.clusters, found.smallest)
        assert other.margin == pytest.approx(found.margin) and other.sampling_spread == pytest.approx(
            found.sampling_spread
        )
        assert (other.low, other.high) == (pytest.approx(7 * found.low), pytest.approx(7 * found.high))


def test_without_any_scatter_only_equal_scores_tie_and_the_smaller_c_is_best() -> None:
    found = tie_set(once({50: 2.0, 20: 2.0, 10: math.nextafter(2.0, 3), 90: 4.0}), retrain_spread=0)
    assert (found.best, found.clusters, found.margin, found.high) == (20, (20, 50), 0.0, 2.0)
    assert tie_set(once({5: 1.0})) == TieSet(5, (5,), 5, pytest.approx(Z95 * math.sqrt(2) * 0.015), 1.0,
                                             pytest.approx(1 + Z95 * math.sqrt(2) * 0.015), 0.015, None)  # fmt: skip


def test_the_score_of_a_c_is_the_mean_over_trainings_of_the_mean_over_sets() -> None:
    # Over all sets at once C=2 would be at 1.1 and lose.
    trained = [Trained(2, (1.2, 1.2, 1.2)), Trained(2, (0.8,)), Trained(3, (1.05,))]
    assert tie_set(trained).low == pytest.approx(1.0)
    assert tie_set(trained).best == 2


def test_sets_of_images_give_the_spread_of_sampling_and_narrow_it() -> None:
    # Deviations of +-1 % and of +-2 % about the mean of two sets: (2 * 1 + 2 * 4) / 2 degrees of freedom, in 1e-4.
    sampling = math.sqrt(5) * 0.01
    trained = [Trained(2, (0.99, 1.01)), Trained(5, (9.8, 10.2))]
    found = tie_set(trained, retrain_spread=0.03)
    assert found.sampling_spread == pytest.approx(sampling)
    assert found.margin == pytest.approx(Z95 * math.sqrt(2 * (0.03**2 + sampling**2 / 2)))
    # A third C of one set scatters more than the best one does.
    edge = 1 + Z95 * math.sqrt(2 * 0.03**2 + sampling**2 / 2 + sampling**2)
    assert tie_set([*trained, Trained(3, (0.9999 * edge,))], retrain_spread=0.03).clusters == (2, 3)
    assert tie_set([*trained, Trained(3, (1.0001 * edge,))], retrain_spread=0.03).clusters == (2,)


def test_retrainings_and_their_sets_shrink_the_variance_of_a_score() -> None:
    sampling, given = 0.01 * math.sqrt(2), 0.02
    # C=4: three trainings of 2, 1 and 1 sets, all at 1; C=6 is at the edge of tying.
    best = [Trained(4, (0.99, 1.01)), Trained(4, (1.0,)), Trained(4, (1.0,))]
    variance = given**2 / 3 + sampling**2 * 2.5 / 9
    edge = 1 + Z95 * math.sqrt(variance + given**2 + sampling**2)
    assert tie_set([*best, Trained(6, (0.9999 * edge,))], retrain_spread=given).clusters == (4, 6)
    assert tie_set([*best, Trained(6, (1.0001 * edge,))], retrain_spread=given).clusters == (4,)
    found = tie_set(best, retrain_spread=given)
    # What a C of one training may have: as many sets as a training of the best has on (harmonic) average, 1.2.
    single = given**2 + sampling**2 * 2.5 / 3
    assert found.margin == pytest.approx(Z95 * math.sqrt(2 * single))
    assert found.high == pytest.approx(1 + Z95 * math.sqrt(single + variance)) and found.high < 1 + found.margin


def test_retrainings_of_four_degrees_of_freedom_are_pooled_with_the_given_spread() -> None:
    # Three of +-2 % about 1 (2 degrees), and three about 10 likewise: squares 2 * 2 * 4e-4.
    repeated = [Trained(2, (x,)) for x in (0.98, 1.0, 1.02)] + [Trained(8, (x,)) for x in (9.8, 10.0, 10.2)]
    pooled = math.sqrt((4 * 0.05**2 + 2 * 8e-4) / 8)
    assert tie_set(repeated, retrain_spread=0.05).retrain_spread == pytest.approx(pooled)
    assert tie_set(repeated[1:], retrain_spread=0.05).retrain_spread == 0.05  # 3 degrees do not count


def test_what_the_sets_scatter_is_not_counted_as_scatter_of_retrainings() -> None:
    rng = np.random.default_rng(3)
    trained = [
        Trained(c, tuple(5 * (1 + 0.01 * rng.standard_normal() + 0.04 * rng.standard_normal(2 + c % 4))))
        for c in range(2, 2000)
        for _ in range(2)
    ]
    found = tie_set(trained, retrain_spread=0.5 * 0.01)
    assert found.sampling_spread == pytest.approx(0.04, rel=0.02)
    assert found.retrain_spread == pytest.approx(0.01, rel=0.2)
    # Retrainings that agree better than their sets allow leave nothing over, and the given spread shrinks.
    alike = [Trained(2, (0.9, 1.1))] * 5
    assert tie_set(alike, retrain_spread=0.03).retrain_spread == pytest.approx(0.03 * math.sqrt(4 / 8))


@pytest.mark.parametrize("trainings", [1, 3])
def test_the_truly_best_c_of_two_is_in_the_tie_set_as_often_as_the_confidence_says(trainings: int) -> None:
    rng, hits, narrow, num = np.random.default_rng(5), 0, 0, 4000
    for _ in range(num):
        # Worse by a hair: the hardest case, in which the wrong one scores better half of the time.
        true = {10: 2.0, 30: 2.0001}
        trained = [
            Trained(c, tuple(score * (1 + 0.015 * rng.standard_normal() + 0.01 * rng.standard_normal(4))))
            for c, score in true.items()
            for _ in range(trainings)
        ]
        hits += 10 in tie_set(trained).clusters
        narrow += 10 in tie_set(trained, confidence=0.6).clusters
    # Of one side only: the other half of the time the true best is the best.
    assert hits / num == pytest.approx(0.95, abs=0.012)
    assert narrow / num == pytest.approx(0.6, abs=0.03)


def test_a_curve_of_many_c_keeps_its_minimum_and_drops_its_ends() -> None:
    rng, hits, ends, size, num = np.random.default_rng(6), 0, 0, 0, 1500
    grid = [2, 4, 8, 14, 20, 28, 40, 56, 80, 113, 160, 226]
    true = {c: 3 * (1 + 0.05 * math.log(c / 40) ** 2) for c in grid}
    for _ in range(num):
        found = tie_set(once({c: score * (1 + 0.015 * rng.standard_normal()) for c, score in true.items()}))
        hits += 40 in found.clusters
        ends += 2 in found.clusters or 226 in found.clusters
        size += len(found.clusters)
    assert hits / num > 0.93 and ends == 0 and 2 < size / num < 5


@pytest.mark.parametrize(
    ("trained", "settings", "said"),
    [
        ([], {}, "trained is empty; at least one training is needed"),
        ([Trained(3, ())], {}, r"scores of C=3 are \(\); at least one is needed, all finite and above 0"),
        ([Trained(3, (1.0, math.nan))], {}, "all finite and above 0"),
        ([Trained(3, (1.0,)), Trained(4, (0.0,))], {}, "scores of C=4"),
        ([Trained(3, (1.0,))], {"retrain_spread": -0.1}, "retrain_spread is -0.1; it must be finite and at least 0"),
        ([Trained(3, (1.0,))], {"retrain_spread": math.inf}, "retrain_spread is inf"),
        ([Trained(3, (1.0,))], {"confidence": 0.5}, r"confidence is 0.5; it must lie in \(0.5, 1\)"),
        ([Trained(3, (1.0,))], {"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(trained: list[Trained], settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tie_set(trained, **settings)


def test_the_pareto_front_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    for size, dims in itertools.product(range(1, 9), (1, 2, 3)):
        for _ in range(20):
            # Few values, so that many points are equal in one coordinate or in all.
            rows = {int(c): tuple(rng.integers(0, 4, dims).tolist()) for c in rng.permutation(50)[:size]}
            expected = []
            for c, row in rows.items():
                worse = [np.subtract(row, other) for other in rows.values()]
                if not any((each >= 0).all() and (each > 0).any() for each in worse):
                    expected.append(c)
            assert pareto_front(rows) == tuple(sorted(expected))


def test_equal_points_all_stay_and_infinities_are_the_worst() -> None:
    assert pareto_front({9: (1.0, 2.0), 3: (1.0, 2.0), 5: (1.0, 2.5), 7: (0.5, math.inf)}) == (3, 7, 9)
    assert pareto_front({}) == ()


@pytest.mark.parametrize("points", [{2: (1.0,), 3: (1.0, 2.0)}, {2: (1.0, math.nan), 3: (2.0, 2.0)}])
def test_points_that_cannot_be_compared_are_refused(points: dict[int, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="of one length, without NaN"):
        pareto_front(points)
