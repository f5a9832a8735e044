"""Trainings in legs, from rung to rung: a Tune searcher starts them, a Tune scheduler pauses and resumes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cedm_ray.granularity.runs import Leg
from cedm_ray.granularity.search import Verdict
from cedm_ray.stages.show.stopping import Stopping
from cedm_ray.stages.training.interruptions import FAILED

ACTIONS = {"continue": TrialScheduler.CONTINUE, "pause": TrialScheduler.PAUSE, "stop": TrialScheduler.STOP}


class LegSource(Protocol):
    """Decides which leg is next and who goes on from a rung."""

    def ask(self) -> Leg | None:
        """A leg to run now in one free place, which counts as running from then on; None: nothing at present."""

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        """A run has reported a rung: it goes on, pauses (perhaps to go on later), or stops for good."""

    def end(self, key: str, failed: bool) -> None:
        """A run is over: finished by itself, stopped, ended while it was paused, or failed."""

    @property
    def done(self) -> bool:
        """Whether nothing more will be asked for and nothing is running; runs still paused are to be ended."""


class Desk:
    """What the searcher and the scheduler of one search know together: who runs, and the leg that is next.

    Tune's own limit on concurrent trials counts paused ones too, so the places are counted here.

    Args:
        source: Decides.
        at_once: Says how many legs may run side by side now; where fewer may than run, none is ended for it.
        stopping: When it is asked, no leg starts any more, and each one ends at its next rung.
    """

    def __init__(self, source: LegSource, at_once: Callable[[], int], stopping: Stopping | None = None) -> None:
        self.source, self._at_once, self._stopping = source, at_once, stopping or Stopping()
        self._running: set[str] = set()
        self._next: Leg | None = None
        self._keys: dict[str, str] = {}
        """Key of the run of each live Tune trial, the paused ones included."""
        self._heard_kimg: dict[str, int] = {}
        """The largest rung that the source knows of, by key."""
        self._failed: set[str] = set()
        """Live Tune trials that have said why they end."""

    def __reduce__(self) -> Any:
        # Tune pickles its searcher and scheduler so that it could restore them. Searches here go on from their own
        # records instead, and what a source holds need not be picklable.
        return object, ()

    @property
    def done(self) -> bool:
        """Whether nothing runs and nothing more is to start."""
        return self.source.done or (self._stopping.asked and self.next_leg() is None and not self._running)

    def next_leg(self) -> Leg | None:
        """The leg that is to start next, the same one until it is taken."""
        if self._stopping.asked:
            if self._next is not None:
                self._running.discard(self._next.key)
                self._next = None
            return None
        if self._next is None and len(self._running) < self._at_once():
            self._next = self.source.ask()
            if self._next is not None:
                self._running.add(self._next.key)
        return self._next

    def trial_id(self, key: str) -> str | None:
        """The live Tune trial of a run, if it has one."""
        return next((trial_id for trial_id, owner in self._keys.items() if owner == key), None)

    def take(self, leg: Leg, trial_id: str) -> None:
        """The next leg starts in this Tune trial."""
        self._next = None
        self._keys[trial_id] = leg.key
        self._heard_kimg[leg.key] = max(leg.start_kimg, self._heard_kimg.get(leg.key, 0))

    def hear(self, trial_id: str, result: Mapping[str, Any]) -> Verdict:
        """A Tune trial has reported a rung, perhaps one that it had reported before it was interrupted, or its end."""
        key = self._keys[trial_id]
        if FAILED in result:
            self._failed.add(trial_id)
            return "stop"
        if key not in self._running:
            return "pause"  # Tune failed to pause it and started it again
        if result["kimg"] <= self._heard_kimg[key]:
            return "continue"
        self._heard_kimg[key] = int(result["kimg"])
        verdict = self.source.tell(key, result)
        if verdict == "pause":
            self._running.discard(key)
        return "stop" if verdict == "continue" and self._stopping.asked else verdict

    def close(self, trial_id: str, failed: bool) -> None:
        """A Tune trial is over."""
        key = self._keys.pop(trial_id, None)
        if key is None:
            return
        self._running.discard(key)
        if self._next is not None and self._next.key == key:
            self._next = None  # it was to be resumed, and failed before
        self.source.end(key, failed or trial_id in self._failed)
        self._failed.discard(trial_id)


class LegSearcher(Searcher):
    """Starts a Tune trial for every leg of a run that has none: a new run, or one that an earlier process left.

    Args:
        desk: Shared with the scheduler.
    """

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._desk.done:
            return str(Searcher.FINISHED)
        leg = self._desk.next_leg()
        if leg is None or self._desk.trial_id(leg.key) is not None:
            return None  # nothing to do, or the scheduler resumes it
        self._desk.take(leg, trial_id)
        return dict(leg.params)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        # Unlike the scheduler's, this one is called once for each trial, however it ended, and for no retry.
        self._desk.close(trial_id, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a new search is told what is stored."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see :meth:`save`."""


class LegScheduler(TrialScheduler):
    """Pauses and stops Tune trials as the source says, resumes the promoted ones, and ends those left over.

    A paused trial gives back its processes and resources, and keeps nothing but its place in Tune's list: Tune calls
    its function again when it goes on, which must continue from a checkpoint of its own.

    Args:
        desk: Shared with the searcher.
    """

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk
        self._resumed: Trial | None = None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        return str(ACTIONS[self._desk.hear(trial.trial_id, result)])

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The paused trial to resume, if any; pending ones, new or retried after an error, Tune starts by itself."""
        if self._resumed is not None and self._resumed.status == Trial.PAUSED:
            return self._resumed
        self._resumed = None
        leg = self._desk.next_leg()
        trial_id = None if leg is None else self._desk.trial_id(leg.key)
        if leg is not None and trial_id is not None:
            trial = next(each for each in tune_controller.get_trials() if each.trial_id == trial_id)
            if trial.is_saving:
                return None  # it is being paused
            self._desk.take(leg, trial_id)
            # A trial that failed while it was being paused was started again by Tune, and runs.
            self._resumed = trial if trial.status == Trial.PAUSED else None
        elif self._desk.done:
            for trial in tune_controller.get_trials():
                if trial.status == Trial.PAUSED:
                    tune_controller.stop_trial(trial)
        return self._resumed

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: the searcher proposed it."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """Nothing: the searcher hears it too."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: the searcher hears it too."""

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: a trial that is retried keeps its place."""

    def debug_string(self) -> str:
        return "legs from rung to rung"
