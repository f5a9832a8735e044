import math
from collections.abc import Callable

import numpy as np
import pytest

from cedm_ray.clustering.paper_rule import PaperRule
from cedm_ray.clustering.probes import Probe, Reading

Curve = Callable[[int], float]


def run(search: PaperRule, curve: Curve, limit: int = 200) -> list[int]:
    asked = []
    while probes := search.ask():
        num_clusters = probes[0].num_clusters
        assert probes == [Probe(num_clusters)]
        asked.append(num_clusters)
        search.tell(probes[0], curve(num_clusters))
        assert len(asked) <= limit
    return asked


def falling(true: int) -> Curve:
    """Above 0.96 below ``true``, at most 0.96 from there on."""
    return lambda c: 0.97 + 0.03 / c if c < true else 0.96 * (true / c)


def clusters_of(reading: Reading) -> int:
    return reading.probe.num_clusters


@pytest.mark.parametrize("seed", range(300))
def test_any_falling_curve_is_bounded_to_the_resolution_in_few_probes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = int(rng.integers(3, 5000))
    c_start, resolution = int(rng.integers(2, 1000)), int(rng.integers(1, 40))
    search = PaperRule(c_start, resolution=resolution, max_clusters=8192)
    asked = run(search, falling(true))
    assert search.outcome == "found" or (search.outcome == "empty" and true - 2 < resolution)
    assert search.c_max is not None and 0 <= search.c_max - true < resolution
    assert len(set(asked)) == len(asked)
    # Doublings or halvings until the two ends are known, then one probe for each halving of what lies between.
    to_bracket = 1 + math.ceil(abs(math.log2(true / c_start)) + 1)
    assert len(asked) <= to_bracket + math.ceil(math.log2(max(1, true / resolution))) + 1


@pytest.mark.parametrize("true", range(3, 70))
def test_at_a_resolution_of_one_cluster_the_bound_is_exact(true: int) -> None:
    for c_start in (2, 3, 20, 64, 99):
        search = PaperRule(c_start)
        run(search, falling(true))
        assert search.c_max == true and search.interval == (true - 1, true)


@pytest.mark.parametrize("seed", range(100))
def test_a_noisy_curve_ends_and_no_reading_is_asked_for_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    readings = rng.choice([0.9, 0.95, 0.97, 1.0], size=2001)
    search = PaperRule(int(rng.integers(2, 400)), resolution=int(rng.integers(1, 9)), max_clusters=2000)
    asked = run(search, lambda c: float(readings[c]))
    assert search.done and len(set(asked)) == len(asked) <= 2 + 2 * math.ceil(math.log2(2000))
    low = [reading.probe.num_clusters for reading in search.readings if reading.ratio <= 0.96]
    assert search.c_max == (min(low) if low else 2000)


@pytest.mark.parametrize("seed", range(50))
def test_a_new_search_goes_on_from_stored_readings_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curve = falling(int(rng.integers(3, 900)))
    whole = PaperRule(20, resolution=2, max_clusters=1024)
    asked = run(whole, curve)
    cut = int(rng.integers(0, len(asked) + 1))
    resumed = PaperRule(20, resolution=2, max_clusters=1024)
    for num_clusters in rng.permutation(asked[:cut]).tolist():
        resumed.tell(Probe(num_clusters), curve(num_clusters))
    assert run(resumed, curve) == asked[cut:]
    assert resumed.c_max == whole.c_max
    assert sorted(resumed.readings, key=clusters_of) == sorted(whole.readings, key=clusters_of)


def test_the_probes_double_then_bisect() -> None:
    search = PaperRule(50, resolution=10, max_clusters=10_000)
    assert run(search, falling(330)) == [50, 100, 200, 400, 300, 350, 325, 337, 331]
    assert search.c_max == 331 and search.interval == (325, 331)
    assert search.readings[0] == Reading(Probe(50), pytest.approx(0.9706))


def test_the_probes_halve_where_the_start_is_already_too_high() -> None:
    search = PaperRule(400, max_clusters=10_000)
    assert run(search, falling(61)) == [400, 200, 100, 50, 75, 62, 56, 59, 60, 61]
    assert search.c_max == 61


