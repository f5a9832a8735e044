import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cedm_ray.stages.training.interruptions import FAILED
from cedm_ray.stages.training.legs import Desk, Leg, LegScheduler, LegSearcher, Verdict

RUNGS_KIMG = (1, 2, 4)


class Halving:
    """Successive halving over so many runs: from a rung the better half goes on when all have reached it."""

    def __init__(self, count: int, *, stopping: bool = False) -> None:
        self.fresh = [Leg(f"run{n}", {"n": n}, 0, RUNGS_KIMG[0]) for n in range(count)]
        self.promoted: list[Leg] = []
        self.running: set[str] = set()
        self.at: dict[int, list[str]] = {kimg: [] for kimg in RUNGS_KIMG}
        self.due = {RUNGS_KIMG[0]: count}
        self.told: list[tuple[str, int]] = []
        self.ended: list[tuple[str, bool]] = []
        self.stopping, self.most = stopping, 0

    def ask(self) -> Leg | None:
        legs = self.promoted or self.fresh
        if not legs:
            return None
        self.running.add(legs[0].key)
        self.most = max(self.most, len(self.running))
        return legs.pop(0)

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        kimg = int(result["kimg"])
        self.told.append((key, kimg))
        if kimg == RUNGS_KIMG[-1]:
            return "continue"
        if self.stopping:
            return "stop" if int(key[3:]) % 2 else "continue"
        self.running.discard(key)
        self.at[kimg].append(key)
        self._promote(kimg)
        return "pause"

    def end(self, key: str, failed: bool) -> None:
        self.ended.append((key, failed))
        if key in self.running:
            self.running.discard(key)
            kimg = min((k for k in RUNGS_KIMG if (key, k) not in self.told), default=RUNGS_KIMG[-1])
            if not self.stopping and kimg in self.due and kimg < RUNGS_KIMG[-1]:
                self.due[kimg] -= 1
                self._promote(kimg)

    def _promote(self, kimg: int) -> None:
        if len(self.at[kimg]) == self.due[kimg]:
            better = sorted(self.at[kimg])[: len(self.at[kimg]) // 2]
            further = RUNGS_KIMG[RUNGS_KIMG.index(kimg) + 1]
            self.due[further] = len(better)
            self.promoted += [Leg(key, {"n": int(key[3:])}, kimg, further) for key in better]

    @property
    def done(self) -> bool:
        return not self.fresh and not self.promoted and not self.running


class FakeTune:
    """Tune's loop as far as a searcher and a scheduler see it; a training that goes on reports its old rungs again.

    Args:
        failures: How often a run fails, by its number; Tune tries a trial a second time.
        gives_up: Before which rung a run reports that it ends, by its number.
    """

    def __init__(
        self,
        source: Any,
        at_once: int | Callable[[], int],
        failures: Mapping[int, int] | None = None,
        seed: int = 0,
        gives_up: Mapping[int, int] | None = None,
    ) -> None:
        desk = Desk(source, at_once if callable(at_once) else lambda: at_once)
        self.searcher, self.scheduler = LegSearcher(desk), LegScheduler(desk)
        self.trials: list[Any] = []
        self.checkpoints_kimg: dict[int, int] = {}
        """The newest rung of each run, which a training goes on from."""
        self.failures, self.random, self.most = dict(failures or {}), random.Random(seed), 0
        self.resumed: list[tuple[int, int]] = []
        self.gives_up = dict(gives_up or {})

    def get_trials(self) -> list[Any]:
        return self.trials

    def stop_trial(self, trial: Any) -> None:
        if trial.status == Trial.PAUSED:
            self.scheduler.on_trial_remove(self, trial)
            self.searcher.on_trial_complete(trial.trial_id)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last)
            self.searcher.on_trial_complete(trial.trial_id, result=trial.last)
        trial.status = Trial.TERMINATED

    def run(self) -> None:
        finished = False
        for _ in range(2000):
            if not finished and not self._with(Trial.PENDING):
                finished = self._add()
            chosen = self.scheduler.choose_trial_to_run(self)
            assert chosen is None or chosen is self.scheduler.choose_trial_to_run(self)
            if chosen is not None:
                assert chosen.status == Trial.PAUSED
                self.resumed.append((chosen.config["n"], self.checkpoints_kimg[chosen.config["n"]]))
                chosen.status = Trial.PENDING
            started = self._with(Trial.PENDING)
            for trial in started:
                trial.status, trial.reports = Trial.RUNNING, list(RUNGS_KIMG)
            self.most = max(self.most, len([each for each in self._with(Trial.RUNNING) if not each.is_saving]))
            if finished and not self._with(Trial.RUNNING, Trial.PAUSED, Trial.PENDING):
                return
            if self._with(Trial.RUNNING) and not started:  # starting is quicker than training to a rung
                self._step(self.random.choice(self._with(Trial.RUNNING)))
        raise AssertionError("Tune's loop does not end")

    def _with(self, *states: str) -> list[Any]:
        return [trial for trial in self.trials if trial.status in states]

    def _add(self) -> bool:
        """Ask for one more trial; whether the search is over."""
        trial_id = f"trial{len(self.trials)}"
        params = self.searcher.suggest(trial_id)
        if isinstance(params, dict):
            new = SimpleNamespace(
                trial_id=trial_id, config=params, status=Trial.PENDING, is_saving=False, tries=0, last={}
            )
            self.trials.append(new)
            self.scheduler.on_trial_add(self, new)
        return bool(params == Searcher.FINISHED)

    def _step(self, trial: Any) -> None:
        number = trial.config["n"]
        if trial.is_saving:
            trial.is_saving, trial.status = False, Trial.PAUSED
        elif self.failures.get(number, 0):
            self.failures[number] -= 1
            self._fail(trial)
        elif not trial.reports:
            self.stop_trial(trial)
        else:
            trial.last = {"kimg": trial.reports.pop(0)}
            if self.gives_up.get(number) == trial.last["kimg"]:
                trial.last = {FAILED: "ValueError: it cannot"}
            else:
                self.checkpoints_kimg[number] = max(trial.last["kimg"], self.checkpoints_kimg.get(number, 0))
            action = self.scheduler.on_trial_result(self, trial, trial.last)
            if action == TrialScheduler.STOP:
                self.stop_trial(trial)
            trial.is_saving = action == TrialScheduler.PAUSE

    def _fail(self, trial: Any) -> None:
        trial.tries, trial.is_saving = trial.tries + 1, False
        trial.status = Trial.PENDING if trial.tries < 2 else Trial.ERROR
        self.scheduler.on_trial_error(self, trial)
        if trial.status == Trial.PENDING:
            self.scheduler.on_trial_add(self, trial)
        else:
            self.searcher.on_trial_complete(trial.trial_id, error=True)


