import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.runs import Leg
from cedm_ray.granularity.search import GranularitySearch, Verdict
from cedm_ray.settings import FinalSettings, GranularitySettings, RuleName, SamplerName
from cedm_ray.stages.granularity import _recall, grid, make_search
from cedm_ray.stages.training.legs import Desk, LegScheduler, LegSearcher
from cedm_ray.stages.training.records import Rung, TrialRecord
from cedm_ray.stages.training.trials import DeathsInARow, TrialSource, tune_trials

RUNGS_KIMG = (1, 2, 4, 8)
CANDIDATES = grid(range(2, 100), 8)
GOOD = CANDIDATES[3:6]
RULES: list[tuple[RuleName, SamplerName]] = [
    ("fitted", "gp"), ("promotion", "gp"), ("promotion", "tpe"), ("asha", "random"), ("none", "random"),
]  # fmt: skip
Params = Mapping[str, Any]


class KilledError(Exception):
    pass


class FakeLedger:
    """Keeps records in memory and every call in a list.

    Args:
        config: The settings of the search.
        store: What an earlier search has stored: rungs by number of clusters and kimg.
        kill_at: The driver is killed in this call, after it was written down.
    """

    def __init__(
        self, config: SearchConfig, store: Mapping[int, Mapping[int, Rung]] | None = None, kill_at: int | None = None
    ) -> None:
        scoring = SimpleNamespace(metrics=("fid",))
        self.planner = SimpleNamespace(config=config, scoring=scoring, fixed=lambda: [])
        self.kept: dict[str, TrialRecord] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.legs: dict[str, int] = {}
        self.store, self.kill_at = store or {}, kill_at

    @property
    def records(self) -> list[TrialRecord]:
        return list(self.kept.values())

    def record(self, params: Params) -> TrialRecord:
        key = repr(sorted(params.items()))
        new = TrialRecord(key, key, params["grouping"], params["num_clusters"], dict(params), "running")
        return self.kept.get(key, new)

    def keep(self, record: TrialRecord, *call: Any) -> None:
        self.kept[record.key] = record
        self.calls.append((call[0], record.grouping, record.num_clusters, *call[1:]))
        if len(self.calls) == self.kill_at:
            raise KilledError

    def stored(self, params: Params) -> Mapping[int, Rung]:
        return self.store.get(params["num_clusters"], {}) if params["grouping"] == "temi" else {}

    def set_stop_kimg(self, params: Params, stop_kimg: int) -> None:
        self.legs[self.record(params).key] = stop_kimg

    def stop_kimg(self, params: Params) -> int | None:
        return self.legs.get(self.record(params).key)

    def open(self, params: Params) -> None:
        self.keep(replace(self.record(params), state="running", reason=None), "open")

    def add(self, params: Params, result: Rung, *, stored: bool = False) -> None:
        self.keep(self.record(params).with_rung(dict(result)), "add", result["kimg"], stored)

    def pause(self, params: Params) -> None:
        self.keep(replace(self.record(params), state="paused"), "pause")

    def close(self, params: Params, reason: str | None = None) -> None:
        record = self.record(params)
        if record.over:
            return
        whole = bool(record.rungs) and record.rungs[-1]["kimg"] >= RUNGS_KIMG[-1]
        self.keep(replace(record, state="failed" if reason else "complete" if whole else "stopped", reason=reason),
                  "close", reason)  # fmt: skip

    def of(self, num_clusters: int) -> list[str]:
        """The calls for one number of clusters, by name; repeated reports, which Tune makes too, once."""
        found = [call[0] for call in self.calls if call[1] == "temi" and call[2] == num_clusters]
        return [name for before, name in zip(["", *found], found, strict=False) if name != before or name == "close"]


def score_of(params: Params, kimg: int) -> float:
    """A learning curve for each C, the lowest of those near 20, which GOOD holds; the baselines' are far worse."""
    num_clusters = params["num_clusters"]
    noise = np.random.default_rng([num_clusters, kimg]).normal() * 0.004
    away = (math.log(num_clusters) - 3) ** 2
    return 3 * math.exp(0.12 * away + 0.4 * math.log(8 / kimg) + noise) * (1 if params["grouping"] == "temi" else 9)


