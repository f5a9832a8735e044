import math

import numpy as np
import pytest

from cedm_ray.granularity.rank_agreement import RankAgreement, disagreement, rank_agreement


def test_rank_agreement_is_spearmans_formula_over_the_runs_that_reached_both_rungs() -> None:
    rng = np.random.default_rng(1)
    early, late = rng.permutation(8), rng.permutation(8)
    readings = {
        f"C={i}": {15: 1 + a, 30: 20 - a, 60: 3.0 + b} for i, (a, b) in enumerate(zip(early, late, strict=True))
    }
    readings |= {"stopped": {15: 0.1, 30: 99.0}, "torn": {15: 0.2, 60: math.nan}, "skipped": {30: 0.1, 60: 9.0}}
    first, second, third = rank_agreement(readings, (60, 15, 30, 15))
    assert [(each.low_kimg, each.high_kimg, each.num_runs) for each in (first, second, third)] == [
        (15, 30, 9), (15, 60, 8), (30, 60, 9)
    ]  # fmt: skip
    assert first.spearman == pytest.approx(-1.0)
    assert second.spearman == pytest.approx(1 - 6 * int(((early - late) ** 2).sum()) / (8 * 63))


def test_too_few_runs_and_equal_scores_say_nothing() -> None:
    runs = {i: {1: float(i), 2: float(-i), 3: 5.0} for i in range(4)}
    assert rank_agreement(runs, (1, 2, 3)) == (RankAgreement(1, 2, -1.0, 4),)
    assert rank_agreement({i: runs[i] for i in range(3)}, (1, 2, 3)) == ()
    assert rank_agreement({}, (1, 2)) == ()


def test_disagreement_is_the_worst_pair_with_the_highest_rung() -> None:
    early, worst, late = RankAgreement(1, 2, -0.9, 9), RankAgreement(1, 4, 0.2, 5), RankAgreement(2, 4, 0.4, 5)
    assert disagreement((early, late, worst)) == worst
    assert disagreement((early, late)) == late
    assert disagreement((early, late), least=0.4) is None
    assert disagreement(()) is None
    assert RankAgreement(12_500, 100_000, 0.314, 9).sentence() == (
        "the scores of 9 trainings at 12,500 and at 100,000 kimg have a rank correlation of 0.31 "
        "(1 is the same order, 0 none in common)"
    )