@pytest.mark.parametrize("at_once", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", range(5))
def test_halving_ends_with_every_run_ended_once_and_never_more_at_once_than_there_are_places(
    at_once: int, seed: int
) -> None:
    source = Halving(9)
    tune = FakeTune(source, at_once, seed=seed)
    tune.run()
    assert sorted(source.ended) == [(f"run{n}", False) for n in range(9)]
    assert sorted(source.told) == sorted([(f"run{n}", 1) for n in range(9)] + [(f"run{n}", 2) for n in range(4)]
                                         + [("run0", 4), ("run1", 4)])  # fmt: skip
    assert tune.most <= at_once and source.most == min(at_once, 9)
    assert len(tune.trials) == 9  # a promoted run goes on in its own trial
    assert sorted(tune.resumed) == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (3, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_fails_once_keeps_its_place_and_one_that_fails_twice_ends_as_failed(seed: int) -> None:
    source = Halving(6)
    tune = FakeTune(source, 2, failures={1: 1, 3: 2}, seed=seed)
    tune.run()
    assert sorted(source.ended) == [(f"run{n}", n == 3) for n in range(6)]
    assert source.told.count(("run1", 1)) == 1 and ("run1", 2) in source.told
    assert tune.most <= 2


def test_a_stopped_run_gives_its_place_back_and_is_ended_at_once() -> None:
    source = Halving(6, stopping=True)
    tune = FakeTune(source, 1)
    tune.run()
    assert source.told == [("run0", 1), ("run0", 2), ("run0", 4), ("run1", 1), ("run2", 1), ("run2", 2), ("run2", 4),
                           ("run3", 1), ("run4", 1), ("run4", 2), ("run4", 4), ("run5", 1)]  # fmt: skip
    assert source.ended == [(f"run{n}", False) for n in range(6)]


class Queue(Halving):
    """Hands out given legs, one after the other, and says the same of every rung."""

    def __init__(self, *legs: Leg, verdict: Verdict = "continue") -> None:
        super().__init__(0)
        self.fresh, self.verdict = list(legs), verdict

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        self.told.append((key, result["kimg"]))
        if self.verdict == "pause":
            self.running.discard(key)
        return self.verdict


def fake_trial(searcher: LegSearcher, name: str, status: str = Trial.RUNNING) -> Any:
    params = searcher.suggest(name)
    assert isinstance(params, dict)
    return SimpleNamespace(trial_id=name, config=params, status=status, is_saving=False)


def legs_of(source: Any, at_once: int = 1) -> tuple[LegSearcher, LegScheduler]:
    desk = Desk(source, lambda: at_once)
    return LegSearcher(desk), LegScheduler(desk)


def test_rungs_that_an_earlier_process_heard_of_are_not_told_again() -> None:
    source = Queue(Leg("old", {"n": 0}, 2, 4))
    FakeTune(source, 1).run()
    assert source.told == [("old", 4)] and source.ended == [("old", False)]


def test_a_run_that_failed_and_is_asked_for_again_is_told_its_new_rungs_only() -> None:
    source = Queue(Leg("a", {"n": 0}, 0, 4), Leg("a", {"n": 0}, 0, 4))
    searcher, scheduler = legs_of(source)
    for name, kimgs in (("t0", (1, 2)), ("t1", (1, 2, 4))):
        trial = fake_trial(searcher, name)
        assert all(scheduler.on_trial_result(None, trial, {"kimg": k}) == TrialScheduler.CONTINUE for k in kimgs)
        searcher.on_trial_complete(name, error=name == "t0")
    assert source.told == [("a", 1), ("a", 2), ("a", 4)] and source.ended == [("a", True), ("a", False)]


def test_a_promotion_waits_until_its_trial_is_paused_and_is_not_given_to_a_new_trial() -> None:
    source = Queue(Leg("a", {"n": 0}, 0, 1), verdict="pause")
    searcher, scheduler = legs_of(source)
    trial = fake_trial(searcher, "t0")
    tune = SimpleNamespace(get_trials=lambda: [trial])
    assert scheduler.on_trial_result(tune, trial, {"kimg": 1}) == TrialScheduler.PAUSE
    source.promoted = [Leg("a", {"n": 0}, 1, 2)]
    trial.is_saving = True
    assert scheduler.choose_trial_to_run(tune) is None and searcher.suggest("t1") is None
    trial.is_saving, trial.status = False, Trial.PAUSED
    assert [scheduler.choose_trial_to_run(tune) for _ in range(2)] == [trial, trial]
    trial.status = Trial.PENDING
    assert scheduler.choose_trial_to_run(tune) is None
    assert scheduler.on_trial_result(tune, trial, {"kimg": 1}) == TrialScheduler.CONTINUE
    assert source.told == [("a", 1)]


def test_a_trial_that_fails_while_it_is_paused_pauses_again_at_its_next_report() -> None:
    source = Queue(Leg("a", {"n": 0}, 0, 1), verdict="pause")
    searcher, scheduler = legs_of(source)
    trial = fake_trial(searcher, "t0")
    scheduler.on_trial_result(None, trial, {"kimg": 1})
    trial.status = Trial.PENDING  # saving it failed, and Tune starts it again
    for kimg in (1, 2):
        assert scheduler.on_trial_result(None, trial, {"kimg": kimg}) == TrialScheduler.PAUSE
    assert source.told == [("a", 1)]
    source.promoted = [Leg("a", {"n": 0}, 1, 2)]
    tune = SimpleNamespace(get_trials=lambda: [trial])
    assert scheduler.choose_trial_to_run(tune) is None  # it runs already
    assert scheduler.on_trial_result(tune, trial, {"kimg": 1}) == TrialScheduler.CONTINUE


def test_a_run_that_fails_for_good_while_its_promotion_waits_frees_the_place() -> None:
    source = Queue(Leg("a", {"n": 0}, 0, 1), Leg("b", {"n": 1}, 0, 1), verdict="pause")
    searcher, scheduler = legs_of(source)
    trial = fake_trial(searcher, "t0")
    scheduler.on_trial_result(None, trial, {"kimg": 1})
    source.promoted, trial.is_saving = [Leg("a", {"n": 0}, 1, 2)], True
    tune = SimpleNamespace(get_trials=lambda: [trial])
    assert scheduler.choose_trial_to_run(tune) is None
    searcher.on_trial_complete("t0", error=True)
    assert source.ended == [("a", True)]
    assert searcher.suggest("t1") == {"n": 1}


def test_nothing_is_suggested_beyond_the_places_and_the_end_is_said_only_when_all_is_done() -> None:
    source = Queue(Leg("a", {"n": 0}, 0, 1), Leg("b", {"n": 1}, 0, 1))
    searcher, _ = legs_of(source)
    assert searcher.suggest("t0") == {"n": 0} and searcher.suggest("t1") is None
    searcher.on_trial_complete("t0", {"kimg": 4})
    assert searcher.suggest("t1") == {"n": 1} and searcher.suggest("t2") is None
    searcher.on_trial_complete("t1", error=True)
    assert searcher.suggest("t2") == Searcher.FINISHED
    assert source.ended == [("a", False), ("b", True)]


def test_a_run_that_says_why_it_ends_is_ended_as_failed_and_not_tried_again() -> None:
    source = Halving(6)
    tune = FakeTune(source, 2, gives_up={1: 1, 2: 2})
    tune.run()
    assert sorted(source.ended) == [(f"run{n}", n in (1, 2)) for n in range(6)]
    assert ("run1", 1) not in source.told and ("run2", 1) in source.told and ("run2", 2) not in source.told
    assert all(trial.tries == 0 for trial in tune.trials) and tune.most <= 2


@pytest.mark.parametrize("seed", range(5))
def test_what_runs_side_by_side_follows_the_places_and_none_is_ended_when_they_become_fewer(seed: int) -> None:
    places, steps, started = [4], [0], []
    source = Halving(12)
    ask = source.ask

    def asked() -> Leg | None:
        leg, running = ask(), len(source.running)
        if leg is not None:
            started.append((places[0], running))
        return leg

    def at_once() -> int:
        steps[0] += 1
        places[0] = {40: 1, 80: 3}.get(steps[0], places[0])
        return places[0]

    source.ask = asked  # type: ignore[method-assign]
    tune = FakeTune(source, at_once, seed=seed)
    tune.run()
    assert sorted(source.ended, key=lambda each: int(each[0][3:])) == [(f"run{n}", False) for n in range(12)]
    assert all(running <= place for place, running in started)
    assert [max(running for place, running in started if place == each) for each in (4, 1, 3)] == [4, 1, 3]
    assert tune.resumed and len(tune.trials) == 12


def test_what_tune_keeps_of_the_search_holds_nothing_of_the_source() -> None:
    source = Halving(1)
    source.unpicklable = lambda: None  # type: ignore[attr-defined]
    for each in legs_of(source):
        assert b"Halving" not in pickle.dumps(each)


@pytest.mark.slow
@pytest.mark.ray
def test_real_trainings_pause_free_their_cpus_and_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("legs_run.py"), tmp_path],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    # The rungs that each training had found in its checkpoint when it reached a new one stand third.
    assert sorted(found["told"]) == [["bad", 1, 0], ["left", 1, 0], ["promoted", 1, 0], ["promoted", 2, 1]]
    assert found["completed"] == {"promoted": 2, "left": 1, "bad": 1}
    assert sorted(found["ended"]) == ["bad", "left", "promoted"] and found["ended"][-1] == "left"
    assert found["most"] == 2
    assert found["paused_quiet_s"] < 30 and found["ended_quiet_s"] < 30
