import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cedm_ray.clustering.probes import Probe, Reading
from cedm_ray.clustering.upper_bound import UpperBoundSearch

Read = Callable[[Probe], float]
BOTH = [None, 0.25]  # of low_spread: full fidelity only, and cheap probes first


class Curve:
    """Readings of a curve that falls to 0.96 at ``c_max``: each of C clusters is used or not by each of 4 heads.

    A cheap reading is one of the same curve at another C. The same probe always reads the same.
    """

    def __init__(self, c_max: float, seed: int, *, power: float = 1.5, low_spread: float = 0.25) -> None:
        self.c_max, self.power, self.seed = c_max, power, seed
        self.low_factor = math.exp(low_spread * np.random.default_rng(seed).standard_normal())

    def mean(self, clusters: float) -> float:
        return 1 - min(0.04 * (clusters / self.c_max) ** self.power, 0.95)

    def __call__(self, probe: Probe) -> float:
        c, low = probe.num_clusters, probe.fidelity == "low"
        rng = np.random.default_rng([self.seed, c, probe.repeat, low])
        heads = rng.binomial(c, self.mean(c / self.low_factor if low else c), size=4)
        return float(np.mean(np.maximum(heads, 1))) / c


def run(search: UpperBoundSearch, read: Read, k: int = 1) -> list[list[Probe]]:
    """The rounds of a search of which each is told before the next."""
    rounds = []
    while probes := search.ask(k):
        assert len(probes) <= k
        rounds.append(probes)
        for probe in probes:
            search.tell(probe, read(probe))
        assert len(rounds) <= 200
    assert search.done
    return rounds


def flat(rounds: list[list[Probe]]) -> list[Probe]:
    return [probe for probes in rounds for probe in probes]


def full(probes: list[Probe]) -> list[Probe]:
    return [probe for probe in probes if probe.fidelity == "full"]


def always(ratio: float) -> Read:
    return lambda probe: ratio


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("k", [1, 4])
def test_the_interval_holds_the_true_bound_as_often_as_promised(k: int, low_spread: float | None) -> None:
    rng = np.random.default_rng(k)
    covered, errors = [], []
    for seed in range(60):
        curve = Curve(math.exp(rng.uniform(math.log(40), math.log(2500))), seed, power=rng.uniform(0.8, 3))
        search = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread)
        run(search, curve, k)
        lower, upper = search.interval
        assert search.c_max is not None
        covered.append(lower <= curve.c_max <= upper)
        errors.append(abs(search.c_max / curve.c_max - 1))
    assert np.mean(covered) >= 0.9
    # Half the error is inside half the interval, which is 15 % of C_max or wider.
    assert np.median(errors) < 0.1


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_a_search_ends_in_few_probes_none_of_them_twice(k: int, low_spread: float | None, seed: int) -> None:
    search = UpperBoundSearch(100, max_clusters=5000, max_probes=12, low_spread=low_spread)
    asked = flat(run(search, Curve(30 * 3**seed, seed), k))
    assert len(set(asked)) == len(asked) == len(search.readings)
    ratios = [reading.ratio for reading in search.readings if reading.probe.fidelity == "full"]
    # Twice as many may be spent only where none of the first twelve has fallen to the cutoff.
    assert len(ratios) <= 12 or (min(ratios[:12]) > 0.96 and len(ratios) <= 24)
    assert all(2 <= probe.num_clusters <= 5000 for probe in asked)
    assert search.outcome in ("found", "out_of_probes", "capped")
    lower, upper = search.interval
    assert search.c_max is not None and lower <= search.c_max <= upper
    if search.outcome == "found":
        assert upper - lower <= search.resolution or upper / lower <= (1 + search.precision) ** 2
    assert search.ask(k) == []


def test_a_tighter_precision_takes_more_probes_and_gives_a_narrower_interval() -> None:
    widths, counts = [], []
    for precision in (0.5, 0.25, 0.12):
        search = UpperBoundSearch(100, max_clusters=5000, precision=precision, max_probes=80)
        counts.append(len(flat(run(search, Curve(900, 1)))))
        lower, upper = search.interval
        assert search.outcome == "found" and upper / lower <= (1 + precision) ** 2
        widths.append(upper / lower)
    assert widths == sorted(widths, reverse=True) and counts == sorted(counts) and counts[-1] > counts[0]