class FakeTune:
    """Tune's loop as far as a searcher, a scheduler and the ledger's callback see it.

    A training that is started again reports its old rungs again. ``failures``: how often a C fails; Tune tries twice.
    """

    def __init__(
        self,
        source: TrialSource,
        at_once: int,
        ledger: FakeLedger,
        *,
        seed: int = 0,
        failures: Mapping[int, int] | None = None,
        score: Callable[[Params, int], float] = score_of,
    ) -> None:
        desk = Desk(source, lambda: at_once)
        self.searcher, self.scheduler = LegSearcher(desk), LegScheduler(desk)
        self.ledger, self.score = ledger, score
        self.trials: list[Any] = []
        self.failures, self.random, self.most = dict(failures or {}), random.Random(seed), 0

    def get_trials(self) -> list[Any]:
        return self.trials

    def stop_trial(self, trial: Any) -> None:
        self.searcher.on_trial_complete(trial.trial_id)
        self.ledger.close(trial.config)
        trial.status = Trial.TERMINATED

    def run(self) -> None:
        finished = False
        for _ in range(4000):
            if not finished and not self._with(Trial.PENDING):
                finished = self._add()
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                chosen.status = Trial.PENDING
            started = self._with(Trial.PENDING)
            for trial in started:
                trial.status, trial.reports = Trial.RUNNING, list(RUNGS_KIMG)
                self.ledger.open(trial.config)
            running = self._with(Trial.RUNNING)
            self.most = max(self.most, len([trial for trial in running if not trial.is_saving]))
            if finished and not running and not self._with(Trial.PAUSED, Trial.PENDING):
                return
            if running and not started:
                self._step(self.random.choice(running))
        raise AssertionError("Tune's loop does not end")

    def _with(self, *states: str) -> list[Any]:
        return [trial for trial in self.trials if trial.status in states]

    def _add(self) -> bool:
        name = f"trial{len(self.trials)}"
        params = self.searcher.suggest(name)
        if isinstance(params, dict):
            state: dict[str, Any] = {"status": Trial.PENDING, "is_saving": False, "tries": 0}
            self.trials.append(SimpleNamespace(trial_id=name, config=params, **state))
        return bool(params == Searcher.FINISHED)

    def _step(self, trial: Any) -> None:
        if trial.is_saving:
            trial.is_saving, trial.status = False, Trial.PAUSED
        elif self.failures.get(trial.config["num_clusters"], 0):
            self.failures[trial.config["num_clusters"]] -= 1
            self._fail(trial)
        elif not trial.reports:
            self.stop_trial(trial)
        else:
            kimg = trial.reports.pop(0)
            score = self.score(trial.config, kimg)
            result = {"kimg": kimg, "score": score, "fid": score}
            action = self.scheduler.on_trial_result(self, trial, result)
            self.ledger.add(trial.config, result)
            if action == TrialScheduler.STOP:
                self.stop_trial(trial)
            trial.is_saving = action == TrialScheduler.PAUSE

    def _fail(self, trial: Any) -> None:
        trial.tries += 1
        trial.status = Trial.PENDING if trial.tries < 2 else Trial.ERROR
        self.scheduler.on_trial_error(self, trial)
        if trial.status == Trial.ERROR:
            self.searcher.on_trial_complete(trial.trial_id, error=True)
            self.ledger.close(trial.config, reason="OutOfMemoryError: none left")


def config_of(rule: RuleName = "fitted", sampler: SamplerName = "gp", share: float = 0.4) -> SearchConfig:
    return SearchConfig(
        granularity=GranularitySettings(rule=rule, sampler=sampler, total_kimg=8, grace_kimg=1, share=share,
                                        grid_points=8, startup_trials=3),
        final=FinalSettings(total_kimg=9),
    )  # fmt: skip


def search_of(config: SearchConfig) -> GranularitySearch:
    allowed_kimg = config.granularity.share * len(CANDIDATES) * 8
    return make_search(config, CANDIDATES, cast(Any, SimpleNamespace(allowed_kimg=lambda: allowed_kimg)))


def source_of(ledger: FakeLedger, search: GranularitySearch | None, given: list[dict[str, Any]] | None = None,
              **options: Any) -> TrialSource:  # fmt: skip
    return TrialSource(cast(Any, ledger), given or [], search, **options)


def searched(config: SearchConfig, at_once: int = 1, **options: Any) -> tuple[FakeLedger, GranularitySearch, FakeTune]:
    """A whole search in one process."""
    ledger, search = FakeLedger(config), search_of(config)
    tune = FakeTune(source_of(ledger, search), at_once, ledger, **options)
    tune.run()
    return ledger, search, tune


