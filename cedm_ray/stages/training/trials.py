"""Trials in Tune: trainings that are given, and those that the search over C asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.tune

from cedm_ray.granularity.runs import Leg, Params, name_of
from cedm_ray.granularity.search import GranularitySearch, Verdict
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.training.driver_only import DriverCallback
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.ledger_callback import LedgerCallback
from cedm_ray.stages.training.legs import Desk, LegScheduler, LegSearcher
from cedm_ray.stages.training.storage_watch import StorageWatch
from cedm_ray.stages.training.trial import run_trial
from cedm_ray.stages.training.trial_job import Planner
from cedm_ray.stages.training.tune_run import run_settings


class TrialSource:
    """The next leg of training: first of the trainings that are made in any case, then what the search asks for.

    Args:
        ledger: Where trials are written down.
        given: Parameters of trainings that run to the end, whatever they score.
        search: The search over C; None where there is none.
        grouping: What makes the clusters that are searched over.
        metrics: Names of the scores that are minimised, as reports have them.
        allowed_kimg: What the search may train in all at present; asked before every leg.
        on_score: Called after every report to the search.
    """

    def __init__(
        self,
        ledger: Ledger,
        given: Sequence[Mapping[str, Any]],
        search: GranularitySearch | None = None,
        *,
        grouping: str = "temi",
        metrics: Sequence[str] = ("score",),
        allowed_kimg: Callable[[], float] | None = None,
        on_score: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger, self._search, self._grouping = ledger, search, grouping
        self._metrics, self._allowed_kimg, self._on_score = tuple(metrics), allowed_kimg, on_score
        self._given = [dict(params) for params in given]
        self._running: dict[str, dict[str, Any]] = {}
        """Parameters of the given trainings that run, by key."""
        self._nothing_new = False

    @property
    def done(self) -> bool:
        return not self._given and not self._running and (self._search is None or self._search.done)

    def ask(self) -> Leg | None:
        """The next leg; what was asked for in vain is not asked again before something has changed."""
        if self._given:
            params = self._given.pop(0)
            key = name_of(params)
            self._running[key] = params
            return Leg(key, params, 0, 0)
        if self._search is None or self._nothing_new:
            return None
        if self._allowed_kimg is not None:
            self._search.allowed_kimg = self._allowed_kimg()
        while (leg := self._search.ask()) is not None:
            leg = Leg(leg.key, {"grouping": self._grouping, **leg.params}, leg.start_kimg, leg.stop_kimg)
            self._ledger.set_stop_kimg(leg.params, leg.stop_kimg)
            if not self._read(leg):
                break
        self._nothing_new = leg is None and not self._search.done
        if leg is not None and leg.start_kimg:
            self._ledger.open(leg.params)  # from now on: Tune tells of it when its processes have started
        return leg

    def _read(self, leg: Leg) -> bool:
        """Take a leg that an earlier search has trained from the store; False where it has to be trained."""
        assert self._search is not None
        stored = self._ledger.stored(leg.params)
        wanted = [rung for rung in self._search.plan.rungs_kimg if leg.start_kimg < rung <= leg.stop_kimg]
        if any(rung not in stored for rung in wanted):
            return False
        self._ledger.open(leg.params)
        verdict: Verdict = "continue"
        for rung in wanted:
            verdict = self._judge(leg.key, leg.params, stored[rung], stored=True)
            if verdict == "stop":
                break
        if verdict != "pause":
            self._ledger.close(leg.params)
            self._search.end(leg.key, failed=False)
        return True

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        """A rung was reported; it is in the ledger before anything is decided."""
        self._nothing_new = False
        if key in self._running or self._search is None:
            self._ledger.add(self._running[key], result)
            ended = self._diverged(self._running[key], result)
            self._on_score()
            return "stop" if ended else "continue"
        return self._judge(key, {"grouping": self._grouping, **self._search.runs[key].params}, result)

    def _judge(self, key: str, params: Params, result: Mapping[str, Any], *, stored: bool = False) -> Verdict:
        """Write down and decide on a rung of the search, reported now or found in the store."""
        assert self._search is not None
        self._ledger.add(params, result, stored=stored)
        if self._diverged(params, result):
            return "stop"
        scores = [float(result[name]) for name in self._metrics]
        verdict = self._search.tell(key, int(result["kimg"]), scores)
        if verdict == "pause":
            self._ledger.pause(params)
        self._on_score()
        return verdict

    def _diverged(self, params: Params, result: Mapping[str, Any]) -> bool:
        """Whether a report holds what is no number: no search can go on from it, nor can the training."""
        numbers = {name: float(result[name]) for name in ("loss", *self._metrics) if name in result}
        bad = next((f"{name} is {value:g}" for name, value in numbers.items() if not math.isfinite(value)), None)
        if bad is not None:
            self._ledger.close(params, reason=f"{bad} at {result['kimg']:,} kimg: the training has diverged")
        return bad is not None

    def end(self, key: str, failed: bool) -> None:
        """A training is over."""
        self._nothing_new = False
        if self._running.pop(key, None) is None and self._search is not None:
            self._search.end(key, failed)


class DeathsInARow(DriverCallback):
    """Makes Tune start a trial whose process was killed again as often as it has got further since the last time.

    The process lies on the head, and what interrupts the workers of its training is its own matter.

    Args:
        board: Where it is told.
        planner: Knows what a trial is called.
    """

    def __init__(self, board: Board, planner: Planner) -> None:
        self._board, self._planner = board, planner
        self._furthest_kimg: dict[str, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        kimg = int(result.get("kimg", 0))
        if kimg > self._furthest_kimg.get(trial.trial_id, 0):
            self._furthest_kimg[trial.trial_id] = kimg
            trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        kimg = self._furthest_kimg.get(trial.trial_id, 0)
        label = self._planner.job(trial.config).label
        self._board.say(f"{label}: its process on the head was killed; goes on from {kimg:,} kimg")


def tune_trials(
    ctx: Context,
    ledger: Ledger,
    stage: str,
    embeddings: Embeddings,
    source: TrialSource,
    *,
    at_once: Callable[[], int],
    total_kimg: int | None = None,
) -> None:
    """Run Tune until the source is done; every report goes to the ledger.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        stage: Name of the stage.
        embeddings: The embeddings and their neighbours.
        source: What to train.
        at_once: Says how many trials may run side by side now.
        total_kimg: Train to the final budget (None: to the search's).
    """
    if source.done:
        return
    trainable = ray.tune.with_parameters(
        run_trial,
        planner=ledger.planner,
        embeddings=embeddings,
        board=ctx.board,
        shares=ctx.shares,
        total_kimg=total_kimg,
    )
    desk = Desk(source, at_once, ctx.stopping)
    told = LedgerCallback(ledger, ctx.stopping)
    callbacks = [StorageWatch(ctx.store.root.parent, told), DeathsInARow(ctx.board, ledger.planner)]
    ray.tune.Tuner(
        # The function only waits for its workers: it takes no CPU, and its place is the head.
        ray.tune.with_resources(trainable, {"node:__internal_head__": 0.001}),
        tune_config=ray.tune.TuneConfig(search_alg=LegSearcher(desk), scheduler=LegScheduler(desk), num_samples=-1),
        run_config=run_settings(stage, ctx.folder / "ray", callbacks),
    ).fit()
    ctx.stopping.check()
