import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from cedm_ray.clustering.paper_rule import PaperRule
from cedm_ray.clustering.probes import BoundSearch, Probe
from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.config import load
from cedm_ray.stages.inputs.clusterings import clustering_job
from cedm_ray.stages.probes import MAX_FAILURES, ProbeJobs, ProbeSearcher
from cedm_ray.stages.results.bounds import LowerBound, UpperBound
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.training.interruptions import FAILED

EMBEDDINGS = {"images": "abc", "backbone": "pixels"}


def jobs(folder: Path, *flags: str) -> ProbeJobs:
    return ProbeJobs(load(["--bound.low-heads", "2", *flags]), EMBEDDINGS, folder / "images", Store(folder))


def test_the_first_full_probe_of_a_c_is_the_clustering_of_a_trial(tmp_path: Path) -> None:
    made = jobs(tmp_path, "--seed", "3")
    trial = clustering_job(made.config, EMBEDDINGS, tmp_path / "images", 40, Store(tmp_path))
    assert made(Probe(40)) == trial and trial.seed == 3


def test_repeats_have_seeds_of_their_own_and_cheap_probes_fewer_heads(tmp_path: Path) -> None:
    made = jobs(tmp_path, "--seed", "3")
    assert [made(Probe(40, repeat)).seed for repeat in range(3)] == [3, 4, 5]
    low, full = made(Probe(40, 0, "low")), made(Probe(40))
    assert (low.settings.num_heads, full.settings.num_heads) == (2, made.config.temi.num_heads)
    assert len({made(Probe(40, repeat, fidelity)).path for repeat in range(2) for fidelity in ("low", "full")}) == 4
    record = made.record(Probe(40, 1, "low"), 0.9)
    assert (record.seed, record.work) == (4, 2 * made.config.temi.epochs)


@pytest.mark.parametrize(("heads", "cheap"), [("2", True), ("4", False), ("9", False), ("None", False)])
def test_cheap_probes_are_run_where_they_are_cheaper(tmp_path: Path, heads: str, cheap: bool) -> None:
    assert jobs(tmp_path, "--bound.low-heads", heads).has_low is cheap


def test_the_fit_reads_the_mean_over_the_heads_and_the_paper_s_rule_the_chosen_one(tmp_path: Path) -> None:
    facts = {"utilization_ratio": 0.95, "quality": {"mean_utilization_ratio": 0.97}}
    assert jobs(tmp_path).reading(facts) == 0.97
    assert jobs(tmp_path, "--bound.rule", "paper").reading(facts) == 0.95


def test_the_search_reaches_to_the_upper_end_of_the_interval() -> None:
    assert UpperBound(100, (90, 120), 0.95, "found").end == 120
    assert UpperBound(100, None, None, "given").end == 100


def test_the_lower_bound_is_the_mean_and_the_deviation_of_what_is_used() -> None:
    bound = LowerBound(((300, 33), (400, 35), (600, 40)))
    assert (bound.mean, bound.start) == (36.0, 36) and bound.std == pytest.approx(3.6056, abs=1e-4)  # sqrt(26 / 2)
    assert LowerBound(((300, 33),)).std == 0 and LowerBound(((300, 1),)).start == 2


def probe_all(
    ratio: Callable[[int], float], *, fails_once: Collection[int] = (), fails_always: Collection[int] = ()
) -> tuple[BoundSearch, list[int]]:
    """A search for C_max whose probes of these numbers of clusters fail, and all that it asked for."""
    search = ProbeSearcher(PaperRule(10, 0.96, max_clusters=1000))
    asked: list[int] = []
    for number in range(100):
        params = search.suggest(str(number))
        if params == Searcher.FINISHED:
            break
        assert isinstance(params, dict)
        assert search.suggest(f"{number}-too-early") is None
        asked.append(params["num_clusters"])
        fails = asked[-1] in fails_always or (asked[-1] in fails_once and asked.count(asked[-1]) == 1)
        result = None if fails else {"reading": ratio(asked[-1])}
        search.on_trial_complete(str(number), result, error=fails)
    return search.search, asked


def test_tune_s_probes_lead_to_the_same_c_max_as_asking_and_telling() -> None:
    search, asked = probe_all(lambda c: min(1.0, 73 / c))
    assert search.c_max == 77 and len(asked) == len(set(asked))  # 73 / 76 > 0.96 >= 73 / 77


def test_a_probe_that_fails_is_run_again_but_not_for_ever() -> None:
    search, asked = probe_all(lambda c: min(1.0, 73 / c), fails_once={20})
    assert search.c_max == 77 and asked.count(20) == 2
    search, asked = probe_all(lambda c: 1.0, fails_always={10})
    assert not search.done and asked == [10] * (MAX_FAILURES + 1)


def test_the_next_round_is_asked_for_when_the_last_one_is_told_whatever_came_first() -> None:
    orders = []
    for backwards in (False, True):
        searcher = ProbeSearcher(UpperBoundSearch(50, max_clusters=1000), at_once=3)
        rounds: list[list[Probe]] = []
        while True:
            asked: dict[str, Probe] = {}
            while isinstance(params := searcher.suggest(f"{len(rounds)}-{len(asked)}"), dict):
                asked[f"{len(rounds)}-{len(asked)}"] = Probe(**params)
            if not asked:
                assert params == Searcher.FINISHED
                break
            assert params is None and len(asked) <= 3
            rounds.append(list(asked.values()))
            for trial_id in sorted(asked, reverse=backwards):
                reading = max(0.1, 1 - 0.04 * asked[trial_id].num_clusters / 200)
                searcher.on_trial_complete(trial_id, {"reading": reading})
        assert searcher.search.done and len(rounds) > 1
        orders.append(rounds)
    assert orders[0] == orders[1]


@pytest.mark.parametrize(
    ("result", "error", "reason"),
    [
        ({"reading": math.nan, FAILED: "ValueError: no"}, False, "ValueError: no"),
        (None, True, "killed from outside (memory?)"),
    ],
)
def test_a_probe_that_says_why_it_failed_is_not_taken_for_a_reading(result: Any, error: bool, reason: str) -> None:
    searcher = ProbeSearcher(UpperBoundSearch(50, max_clusters=1000))
    first = searcher.suggest("t0")
    searcher.on_trial_complete("t0", result, error)
    assert (searcher.failures, searcher.reason) == (1, reason) and not searcher.search.readings
    assert searcher.suggest("t1") == first  # it is tried again