def seen(search: GranularitySearch) -> dict[int, tuple[str, dict[int, tuple[float, ...]]]]:
    """What a search knows at its end; whether a training that was left is called paused or stopped tells nothing."""
    return {run.num_clusters: (run.state.replace("paused", "stopped"), run.readings) for run in search.runs}


def best_of(search: GranularitySearch) -> int:
    complete = {run.num_clusters: run.readings[8][0] for run in search.runs.in_state("complete")}
    return min(complete, key=lambda c: complete[c])


BASELINES = [{"grouping": "none", "num_clusters": 1}, {"grouping": "labels", "num_clusters": 10}]


@pytest.mark.parametrize("at_once", [1, 3])
def test_given_trainings_come_first_and_run_to_the_end_whatever_they_score(at_once: int) -> None:
    config = config_of("asha", "random")
    ledger, search = FakeLedger(config), search_of(config)
    tune = FakeTune(source_of(ledger, search, BASELINES), at_once, ledger)
    tune.run()
    assert [trial.config for trial in tune.trials[:2]] == BASELINES
    assert all(trial.config["grouping"] == "temi" for trial in tune.trials[2:]) and len(tune.trials) > 4
    assert not [call for call in ledger.calls if call[0] == "pause" and call[1] != "temi"]
    for params in BASELINES:
        record = ledger.record(params)
        assert record.state == "complete" and [rung["kimg"] for rung in record.rungs] == list(RUNGS_KIMG)
    assert {run.num_clusters for run in search.runs} <= set(CANDIDATES)


