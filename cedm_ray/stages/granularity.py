"""The search over C below C_max: Optuna proposes, Ray Train trains, ASHA stops, and the baselines run beside them."""

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
from cedm_ray.metrics.scores import series_name
from cedm_ray.stages.context import Context
from cedm_ray.stages.driver_only import DriverCallback
from cedm_ray.stages.embed import Embeddings
from cedm_ray.stages.plan import Planner, TrialJob
from cedm_ray.stages.probes import track_clustering
from cedm_ray.stages.progress import duration
from cedm_ray.stages.records import State, TrialRecord, new_record, read_record, write_record
from cedm_ray.stages.searchers import GranularitySearcher, RungScheduler, log_spaced, tune_domain
from cedm_ray.stages.store import Store, read_json, write_json
from cedm_ray.stages.trial import SAMPLES_FILE, run_trial

RUNG_NAMES = (
    "kimg", "nimg", "loss", "images_per_s", "score", "num_images", "score_s", "final_scores", "final_images",
)  # fmt: skip


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
            {"num_clusters": job.num_clusters, **params, **self.planner.scoring.terms()},
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
        metrics = self.planner.scoring.metrics
        rung = {name: result[name] for name in (*RUNG_NAMES, *metrics, "checkpoint_path") if name in result}
        record = read_record(job.path) or new_record(job, params)
        old = {each["kimg"]: each for each in record.rungs}.get(rung["kimg"], {})
        quality = self._quality(job)
        record = replace(record.with_rung({**old, **rung}), utilization_ratio=quality["utilization_ratio"])
        write_record(job.path, record)
        named = ("nimg", "loss", "images_per_s", "score_s")
        values: dict[str, float] = {name: rung[name] for name in named if name in rung}
        # The count is part of a series' name: scores of different counts never share a chart.
        scores = {series_name(metric, rung["num_images"]): rung[metric] for metric in metrics}
        self._tracker.metrics(self._run(job), {**values, **quality, **scores}, kimg=int(rung["kimg"]))
        if not old:
            said = ", ".join(f"{metric} {rung[metric]:.4g}" for metric in metrics)
            self._terminal.line(f"  {job.label}: {rung['kimg']:,} kimg, {said}, {rung['images_per_s']:,.0f} images/s")

    def close(self, params: Mapping[str, Any], reason: str | None = None) -> None:
        """A trial ends: by itself, stopped by the scheduler, or (with a reason) because it failed."""
        job = self.planner.job(params)
        for key in (job.key, job.score_key):
            self._board.remove(key)
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
    def _quality(job: TrialJob) -> dict[str, float]:
        """How the clustering behind a trial uses its clusters and, where there are labels, agrees with them."""
        if job.condition is None:
            return {"num_used": 1.0, "utilization_ratio": 1.0, "kl_from_uniform": 0.0}
        return {name: float(value) for name, value in Ledger._facts(job.condition)["quality"].items()}

    @staticmethod
    def _facts(condition: Path) -> dict[str, Any]:
        """The facts of a stored clustering."""
        facts = Store(condition.parents[2]).facts(condition.parent)
        if facts is None:
            raise RuntimeError(f"{condition.parent} is not whole; remove that folder and run again")
        return facts

    def _artifacts(self, job: TrialJob, record: TrialRecord) -> None:
        run = self._run(job)
        if job.condition is not None and job.condition.is_file():
            track_clustering(self._tracker, run, job.condition, self._facts(job.condition))
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


def search_granularity(ctx: Context, ledger: Ledger, points: range, embeddings: Embeddings) -> list[TrialRecord]:
    """Train C-EDM for numbers of clusters and for the baselines; what is done already is not repeated.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        points: Numbers of clusters to search over; empty where the grouping has no C to search over.
        embeddings: The embeddings and their neighbours.

    Returns:
        The records of all trials, baselines first.
    """
    config, shares = ctx.config, ctx.shares
    settings, grouping = config.granularity, config.grouping
    over = [record for record in ledger.records if record.over and record.state != "failed"]
    fixed = ledger.planner.fixed()
    missing = [params for params in fixed if params not in [record.params for record in over]]
    known = [record for record in over if record.grouping == grouping] if points else []
    num_trials = settings.num_trials if config.space else min(settings.num_trials, len(points))
    if len(known) < num_trials or missing:
        searcher = _searcher(ctx, ledger, points, num_trials, missing, known)
        scheduler = RungScheduler(
            grace_kimg=settings.grace_kimg,
            total_kimg=settings.total_kimg,
            reduction_factor=settings.reduction_factor,
            grouping=grouping,
        )
        scheduler.recall(known)
        concurrent = min(shares.max_trials, settings.max_concurrent or shares.max_trials)
        outlook = Outlook(ledger, num_trials + len(fixed))
        title = f"searching over C in [{points.start}, {points.stop})" if points else "training on the given groups"
        with ctx.terminal.stage(title, ctx.board, outlook):
            limited = ConcurrencyLimiter(searcher, concurrent)
            tune_trials(ctx, ledger, "granularity", embeddings, searcher=limited, scheduler=scheduler)
    return ledger.records


def _searcher(
    ctx: Context,
    ledger: Ledger,
    points: range,
    num_trials: int,
    missing: Sequence[dict[str, Any]],
    known: Sequence[TrialRecord],
) -> GranularitySearcher:
    """The searcher over the numbers of clusters ``points``, which first lets the missing fixed trainings run."""
    config = ctx.config
    unfinished = [
        {name: value for name, value in record.params.items() if name != "grouping"}
        for record in ledger.records
        if points and record.state in ("running", "failed") and record.grouping == config.grouping
    ]
    others = {path: _at(config, path) for path in config.space}
    first, stop = (points.start, points.stop) if points else (2, 3)
    spaced = [{"num_clusters": c, **others} for c in log_spaced(first, stop, config.granularity.startup_trials)]
    return GranularitySearcher(
        {"num_clusters": ray.tune.lograndint(first, stop), **{k: tune_domain(d) for k, d in config.space.items()}},
        design=[*unfinished, *(params for params in spaced if params not in unfinished)],
        baselines=missing,
        known=known,
        num_trials=num_trials,
        total_kimg=config.granularity.total_kimg,
        seed=config.seed,
        points=None if config.space else points,
        grouping=config.grouping,
    )


def _at(config: SearchConfig, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def tune_trials(
    ctx: Context,
    ledger: Ledger,
    stage: str,
    embeddings: Embeddings,
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
        embeddings: The embeddings and their neighbours.
        searcher: Proposes the parameters of trials.
        scheduler: Stops trials early (None: nobody does).
        params: Of the one trial, where there is no searcher.
        total_kimg: Train to the final budget (None: to the search's).
    """
    trainable = ray.tune.with_parameters(
        run_trial,
        planner=ledger.planner,
        embeddings=embeddings,
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


def best_of(records: Sequence[TrialRecord], total_kimg: int, grouping: str) -> TrialRecord | None:
    """The complete trial of a grouping with the lowest score at so many kimg; of equal ones that of fewer clusters."""
    complete = [record for record in records if record.state == "complete" and record.grouping == grouping]
    return min(complete, key=lambda r: (_score(r, total_kimg), r.num_clusters), default=None)


def _score(record: TrialRecord, kimg: int) -> float:
    rung = record.rung_at(kimg)
    return float("inf") if rung is None else float(rung["score"])