@pytest.mark.parametrize("low_spread", BOTH)
def test_more_probes_at_once_need_fewer_rounds(low_spread: float | None) -> None:
    rounds = []
    for k in (1, 2, 4, 8):
        searches = (UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread) for _ in range(6))
        rounds.append(sum(len(run(search, Curve(60 * 1.7**i, i), k)) for i, search in enumerate(searches)))
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] < rounds[0] / 2


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_probes_of_one_round_that_are_told_late_or_out_of_order_are_not_handed_out_again(k: int, seed: int) -> None:
    rng, curve = np.random.default_rng(seed), Curve(700, seed)
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=0.25, max_probes=12)
    asked = pending = list(search.ask(k))
    assert 1 <= len(pending) <= k
    while pending:
        # Refill what is free: never more than k run at once.
        probe = pending[int(rng.integers(len(pending)))]
        search.tell(probe, curve(probe))
        pending = [other for other in pending if other != probe]
        new = search.ask(k - len(pending))
        assert len(new) <= k - len(pending) and not set(new) & set(asked)
        asked, pending = asked + new, pending + new
    assert search.done and len(full(asked)) <= 12


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_probes_of_a_round_stand_apart(k: int) -> None:
    clusters = [probe.num_clusters for probe in UpperBoundSearch(100, max_clusters=5000).ask(k)]
    assert len(set(clusters)) == k and max(clusters) / min(clusters) > 2


def test_probes_asked_one_after_another_stand_apart_too() -> None:
    search = UpperBoundSearch(100, max_clusters=5000)
    asked = [search.ask()[0] for _ in range(4)]
    assert len({probe.num_clusters for probe in asked}) == 4
    search.tell(asked[0], Curve(300, 0)(asked[0]))
    assert search.ask()[0] not in asked


def test_what_is_under_way_counts_against_the_largest_number_of_probes() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, max_probes=3)
    asked = search.ask(8)
    assert len(asked) == 3 and search.ask(8) == [] and not search.done and search.c_max is None
    for probe in asked:
        search.tell(probe, 0.9)
    assert search.done


def say(search: UpperBoundSearch) -> tuple[object, ...]:
    return search.interval, search.outcome, search.c_max, search.done


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("seed", range(8))
def test_what_a_search_says_depends_on_the_set_of_readings_alone(seed: int, low_spread: float | None) -> None:
    rng, curve = np.random.default_rng(seed), Curve(50 * 1.7**seed, seed)
    whole = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread)
    run(whole, curve, k=1 + seed % 3)
    other = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread)
    for index in rng.permutation(len(whole.readings)):
        other.tell(whole.readings[index].probe, whole.readings[index].ratio)
    assert say(other) == say(whole) and other.ask(4) == []
    np.testing.assert_allclose(other.curve(np.array([50.0, 500])), whole.curve(np.array([50.0, 500])), atol=1e-9)
    by_probe = sorted(whole.readings, key=lambda reading: reading.probe)
    assert sorted(other.readings, key=lambda reading: reading.probe) == by_probe


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("seed", range(6))
def test_a_new_search_goes_on_from_stored_readings_where_the_old_one_stopped(
    seed: int, low_spread: float | None
) -> None:
    rng, curve = np.random.default_rng(seed), Curve(400, seed)
    whole = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread)
    asked = flat(run(whole, curve))
    cut = int(rng.integers(0, len(asked) + 1))
    resumed = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread)
    for probe in rng.permutation(np.arange(cut)):
        resumed.tell(asked[probe], curve(asked[probe]))
    assert flat(run(resumed, curve)) == asked[cut:] and say(resumed) == say(whole)


def test_a_reading_that_was_never_asked_for_is_taken_and_not_asked_for() -> None:
    search = UpperBoundSearch(100, max_clusters=5000)
    for repeat in range(4):
        search.tell(Probe(300, repeat), 0.96)
    lower, upper = search.interval
    assert lower < 300 < upper < 4 * lower
    assert not set(flat(run(search, Curve(300, 0), k=2))) & {Probe(300, repeat) for repeat in range(4)}


def test_a_reading_of_a_probe_under_way_may_be_told_twice() -> None:
    search = UpperBoundSearch(100, max_clusters=5000)
    [probe] = search.ask()
    search.tell(probe, 0.99)
    before = say(search)
    search.tell(probe, 0.99)
    assert say(search) == before and search.readings == [Reading(probe, 0.99)]


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_cheap_probes_come_first_and_never_after_a_full_one(k: int, seed: int) -> None:
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=0.25)
    fidelities = [probe.fidelity for probe in flat(run(search, Curve(700, seed), k))]
    lows = fidelities.count("low")
    assert 1 <= lows < len(fidelities) and set(fidelities[:lows]) == {"low"} and set(fidelities[lows:]) == {"full"}