@pytest.mark.parametrize(("rule", "sampler"), RULES)
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_every_rung_is_told_once_within_the_budget_and_never_more_at_once_than_there_are_places(
    rule: RuleName, sampler: SamplerName, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    tell = GranularitySearch.tell

    def counted(self: GranularitySearch, key: str, kimg: int, scores: Sequence[float]) -> Verdict:
        told.append((key, kimg))
        return tell(self, key, kimg, scores)

    monkeypatch.setattr(GranularitySearch, "tell", counted)
    ledger, search, tune = searched(config_of(rule, sampler, share=0.7), at_once, seed=at_once)
    assert len(told) == len(set(told)) and told
    assert tune.most == at_once
    spent_kimg = sum(record.rungs[-1]["kimg"] for record in ledger.records)
    assert spent_kimg == search.runs.spent_kimg <= search.allowed_kimg
    assert {record.state for record in ledger.records} <= {"complete", "stopped"}
    states = {r.num_clusters: (r.state, {k["kimg"]: (k["score"],) for k in r.rungs}) for r in ledger.records}
    assert states == seen(search) and best_of(search) in GOOD


def test_a_promoted_training_is_opened_again_before_it_goes_on() -> None:
    ledger, search, _ = searched(config_of("promotion"))
    further = [run.num_clusters for run in search.runs if len(run.readings) > 1]
    left = [run.num_clusters for run in search.runs if len(run.readings) == 1]
    assert further and left
    for num_clusters in further:
        calls = ledger.of(num_clusters)
        assert calls[:6] == ["open", "add", "pause", "add", "open", "add"] and calls[-1] == "close"
    for num_clusters in left:
        assert ledger.of(num_clusters) == ["open", "add", "pause", "add", "close"]


def test_a_promotion_is_opened_when_it_is_asked_for_and_carries_the_grouping() -> None:
    ledger, search = FakeLedger(config_of("promotion")), search_of(config_of("promotion"))
    source = source_of(ledger, search, grouping="kmeans")
    leg = source.ask()
    while leg is not None and not leg.start_kimg:
        assert not ledger.calls or ledger.calls[-1][0] == "pause"
        source.tell(leg.key, {"kimg": leg.stop_kimg, "score": score_of({**leg.params, "grouping": "temi"}, 1)})
        leg = source.ask()
    assert leg is not None and (leg.start_kimg, leg.stop_kimg) == (1, 2) and leg.params["grouping"] == "kmeans"
    assert ledger.calls[-1] == ("open", "kmeans", leg.params["num_clusters"])


def resumed(config: SearchConfig, kill_at: int) -> GranularitySearch:
    """A search whose driver is killed in one of its calls of the ledger, and that goes on in a new process."""
    ledger = FakeLedger(config, kill_at=kill_at)
    with pytest.raises(KilledError):
        FakeTune(source_of(ledger, search_of(config)), 1, ledger).run()
    search = search_of(config)
    _recall(search, cast(Any, ledger))
    FakeTune(source_of(ledger, search), 1, ledger).run()
    assert search.runs.spent_kimg <= search.allowed_kimg
    return search


@pytest.mark.parametrize(("rule", "sampler"), RULES)
def test_a_killed_search_goes_on_to_what_it_would_have_found(rule: RuleName, sampler: SamplerName) -> None:
    config = config_of(rule, sampler)
    ledger, whole, _ = searched(config)
    step = 1 if sampler == "random" else 7
    for kill_at in range(1, len(ledger.calls) + 1, step):
        search = resumed(config, kill_at)
        assert seen(search) == seen(whole), ledger.calls[kill_at - 1]


@pytest.mark.parametrize(("rule", "sampler"), RULES)
def test_what_the_store_holds_starts_no_trial_and_leads_to_the_same_answer(
    rule: RuleName, sampler: SamplerName
) -> None:
    config = config_of(rule, sampler, share=0.9)
    whole = searched(config)[1]
    assert len({max(run.readings) for run in whole.runs}) > 1 or rule == "none"  # some were not trained to the end
    stored = {c: {k: {"kimg": k, "score": score_of({"grouping": "temi", "num_clusters": c}, k)} for k in RUNGS_KIMG}
              for c in CANDIDATES}  # fmt: skip
    ledger, search = FakeLedger(config, stored), search_of(config)
    tune = FakeTune(source_of(ledger, search), 1, ledger)
    tune.run()
    assert tune.trials == [] and seen(search) == seen(whole)
    states = {record.num_clusters: record.state for record in ledger.records}
    assert states == {run.num_clusters: run.state for run in search.runs} and "running" not in states.values()
    assert all(call[4] for call in ledger.calls if call[0] == "add")
    # Of the first two rungs only: what lies beyond is trained, by those alone that come so far.
    early = {c: {k: rung for k, rung in rungs.items() if k <= 2} for c, rungs in stored.items()}
    ledger, search = FakeLedger(config, early), search_of(config)
    tune = FakeTune(source_of(ledger, search), 1, ledger)
    tune.run()
    assert seen(search) == seen(whole)
    if rule in ("fitted", "promotion"):
        late = {c for c, (_, readings) in seen(whole).items() if max(readings) > 2}
        assert {trial.config["num_clusters"] for trial in tune.trials} == late < set(seen(whole))


def test_what_was_asked_for_in_vain_is_not_asked_for_again_before_something_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = search_of(config_of("none", "random", share=0.125))  # one whole training
    asked: list[Leg | None] = []
    ask = GranularitySearch.ask

    def counted(self: GranularitySearch) -> Leg | None:
        asked.append(ask(self))
        return asked[-1]

    monkeypatch.setattr(GranularitySearch, "ask", counted)
    ledger = FakeLedger(config_of())
    source = source_of(ledger, search)
    leg = source.ask()
    assert leg is not None and [source.ask() for _ in range(5)] == [None] * 5 and len(asked) == 2
    source.end(leg.key, failed=True)  # before its first rung: all its images are free again
    other = source.ask()
    assert other is not None and other.key != leg.key and len(asked) == 3
    for number, kimg in enumerate(RUNGS_KIMG[:-1], start=1):
        source.tell(other.key, {"kimg": kimg, "score": 3.0})
        assert [source.ask() for _ in range(5)] == [None] * 5 and len(asked) == 3 + number
    assert not source.done
    source.tell(other.key, {"kimg": 8, "score": 3.0})
    source.end(other.key, failed=False)
    assert source.ask() is None and source.done


def test_the_budget_is_asked_for_before_every_leg() -> None:
    config = config_of("none", "random", share=1.0)
    ledger, search = FakeLedger(config), search_of(config)
    budget_kimg = 64.0
    FakeTune(
        source_of(ledger, search, allowed_kimg=lambda: budget_kimg - 24 * (len(ledger.records) > 2)), 1, ledger
    ).run()
    assert [run.state for run in search.runs] == ["complete"] * 5


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_training_that_fails_twice_is_left_out_and_one_that_fails_once_changes_nothing(at_once: int) -> None:
    config = config_of()
    whole = seen(searched(config)[1])
    first, bad, *_ = whole
    ledger, search, tune = searched(config, at_once, failures={bad: 2, first: 1}, seed=3)
    states = {run.num_clusters: run.state for run in search.runs}
    assert states[bad] == "failed" and states[first] != "failed" and "complete" in states.values()
    assert best_of(search) in GOOD and tune.most <= at_once
    record = ledger.record({"grouping": "temi", "num_clusters": bad})
    assert (record.state, record.reason) == ("failed", "OutOfMemoryError: none left")
    if at_once == 1:
        assert seen(searched(config, 1, failures={first: 1})[1]) == whole


def test_a_given_training_that_fails_ends_no_other() -> None:
    config = config_of("none", "random")
    ledger, search = FakeLedger(config), search_of(config)
    FakeTune(source_of(ledger, search, BASELINES), 1, ledger, failures={1: 2}).run()
    assert [ledger.record(params).state for params in BASELINES] == ["failed", "complete"]
    assert search.runs.in_state("complete")


def test_a_given_training_that_diverges_is_ended_with_the_reason() -> None:
    config = config_of("none", "random")
    ledger = FakeLedger(config)
    source = source_of(ledger, search_of(config), BASELINES)
    leg = source.ask()
    assert leg is not None
    assert source.tell(leg.key, {"kimg": 1, "loss": math.nan, "score": math.nan}) == "stop"
    source.end(leg.key, failed=False)
    record = ledger.record(leg.params)
    assert (record.state, record.reason) == ("failed", "loss is nan at 1 kimg: the training has diverged")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("rule", "sampler"), RULES)
