from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cedm_ray.clustering.paper_rule import PaperRule
from cedm_ray.clustering.probes import BoundSearch, Probe
from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.stages.probes import MAX_RETRIES, ProbeSearcher
from cedm_ray.stages.records import TrialRecord
from cedm_ray.stages.searchers import GranularitySearcher, PruningOptunaSearch, RungScheduler, log_spaced

TOTAL = 8


def score(num_clusters: int) -> float:
    """Best at 12, worse on both sides on a log scale."""
    return 1.0 + float(np.log(num_clusters / 12) ** 2)


def record(num_clusters: int, kimg: int = TOTAL) -> TrialRecord:
    state = "complete" if kimg >= TOTAL else "stopped"
    rungs = tuple({"kimg": k, "score": score(num_clusters)} for k in (2, 4, 8) if k <= kimg)
    params = {"grouping": "temi", "num_clusters": num_clusters}
    return TrialRecord(f"key{num_clusters}", f"C={num_clusters}", "temi", num_clusters, params, state, rungs=rungs)  # type: ignore[arg-type]


def searcher(
    c_max: int, num_trials: int, known: list[TrialRecord] | None = None, **changes: Any
) -> GranularitySearcher:
    settings: dict[str, Any] = {
        "design": [{"num_clusters": c} for c in log_spaced(2, c_max, 3)],
        "baselines": [],
        "known": known or [],
        "num_trials": num_trials,
        "total_kimg": TOTAL,
        "seed": 0,
        "points": range(2, c_max),
    }
    return GranularitySearcher({"num_clusters": tune.lograndint(2, c_max)}, **{**settings, **changes})


def finish(search: GranularitySearcher, trial_id: str, params: dict[str, Any]) -> None:
    for kimg in (2, 4, 8):
        search.on_trial_result(trial_id, {"kimg": kimg, "score": score(params["num_clusters"])})
    search.on_trial_complete(trial_id, {"kimg": TOTAL, "score": score(params["num_clusters"])})


def drain(search: GranularitySearcher, most: int = 1000) -> list[int]:
    found = []
    for number in range(most):
        params = search.suggest(f"t{number}")
        if params == Searcher.FINISHED:
            break
        assert isinstance(params, dict)
        found.append(params["num_clusters"])
        finish(search, f"t{number}", params)
    return found


def test_no_number_of_clusters_is_proposed_twice_and_all_lie_below_c_max() -> None:
    found = drain(searcher(40, 15))
    assert len(found) == len(set(found)) == 15
    assert min(found) == 2 and max(found) == 39


def test_a_small_range_is_used_up_and_then_the_search_ends() -> None:
    assert sorted(drain(searcher(9, 100))) == [2, 3, 4, 5, 6, 7, 8]
    assert drain(searcher(3, 5, design=[])) == [2]


def test_the_sampler_turns_to_where_scores_are_good() -> None:
    found = drain(searcher(200, 25))
    assert min(abs(np.log(c / 12)) for c in found) < 0.1
    assert sum(4 <= c <= 36 for c in found[3:]) > 12  # a third of the range on a log scale, over half of the trials


def test_a_search_that_goes_on_proposes_what_an_undisturbed_one_does() -> None:
    whole = drain(searcher(60, 12))
    for done in (3, 7):
        assert drain(searcher(60, 12, known=[record(c) for c in whole[:done]])) == whole[done:]


def test_baselines_come_first_do_not_count_and_optuna_does_not_hear_of_them() -> None:
    baseline = {"grouping": "none", "num_clusters": 1}
    search = searcher(40, 2, baselines=[baseline])
    assert search.suggest("b") == baseline
    search.on_trial_result("b", {"kimg": 8, "score": 0.0})
    search.on_trial_complete("b", {"kimg": 8, "score": 0.0})
    assert len(drain(search)) == 2
    assert all(trial.value != 0.0 for trial in search._optuna._ot_study.trials)