def test_without_a_spread_of_the_low_fidelity_no_cheap_probe_is_asked_for_or_counts() -> None:
    search = UpperBoundSearch(100, max_clusters=5000)
    before = search.interval
    search.tell(Probe(100, fidelity="low"), 0.5)
    assert search.interval == before
    assert all(probe.fidelity == "full" for probe in flat(run(search, Curve(700, 0), k=3)))


def test_no_cheap_probe_follows_a_stored_full_reading() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=0.25)
    search.tell(Probe(200), 0.99)
    assert [probe.fidelity for probe in search.ask(4)] == ["full"] * 4


def test_cheap_readings_alone_never_end_a_search() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=0.01, precision=0.5, resolution=1000)
    for repeat in range(20):
        for clusters in (250, 300, 350):
            search.tell(Probe(clusters, repeat, "low"), Curve(300, 0).mean(clusters))
            assert not search.done and search.c_max is None
    lower, upper = search.interval
    assert lower < 300 < upper < 1.6 * lower  # they do tell where it lies
    assert [probe.fidelity for probe in search.ask()] == ["full"]


@pytest.mark.parametrize("seed", range(3))
def test_a_cheap_fidelity_that_is_off_does_not_decide_against_full_readings(seed: int) -> None:
    curve = Curve(300, seed)
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=0.25)
    curve.low_factor = math.exp(2 * 0.25)
    run(search, curve)
    lower, upper = search.interval
    assert lower <= 300 <= upper


def test_probes_that_fall_together_repeat_a_number_of_clusters_with_new_seeds() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, precision=0.02, resolution=1, max_probes=40)
    asked = flat(run(search, Curve(1500, 0)))
    assert max(probe.repeat for probe in asked) >= 2
    for clusters in {probe.num_clusters for probe in asked}:
        repeats = [probe.repeat for probe in asked if probe.num_clusters == clusters]
        assert repeats == list(range(len(repeats)))


def test_a_repeat_takes_the_first_number_that_is_free() -> None:
    search = UpperBoundSearch(10, max_clusters=40, precision=1e-6, resolution=1, max_probes=100)
    for clusters in range(2, 41):
        search.tell(Probe(clusters, 1), Curve(12, 0).mean(clusters))
    asked = search.ask(20)
    by_clusters = {c: [probe.repeat for probe in asked if probe.num_clusters == c] for c in range(2, 41)}
    assert any(len(repeats) > 1 for repeats in by_clusters.values())
    for repeats in by_clusters.values():
        assert repeats == [0, *range(2, 1 + len(repeats))][: len(repeats)]


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("largest", [30, 600, 5000, 50_000])
def test_a_curve_that_never_falls_is_capped_and_the_probes_grow_at_most_fourfold(
    largest: int, k: int, low_spread: float | None
) -> None:
    used_well = min(100, largest)
    search = UpperBoundSearch(used_well, max_clusters=largest, low_spread=low_spread, resolution=1)
    for probes in run(search, always(1.0), k):
        assert max(probe.num_clusters for probe in probes) <= min(4 * used_well, largest)
        used_well = max(used_well, *(probe.num_clusters for probe in probes))
    assert search.outcome == "capped" and search.c_max == largest == search.interval[1]


def test_a_curve_that_is_one_for_small_c_does_not_make_the_search_run_away() -> None:
    # Fewer than one in a thousand unused up to 200, C_max 400: nothing far above is ever tried.
    read = Curve(400, 0, power=5)
    search = UpperBoundSearch(20, max_clusters=50_000)
    asked = flat(run(search, read))
    assert max(probe.num_clusters for probe in asked) <= 4 * 400
    lower, upper = search.interval
    assert lower <= 400 <= upper


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("c_start", [2, 16, 500])
@pytest.mark.parametrize("read", [always(0.5), lambda probe: 1 / probe.num_clusters])
def test_a_curve_that_has_fallen_at_two_leaves_nothing_to_search(
    read: Read, c_start: int, low_spread: float | None
) -> None:
    search = UpperBoundSearch(c_start, max_clusters=500, low_spread=low_spread, resolution=1)
    asked = flat(run(search, read))
    assert search.outcome == "empty" and search.c_max == 2 and search.interval[0] == 2
    assert min(probe.num_clusters for probe in asked) >= 2


