"""The search over C in [2, C_max): Optuna proposes, Ray Train trains, ASHA stops, and the baselines run beside them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
from ray.tune.search import ConcurrencyLimiter

from cedm_ray.config import SearchConfig
from cedm_ray.stages.context import Context
from cedm_ray.stages.driver_only import DriverCallback
from cedm_ray.stages.plan import Planner, TrialJob
from cedm_ray.stages.progress import duration
from cedm_ray.stages.records import State, TrialRecord, new_record, read_record, write_record
from cedm_ray.stages.searchers import GranularitySearcher, RungScheduler, log_spaced, tune_domain
from cedm_ray.stages.store import Store, read_json, write_json
from cedm_ray.stages.trial import SAMPLES_FILE, run_trial

RUNG_NAMES = ("kimg", "nimg", "loss", "images_per_s", "score", "score_s", "final_scores", "final_images")


class Ledger:
    """The records of a search's trials: in the store for good, on the terminal and in MLflow as they come.

    Args:
        ctx: The search; ``trials.json`` in its folder lists its trials in the order in which they started.
        planner: Turns parameters into jobs.
    """

    def __init__(self, ctx: Context, planner: Planner) -> None:
        self.planner, self._file = planner, ctx.folder / "trials.json"
        self._terminal, self._tracker, self._board = ctx.terminal, ctx.tracker, ctx.board
        self.params: list[dict[str, Any]] = read_json(self._file) or []

    @property
    def records(self) -> list[TrialRecord]:
        """The records of all trials of this search, in the order in which they started."""
        found = (read_record(self.planner.job(params).path) for params in self.params)
        return [record for record in found if record is not None]

    def open(self, params: Mapping[str, Any]) -> None:
        """A trial starts or goes on."""
        job = self.planner.job(params)
        if dict(params) not in self.params:
            self.params.append(dict(params))
            write_json(self._file, self.params)
        record = read_record(job.path)
        write_record(job.path, replace(record or new_record(job, params), state="running", reason=None))
        self._tracker.child(
            job.key,
            job.label,
            {"num_clusters": job.num_clusters, **params},
            {
                "stage": "granularity",
                "C": job.num_clusters,
                "grouping": job.grouping,
                "state": "running",
            },
        )
        self._terminal.line(f"  {job.label}: {'goes on' if record and record.rungs else 'starts'}")

    def add(self, params: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A trial reports."""
        job = self.planner.job(params)
        metric = self.planner.scoring.metric
        rung = {name: result[name] for name in (*RUNG_NAMES, metric, "checkpoint_path") if name in result}
        record = read_record(job.path) or new_record(job, params)
        old = {each["kimg"]: each for each in record.rungs}.get(rung["kimg"], {})
        record = replace(record.with_rung({**old, **rung}), utilization_ratio=self._utilization_ratio(job))
        write_record(job.path, record)
        run = self._run(job)
        values = {name: rung[name] for name in ("nimg", "loss", "images_per_s", "score_s", metric) if name in rung}
        if record.utilization_ratio is not None:
            values["utilization_ratio"] = record.utilization_ratio
        self._tracker.metrics(run, {**values, "score": rung["score"]}, kimg=int(rung["kimg"]))
        if not old:
            self._terminal.line(
                f"  {job.label}: {rung['kimg']:,} kimg, {metric} {rung['score']:.4g}, "
                f"{rung['images_per_s']:,.0f} images/s"
            )

    def close(self, params: Mapping[str, Any], reason: str | None = None) -> None:
        """A trial ends: by itself, stopped by the scheduler, or (with a reason) because it failed."""
        job = self.planner.job(params)
        self._board.remove(job.key)
        record = read_record(job.path) or new_record(job, params)
        total = self.planner.config.granularity.total_kimg
        reached = record.rungs[-1]["kimg"] if record.rungs else 0
        state: State = "failed" if reason else "complete" if reached >= total else "stopped"
        record = replace(record, state=state, reason=reason)
        write_record(job.path, record)
        self._artifacts(job, record)
        self._tracker.end(self._run(job), state, {"rung_kimg": reached, "reason": reason})
        if state != "complete":
            self._terminal.line(f"  {job.label}: {state} at {reached:,} kimg{f', {reason}' if reason else ''}")

    def _run(self, job: TrialJob) -> str:
        return self._tracker.child(job.key, job.label, {}, {})

    @staticmethod
    def _utilization_ratio(job: TrialJob) -> float | None:
        if job.condition is None:
            return 1.0
        facts = Store(job.condition.parents[2]).facts(job.condition.parent)
        return None if facts is None else float(facts["utilization_ratio"])

    def _artifacts(self, job: TrialJob, record: TrialRecord) -> None:
        run = self._run(job)
        if job.condition is not None and job.condition.is_file():
            self._tracker.artifact(run, job.condition, "clustering")
        newest = record.rungs[-1].get("checkpoint_path") if record.rungs else None
        if newest and (Path(newest) / SAMPLES_FILE).is_file():
            self._tracker.artifact(run, Path(newest) / SAMPLES_FILE)