def test_a_training_that_diverges_is_ended_and_the_search_never_hears_of_it(
    rule: RuleName, sampler: SamplerName, value: float
) -> None:
    bad = CANDIDATES[-1]  # of the design: it is tried in any case
    config = config_of(rule, "tpe" if sampler == "random" else sampler)

    def score(params: Params, kimg: int) -> float:
        return value if params["num_clusters"] == bad and kimg >= 1 else score_of(params, kimg)

    ledger, search, tune = searched(config, score=score)
    record = ledger.record({"grouping": "temi", "num_clusters": bad})
    assert record.state == "failed" and record.reason == f"score is {value:g} at 1 kimg: the training has diverged"
    assert len(record.rungs) == 1 and len([t for t in tune.trials if t.config["num_clusters"] == bad]) == 1
    assert seen(search)[bad] == ("stopped", {}) and best_of(search) in GOOD
    again = search_of(config)
    _recall(again, cast(Any, ledger))
    assert seen(again)[bad] == ("stopped", {})


def test_several_scores_are_told_together() -> None:
    config = config_of("promotion")
    config = config.model_copy(update={"granularity": replace(config.granularity, multi_objective=True)})
    config = config.with_values({"score.also": ("backbone",)})
    search = search_of(config)
    source = source_of(FakeLedger(config), search, metrics=("fid", "fdd"))
    leg = source.ask()
    assert leg is not None
    source.tell(leg.key, {"kimg": 1, "score": 3.0, "fid": 3.0, "fdd": 120.0})
    assert search.runs[leg.key].readings == {1: (3.0, 120.0)}


def test_whoever_watches_hears_of_a_rung_when_the_search_knows_it() -> None:
    config = config_of("none", "random")
    ledger, search = FakeLedger(config), search_of(config)
    known: list[int] = []
    source = source_of(ledger, search, on_score=lambda: known.append(sum(len(run.readings) for run in search.runs)))
    FakeTune(source, 1, ledger).run()
    assert known == list(range(1, len(known) + 1)) and known


def test_nothing_to_do_starts_no_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("Tune was started")

    monkeypatch.setattr(ray.tune, "Tuner", never)
    ledger = cast(Any, FakeLedger(config_of()))
    ctx = cast(Any, SimpleNamespace(board=None, shares=None))
    tune_trials(ctx, ledger, "confirm", cast(Any, None), TrialSource(ledger, []), at_once=lambda: 1)
    assert ledger.calls == []


def test_deaths_of_a_trials_process_are_counted_anew_when_it_has_got_further() -> None:
    board = Mock()
    planner = SimpleNamespace(job=lambda params: SimpleNamespace(label=f"C={params['num_clusters']}"))
    callback = DeathsInARow(board, cast(Any, planner))
    one = SimpleNamespace(trial_id="t", config={"num_clusters": 7}, run_metadata=SimpleNamespace(num_failures=0))
    for kimg, counted in ((2, 0), (2, 1), (1, 1), (4, 0)):  # old rungs are reported again
        one.run_metadata.num_failures += 1
        callback.on_trial_recover(0, [], one)
        before = one.run_metadata.num_failures
        callback.on_trial_result(0, [], one, {"kimg": kimg})
        assert one.run_metadata.num_failures == (before if counted else 0)
    callback.on_trial_result(0, [], one, {"failed": "no"})
    assert board.say.call_args.args[0] == "C=7: its process on the head was killed; goes on from 2 kimg"