@pytest.mark.parametrize("ratio", [0.5, 0.96, 1.0])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("largest", [2, 3, 10])
def test_few_clusters_are_searched_too(largest: int, k: int, ratio: float) -> None:
    for low_spread in BOTH:
        search = UpperBoundSearch(2, max_clusters=largest, resolution=1, low_spread=low_spread)
        asked = flat(run(search, always(ratio), k))
        lower, upper = search.interval
        assert search.c_max is not None
        assert 2 <= lower <= search.c_max <= upper <= largest and len(full(asked)) <= 20
        assert all(2 <= probe.num_clusters <= largest for probe in asked)
        if ratio == 0.5 or largest == 2:
            assert search.outcome == "empty"
        else:
            assert search.c_max > 2


@pytest.mark.parametrize("seed", range(8))
def test_a_small_bound_is_found_from_far_above(seed: int) -> None:
    curve = Curve(12, seed)
    search = UpperBoundSearch(100, max_clusters=5000, resolution=3)
    run(search, curve)
    lower, upper = search.interval
    assert search.outcome in ("found", "out_of_probes")
    assert lower <= 1.5 * 12 and upper >= 12 / 1.5 and upper - lower <= 12


@pytest.mark.parametrize("low_spread", BOTH)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ["at the cutoff", "alternating", "rising", "a step", "random"])
def test_readings_of_no_falling_curve_end_the_search_too(name: str, k: int, low_spread: float | None) -> None:
    rng = np.random.default_rng(0)
    count = iter(range(1000))
    reads: dict[str, Read] = {
        "at the cutoff": always(0.96),
        "alternating": lambda probe: (0.9, 1.0)[next(count) % 2],
        "rising": lambda probe: 0.9 if probe.num_clusters < 100 else 1.0,
        "a step": lambda probe: 1.0 if probe.num_clusters < 333 else 0.01,
        "random": lambda probe: 1 - rng.random(),
    }
    search = UpperBoundSearch(100, max_clusters=5000, low_spread=low_spread, precision=0.01, resolution=1)
    asked = flat(run(search, reads[name], k))
    lower, upper = search.interval
    assert search.c_max is not None
    assert len(full(asked)) <= 20 and 2 <= lower <= search.c_max <= upper <= 5000
    if name == "a step":
        assert lower / 1.15 <= 333 <= upper * 1.15


def test_it_is_out_of_probes_where_the_interval_is_still_too_wide() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, precision=0.01, resolution=1, max_probes=4)
    assert len(flat(run(search, Curve(900, 0)))) == 4
    assert search.outcome == "out_of_probes" and search.c_max is not None


def test_readings_that_fall_late_leave_the_search_the_probes_that_were_added() -> None:
    # From 20 the first four readings lie above the cutoff; the sixth is the first one to fall to it.
    search = UpperBoundSearch(20, max_clusters=50_000, max_probes=4, precision=0.01, resolution=1)
    asked = flat(run(search, lambda probe: Curve(900, 0).mean(probe.num_clusters)))
    fallen = [reading.ratio <= 0.96 for reading in search.readings]
    assert fallen.index(True) == 5 and len(asked) == 8
    shuffled = UpperBoundSearch(20, max_clusters=50_000, max_probes=4, precision=0.01, resolution=1)
    for reading in reversed(search.readings[:6]):
        shuffled.tell(reading.probe, reading.ratio)
    assert not shuffled.done and flat(run(shuffled, lambda probe: Curve(900, 0).mean(probe.num_clusters))) == asked[6:]


def test_readings_that_were_never_asked_for_add_no_probes_where_r_c_has_fallen() -> None:
    search = UpperBoundSearch(100, max_clusters=5000, max_probes=3, precision=0.01, resolution=1)
    for clusters, ratio in ((100, 0.99), (200, 0.97), (400, 0.95), (800, 0.9)):
        search.tell(Probe(clusters), ratio)
    assert search.outcome == "out_of_probes" and search.ask() == []