class LedgerCallback(DriverCallback):
    """Tells the ledger what Tune hears; runs in the driver alone."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id not in self._open:
            self._open.add(trial.trial_id)
            self._ledger.open(trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._ledger.add(trial.config, result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.close(trial.config)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.close(trial.config, reason=_reason(Path(trial.error_file)))


def _reason(error_file: Path) -> str:
    """What went wrong, from the traceback that Tune wrote: the last line that names an error."""
    if not error_file.is_file():
        return f"no reason given; Tune looked for it in {error_file}"
    lines = [line.strip() for line in error_file.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["no reason given"])[-1][:300]


class Outlook:
    """How far the stage is, for the terminal: trials done and the time left, from the ones that are done."""

    def __init__(self, ledger: Ledger, total: int) -> None:
        self._ledger, self._total = ledger, total
        self._started_s, self._already = time.monotonic(), self._done()
        self._last, self._last_s = self._already, self._started_s

    def _done(self) -> int:
        return sum(record.over for record in self._ledger.records)

    def __call__(self) -> str:
        done, now_s = self._done(), time.monotonic()
        if done > self._last:
            self._last, self._last_s = done, now_s
        said = f"{done} of {self._total} trials done"
        if done > self._already:
            each = (self._last_s - self._started_s) / (done - self._already)
            left = each * (self._total - done) - (now_s - self._last_s)
            said += f", about {duration(max(left, 0))} left"
        return said


def search_granularity(ctx: Context, ledger: Ledger, c_max: int, data: Mapping[str, Any]) -> list[TrialRecord]:
    """Train C-EDM for numbers of clusters in [2, c_max) and for the baselines; what is done already is not repeated.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        c_max: The upper bound, excluded.
        data: References to ``embeddings`` and ``neighbors`` in the object store.

    Returns:
        The records of all trials, baselines first.
    """
    config, shares = ctx.config, ctx.shares
    settings = config.granularity
    over = [record for record in ledger.records if record.over and record.state != "failed"]
    known = [record for record in over if record.grouping == "temi"]
    baselines = ledger.planner.baselines() if settings.baselines else []
    missing = [params for params in baselines if params not in [record.params for record in over]]
    unfinished = [
        {name: value for name, value in record.params.items() if name != "grouping"}
        for record in ledger.records
        if record.state in ("running", "failed") and record.grouping == "temi"
    ]
    others = {path: _at(config, path) for path in config.space}
    design = [{"num_clusters": c, **others} for c in log_spaced(2, c_max, settings.startup_trials)]
    num_points = c_max - 2
    num_trials = settings.num_trials if config.space else min(settings.num_trials, num_points)
    if len(known) < num_trials or missing:
        searcher = GranularitySearcher(
            {"num_clusters": ray.tune.lograndint(2, c_max), **{k: tune_domain(d) for k, d in config.space.items()}},
            design=[*unfinished, *(params for params in design if params not in unfinished)],
            baselines=missing,
            known=known,
            num_trials=num_trials,
            total_kimg=settings.total_kimg,
            seed=config.seed,
            points=None if config.space else range(2, c_max),
        )
        scheduler = RungScheduler(
            grace_kimg=settings.grace_kimg, total_kimg=settings.total_kimg, reduction_factor=settings.reduction_factor
        )
        scheduler.recall(known)
        concurrent = min(shares.max_trials, settings.max_concurrent or shares.max_trials)
        outlook = Outlook(ledger, num_trials + len(baselines))
        with ctx.terminal.stage(f"searching over C in [2, {c_max})", ctx.board, outlook):
            limited = ConcurrencyLimiter(searcher, concurrent)
            tune_trials(ctx, ledger, "granularity", data, searcher=limited, scheduler=scheduler)
    return ledger.records


def _at(config: SearchConfig, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def tune_trials(
    ctx: Context,
    ledger: Ledger,
    stage: str,
    data: Mapping[str, Any],
    *,
    searcher: Any = None,
    scheduler: Any = None,
    params: Mapping[str, Any] | None = None,
    total_kimg: int | None = None,
) -> None:
    """Run Tune until the searcher has no more, or one trial with given parameters; every report goes to the ledger.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        stage: Name of the stage.
        data: References to ``embeddings`` and ``neighbors``.
        searcher: Proposes the parameters of trials.
        scheduler: Stops trials early (None: nobody does).
        params: Of the one trial, where there is no searcher.
        total_kimg: Train to the final budget (None: to the search's).
    """
    trainable = ray.tune.with_parameters(
        run_trial,
        planner=ledger.planner,
        data=dict(data),
        board=ctx.board,
        shares=ctx.shares,
        total_kimg=total_kimg,
    )
    ray.tune.Tuner(
        # The function only waits for its workers: it takes no CPU, and its place is the head.
        ray.tune.with_resources(trainable, {"node:__internal_head__": 0.001}),
        param_space=dict(params) if params else None,
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher, scheduler=scheduler, num_samples=-1 if searcher is not None else 1
        ),
        run_config=ray.tune.RunConfig(
            name=stage,
            storage_path=str(ctx.folder / "ray"),
            verbose=0,
            callbacks=[LedgerCallback(ledger)],
            failure_config=ray.tune.FailureConfig(max_failures=1),
        ),
    ).fit()


def best_of(records: Sequence[TrialRecord], total_kimg: int) -> TrialRecord | None:
    """The complete TEMI trial with the lowest score at so many kimg; of equal ones the one with fewer clusters."""
    complete = [record for record in records if record.state == "complete" and record.grouping == "temi"]
    return min(complete, key=lambda r: (_score(r, total_kimg), r.num_clusters), default=None)


def _score(record: TrialRecord, kimg: int) -> float:
    rung = record.rung_at(kimg)
    return float("inf") if rung is None else float(rung["score"])