def test_a_stopped_trial_is_pruned_with_its_steps_in_kimg_and_a_failed_one_fails() -> None:
    space = PruningOptunaSearch.convert_search_space({"num_clusters": tune.lograndint(2, 40)})
    search = PruningOptunaSearch(space, metric="score", mode="min", total_kimg=TOTAL)
    for trial_id, kimgs in (("whole", (2, 4, 8)), ("stopped", (2, 4)), ("failed", (2,))):
        search.suggest(trial_id)
        for kimg in kimgs:
            search.on_trial_result(trial_id, {"kimg": kimg, "score": 5.0 + kimg, "training_iteration": 1})
    search.on_trial_complete("whole", {"kimg": 8, "score": 13.0})
    search.on_trial_complete("stopped", {"kimg": 4, "score": 9.0})
    search.on_trial_complete("failed", error=True)
    whole, stopped, failed = search._ot_study.trials
    assert (whole.state.name, stopped.state.name, failed.state.name) == ("COMPLETE", "PRUNED", "FAIL")
    assert whole.value == 13.0 and whole.intermediate_values == {2: 7.0, 4: 9.0, 8: 13.0}
    assert stopped.intermediate_values == {2: 7.0, 4: 9.0}


def test_log_spaced_points_are_whole_distinct_and_hold_both_ends() -> None:
    assert log_spaced(2, 129, 4) == [2, 8, 32, 128]
    assert log_spaced(2, 5, 10) == [2, 3, 4]
    assert log_spaced(2, 3, 5) == [2]
    assert log_spaced(2, 51, 1) == [10]


def trial(number: int, grouping: str = "temi") -> Any:
    return SimpleNamespace(trial_id=f"trial{number}", config={"grouping": grouping})


def stops(scheduler: RungScheduler, who: Any, kimg: int, value: float) -> bool:
    return scheduler.on_trial_result(None, who, {"kimg": kimg, "score": value}) == TrialScheduler.STOP


def test_a_trial_worse_than_the_remembered_ones_is_stopped_and_a_better_one_goes_on() -> None:
    scheduler = RungScheduler(grace_kimg=2, total_kimg=TOTAL, reduction_factor=2)
    scheduler.recall([record(c) for c in (6, 12, 24)])
    for number, (value, expected) in enumerate(((9.0, True), (1.0, False))):
        scheduler.on_trial_add(None, trial(number))
        assert stops(scheduler, trial(number), 2, value) is expected


def test_the_first_trial_and_the_baselines_run_to_the_end() -> None:
    scheduler = RungScheduler(grace_kimg=2, total_kimg=TOTAL, reduction_factor=2)
    scheduler.on_trial_add(None, trial(0))
    assert not any(stops(scheduler, trial(0), kimg, 1.0) for kimg in (2, 4, 8))
    scheduler.on_trial_add(None, trial(1, "none"))
    assert not any(stops(scheduler, trial(1, "none"), kimg, 99.0) for kimg in (2, 4, 8))


def probe_all(ratio: Any, failing: set[int] = frozenset()) -> tuple[BoundSearch, list[int]]:  # type: ignore[assignment]
    search = ProbeSearcher(PaperRule(10, 0.96, max_clusters=1000))
    asked: list[int] = []
    for number in range(100):
        params = search.suggest(str(number))
        if params == Searcher.FINISHED:
            break
        assert isinstance(params, dict)
        assert search.suggest(f"{number}-too-early") is None
        asked.append(params["num_clusters"])
        fails = asked[-1] in failing
        failing = failing - {asked[-1]} if fails and len(failing) < 9 else failing
        result = None if fails else {"reading": ratio(asked[-1])}
        search.on_trial_complete(str(number), result, error=fails)
    return search.search, asked


def test_tune_s_probes_lead_to_the_same_c_max_as_asking_and_telling() -> None:
    search, asked = probe_all(lambda c: min(1.0, 73 / c))
    assert search.c_max == 77 and len(asked) == len(set(asked))  # 73 / 76 > 0.96 >= 73 / 77


def test_a_probe_that_fails_is_run_again_but_not_for_ever() -> None:
    search, asked = probe_all(lambda c: min(1.0, 73 / c), failing={20})
    assert search.c_max == 77 and asked.count(20) == 2
    search, asked = probe_all(lambda c: 1.0, failing=set(range(10, 20)))
    assert not search.done and asked == [10] * (MAX_RETRIES + 1)


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


@pytest.mark.parametrize("kimg", [2, 4])
def test_a_record_says_what_was_reached(kimg: int) -> None:
    one = record(12, kimg)
    assert one.state == "stopped" and one.over
    reached = one.rung_at(TOTAL)
    assert reached is not None and reached["kimg"] == kimg and one.rung_at(1) is None
    again = one.with_rung({"kimg": 2, "score": 0.5})
    assert [rung["kimg"] for rung in again.rungs] == [k for k in (2, 4) if k <= kimg] and again.rungs[0]["score"] == 0.5