def test_more_confidence_means_a_wider_interval() -> None:
    searches = [UpperBoundSearch(100, max_clusters=5000, confidence=share) for share in (0.5, 0.8, 0.95)]
    for search in searches:
        for clusters in (150, 400, 250):
            search.tell(Probe(clusters), Curve(300, 0).mean(clusters))
    (a, b), (c, d), (e, f) = (search.interval for search in searches)
    assert e < c < a < 300 < b < d < f


def test_the_fitted_curve_is_a_band_around_the_true_one() -> None:
    curve = Curve(600, 3)
    search = UpperBoundSearch(100, max_clusters=5000)
    run(search, curve)
    clusters = np.array([400.0, 600, 900])
    band = search.curve(clusters)
    assert band.shape == (3, 3) and (np.diff(band, axis=0) >= 0).all() and (np.diff(band, axis=1) < 0).all()
    true = np.array([curve.mean(c) for c in clusters])
    assert (band[0] - 0.005 <= true).all() and (true <= band[2] + 0.005).all()
    assert search.c_max is not None
    assert search.curve(np.array([float(search.c_max)]))[1, 0] == pytest.approx(0.96, abs=0.003)


@pytest.mark.parametrize("seed", range(3))
def test_a_probit_curve_is_found_at_another_cutoff(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def read(probe: Probe) -> float:
        c = probe.num_clusters
        heads = rng.binomial(c, stats.norm.sf(stats.norm.ppf(0.2) + 0.9 * math.log(c / 700)), size=4)
        return float(heads.mean()) / c

    search = UpperBoundSearch(100, 0.8, max_clusters=5000)
    run(search, read)
    lower, upper = search.interval
    assert search.outcome == "found" and lower <= 700 <= upper


@pytest.mark.parametrize(
    ("num_clusters", "ratio", "message"),
    [
        (50, math.nan, r"ratio is nan; it must lie in \(0, 1\]"),
        (50, 0.0, r"ratio is 0.0; it must lie in \(0, 1\]"),
        (50, 1.1, r"ratio is 1.1; it must lie in \(0, 1\]"),
        (1, 1.0, r"num_clusters is 1; it must lie in \[2, max_clusters\], \[2, 400\]"),
        (401, 1.0, r"num_clusters is 401; it must lie in \[2, max_clusters\], \[2, 400\]"),
        (100, 0.5, r"ratio is 0.5; it must be 0.99, as told before"),
    ],
)
def test_impossible_and_contradicting_readings_are_refused(num_clusters: int, ratio: float, message: str) -> None:
    search = UpperBoundSearch(50, max_clusters=400)
    search.tell(Probe(100), 0.99)
    before = say(search)
    with pytest.raises(ValueError, match=message):
        search.tell(Probe(num_clusters), ratio)
    assert search.readings == [Reading(Probe(100), 0.99)] and say(search) == before


def test_a_cheap_reading_takes_no_number_of_a_full_one() -> None:
    search = UpperBoundSearch(10, max_clusters=40, low_spread=0.25, precision=1e-6, resolution=1)
    for clusters in range(2, 41):
        search.tell(Probe(clusters, 0, "low"), Curve(12, 0).mean(clusters))
    assert [(probe.repeat, probe.fidelity) for probe in search.ask(2)] == [(0, "full")] * 2


def test_another_repeat_or_fidelity_contradicts_nothing() -> None:
    search = UpperBoundSearch(50, max_clusters=400)
    probes = [Probe(100), Probe(100, 1), Probe(100, 0, "low")]
    for probe, ratio in zip(probes, (0.99, 0.97, 0.95), strict=True):
        search.tell(probe, ratio)
    assert [reading.probe for reading in search.readings] == probes


@pytest.mark.parametrize("k", [0, -1])
def test_asking_for_no_probe_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; it must be at least 1"):
        UpperBoundSearch(50, max_clusters=400).ask(k)


@pytest.mark.parametrize(
    "change",
    [
        {"c_start": 1},
        {"c_start": 401},
        {"cutoff": 0.0},
        {"cutoff": 1.0},
        {"max_clusters": 1},
        {"precision": 0.0},
        {"resolution": 0},
        {"confidence": 0.0},
        {"confidence": 1.0},
        {"max_probes": 0},
        {"low_spread": 0.0},
        {"low_spread": math.nan},
    ],
)
def test_arguments_out_of_bounds_are_refused_by_name(change: dict[str, float]) -> None:
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must "):
        UpperBoundSearch(**({"c_start": 10, "max_clusters": 400} | change))  # type: ignore[arg-type]