def test_a_ratio_at_the_cutoff_counts_as_fallen() -> None:
    search = PaperRule(8, max_clusters=16)
    run(search, lambda c: 0.96 if c >= 6 else 1.0)
    assert search.c_max == 6


def test_the_published_readings_give_the_published_region() -> None:
    # Clusters used by TEMI on CIFAR-100; the cutoff lies between 600 (0.967) and 800 (0.939).
    used = {20: 20, 25: 25, 50: 50, 100: 100, 200: 199, 300: 298, 400: 394, 500: 489, 600: 580, 800: 751, 1000: 909}
    search = PaperRule(100, resolution=200, max_clusters=1000)
    for num_clusters, count in used.items():
        search.tell(Probe(num_clusters), count / num_clusters)
    assert search.outcome == "found" and search.interval == (600, 800) and search.c_max == 800


def test_a_curve_that_never_falls_is_capped() -> None:
    search = PaperRule(30, max_clusters=100)
    assert run(search, lambda c: 1.0) == [30, 60, 100]
    assert search.outcome == "capped" and search.c_max == 100 and search.interval == (100, None)


def test_a_curve_that_has_fallen_at_two_leaves_nothing_to_search() -> None:
    search = PaperRule(16, max_clusters=100)
    assert run(search, lambda c: 0.5) == [16, 8, 4, 2]
    assert search.outcome == "empty" and search.c_max == 2


def test_without_a_largest_number_of_clusters_the_doubling_goes_on() -> None:
    search = PaperRule(3, cutoff=0.96, resolution=1000)
    assert run(search, falling(1500)) == [3, 6, 12, 24, 48, 96, 192, 384, 768, 1536]
    assert search.outcome == "found" and search.c_max == 1536 and search.interval == (768, 1536)


def test_a_cutoff_of_one_counts_every_reading_as_fallen() -> None:
    search = PaperRule(10, cutoff=1)
    assert run(search, lambda c: 1.0) == [10, 5, 2]
    assert search.outcome == "empty" and search.c_max == 2


def test_nothing_is_handed_out_until_the_last_probe_is_told() -> None:
    search = PaperRule(50, max_clusters=400)
    assert search.ask() == [Probe(50)] and search.ask() == [] and not search.done and search.c_max is None
    search.tell(Probe(70), 1.0)  # unasked for, and taken
    assert search.ask() == []
    search.tell(Probe(50), 1.0)
    assert search.ask() == [Probe(140)]


def test_one_probe_is_handed_out_however_many_could_run_at_once() -> None:
    search = PaperRule(50, max_clusters=400)
    assert search.ask(8) == [Probe(50)] and search.ask(8) == []
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        search.ask(0)


@pytest.mark.parametrize("probe", [Probe(50, repeat=1), Probe(50, fidelity="low")])
def test_repeats_and_cheap_readings_are_refused(probe: Probe) -> None:
    search = PaperRule(50, max_clusters=400)
    with pytest.raises(ValueError, match="must be the first of its C, at full fidelity"):
        search.tell(probe, 1.0)
    assert search.readings == []


@pytest.mark.parametrize(
    ("num_clusters", "ratio"), [(50, math.nan), (50, 0.0), (50, 1.1), (1, 1.0), (401, 1.0), (100, 0.5)]
)
def test_impossible_and_contradicting_readings_are_refused(num_clusters: int, ratio: float) -> None:
    search = PaperRule(50, max_clusters=400)
    search.tell(Probe(100), 0.99)
    with pytest.raises(ValueError, match=f"{num_clusters}"):
        search.tell(Probe(num_clusters), ratio)
    assert search.readings == [Reading(Probe(100), 0.99)]


@pytest.mark.parametrize(
    "change",
    [{"c_start": 1}, {"c_start": 401}, {"cutoff": 0.0}, {"cutoff": 1.01}, {"resolution": 0}, {"max_clusters": 1}],
)
def test_arguments_out_of_bounds_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PaperRule(**({"c_start": 10, "max_clusters": 400} | change))  # type: ignore[arg-type]
