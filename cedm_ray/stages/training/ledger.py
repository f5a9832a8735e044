"""The records of a search's trials: in the store for good, on the terminal and in MLflow as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cedm_ray.metrics.scores import series_name
from cedm_ray.stages.context import Context
from cedm_ray.stages.show.progress import TrialFacts
from cedm_ray.stages.storage.checkpoints import SAMPLES_FILE, intact
from cedm_ray.stages.storage.store import Store, read_json, write_json
from cedm_ray.stages.tracking.clusterings import track_clustering
from cedm_ray.stages.training.records import State, TrialRecord, new_record, read_record, write_record
from cedm_ray.stages.training.trial_job import Planner, TrialJob

RUNG_NAMES = (
    "kimg", "nimg", "loss", "images_per_s", "score", "num_images", "score_s", "score_sets", "final_scores",
    "final_images", "device_hours", "device", "energy_kwh", "precision", "sample_precision", "device_batch",
)  # fmt: skip
LOGGED = ("nimg", "loss", "images_per_s", "score_s", "device_hours", "energy_kwh")


class Ledger:
    """Writes down what happens to every trial.

    What is for MLflow is put into its journal before the record says so: a process that is killed between the two does
    it again, and MLflow takes it once.

    Args:
        ctx: The search; in its folder ``trials.json`` lists its trials in the order in which they started, and
            ``legs.json`` how far each of them was asked to train, by key.
        planner: Turns parameters into jobs.
    """

    def __init__(self, ctx: Context, planner: Planner) -> None:
        self.planner, self._file, self._legs_file = planner, ctx.folder / "trials.json", ctx.folder / "legs.json"
        self._terminal, self._tracker, self._board = ctx.terminal, ctx.tracker, ctx.board
        self.params: list[dict[str, Any]] = read_json(self._file) or []
        self._legs: dict[str, int] = read_json(self._legs_file) or {}
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever a record has changed."""
        self._active: set[str] = set()

    @property
    def records(self) -> list[TrialRecord]:
        """The records of all trials of this search, in the order in which they started."""
        jobs = [(self.planner.job(params), params) for params in self.params]
        found = [(job, params, read_record(job.path)) for job, params in jobs]
        # Another search may have come to the same training by other parameters, and calls it by another name.
        return [replace(record, label=job.label, params=dict(params)) for job, params, record in found if record]

    def stored(self, params: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
        """What the store has of a trial, perhaps from another search: its reports by kimg."""
        record = read_record(self.planner.job(params).path)
        return {} if record is None else {int(rung["kimg"]): rung for rung in record.rungs}

    def set_stop_kimg(self, params: Mapping[str, Any], stop_kimg: int) -> None:
        """A trial is asked to train so far; a search that goes on asks for the same (:meth:`stop_kimg`)."""
        self._legs[self.planner.job(params).key] = stop_kimg
        write_json(self._legs_file, self._legs)

    def stop_kimg(self, params: Mapping[str, Any]) -> int | None:
        """How far this search has asked a trial to train; None where it has not, or an older version has."""
        return self._legs.get(self.planner.job(params).key)

    def open(self, params: Mapping[str, Any]) -> None:
        """A trial starts or goes on; one that runs already is left as it is."""
        job = self.planner.job(params)
        if job.key in self._active:
            return
        self._active.add(job.key)
        if dict(params) not in self.params:
            self.params.append(dict(params))
            write_json(self._file, self.params)
        record = read_record(job.path)
        self._tracker.child(
            job.key,
            job.label,
            {"C": job.num_clusters, **_others(params), **self.planner.scoring.terms()},
            {
                "stage": "granularity",
                "C": job.num_clusters,
                "grouping": job.grouping,
                "state": "running",
            },
        )
        record = replace(record or new_record(job, params), state="running", reason=None)
        write_record(job.path, record)
        text = f"  {job.label}: {'goes on' if record.rungs else 'starts'}"
        self._terminal.line(text, facts=self._trial_facts(job, record))

    def add(self, params: Mapping[str, Any], result: Mapping[str, Any], *, stored: bool = False) -> None:
        """A trial reports, or a report is taken from the store (``stored``), which is new to this search."""
        job = self.planner.job(params)
        metrics = self.planner.scoring.metrics
        rung = {name: result[name] for name in (*RUNG_NAMES, *metrics, "checkpoint_path") if name in result}
        record = read_record(job.path) or new_record(job, params)
        old = {each["kimg"]: each for each in record.rungs}.get(rung["kimg"], {})
        quality = _quality(job)
        record = replace(record.with_rung({**old, **rung}), utilization_ratio=quality["utilization_ratio"])
        values: dict[str, float] = {name: rung[name] for name in LOGGED if rung.get(name) is not None}
        # The count is part of a series' name: scores of different counts never share a chart.
        scores = {series_name(metric, rung["num_images"]): rung[metric] for metric in metrics}
        run = self._tracker.child(job.key, job.label, {}, {"rung_kimg": int(rung["kimg"])})
        self._tracker.metrics(run, {**scores, **values, **quality}, kimg=int(rung["kimg"]))
        write_record(job.path, record)
        if stored or not old:
            said = ", ".join(f"{metric} {rung[metric]:.4g}" for metric in metrics)
            source = "from the store" if stored else f"{rung['images_per_s']:,.0f} images/s"
            text = f"  {job.label}: {rung['kimg']:,} kimg, {said}, {source}"
            self._terminal.line(text, facts=self._trial_facts(job, record))
        self.on_change()

    def pause(self, params: Mapping[str, Any]) -> None:
        """A trial waits at a rung; it may be promoted later."""
        job = self.planner.job(params)
        record = replace(read_record(job.path) or new_record(job, params), state="paused")
        reached = _reached(record)
        if reached >= self.planner.config.granularity.total_kimg:
            # The store has more of it than this search has asked for; nobody waits for a training that is whole.
            self.close(params)
            return
        self._off_board(job)
        self._tracker.child(job.key, job.label, {}, {"state": "paused", "rung_kimg": reached})
        write_record(job.path, record)
        self._terminal.line(f"  {job.label}: paused at {reached:,} kimg", facts=self._trial_facts(job, record))
        self.on_change()

    def leave(self, params: Mapping[str, Any]) -> None:
        """A trial ends because the search was asked to: its record stays what the next process goes on from."""
        job = self.planner.job(params)
        record = read_record(job.path)
        if record is None:  # it has not started
            return
        reached = _reached(record)
        if record.over or reached >= self.planner.config.granularity.total_kimg:
            self.close(params)
            return
        told = job.key in self._active
        self._off_board(job)
        self._tracker.end(self._run(job), "interrupted", {"rung_kimg": reached})
        if told:
            facts = replace(self._trial_facts(job, record), state="interrupted")
            self._terminal.line(f"  {job.label}: left at {reached:,} kimg", facts=facts)

    def _off_board(self, job: TrialJob) -> None:
        """What its processes told of their progress is taken off the board: they were not asked to."""
        self._active.discard(job.key)
        for key in (job.key, job.score_key):
            self._board.remove(key)

    def close(self, params: Mapping[str, Any], reason: str | None = None) -> None:
        """A trial ends: by itself, stopped by the scheduler, or (with a reason) because it failed.

        One that was closed already stays as it is.
        """
        job = self.planner.job(params)
        record = read_record(job.path) or new_record(job, params)
        if record.over and job.key not in self._active:
            return
        self._off_board(job)
        total = self.planner.config.granularity.total_kimg
        reached = _reached(record)
        state: State = "failed" if reason else "complete" if reached >= total else "stopped"
        record = replace(record, state=state, reason=reason)
        self._artifacts(job, record)
        self._tracker.end(self._run(job), state, {"rung_kimg": reached, "reason": reason})
        write_record(job.path, record)
        tell = self._terminal.tell if state == "complete" else self._terminal.line
        text = f"  {job.label}: {state} at {reached:,} kimg{f', {reason}' if reason else ''}"
        tell(text, facts=self._trial_facts(job, record))
        self.on_change()

    def close_left(self, grouping: str) -> None:
        """Close the trials of a grouping that an earlier process left paused and nobody has promoted."""
        for record in self.records:
            if record.grouping == grouping and record.state in ("paused", "running"):
                self.close(record.params)

    def _trial_facts(self, job: TrialJob, record: TrialRecord) -> TrialFacts:
        """A trial as it stands, for the table of trials and for programs."""
        metrics, last = self.planner.scoring.metrics, record.rungs[-1] if record.rungs else {}
        scores = {metric: float(last[metric]) for metric in metrics if last.get(metric) is not None}
        clusters, reached = job.num_clusters, _reached(record)
        return TrialFacts(job.label, job.grouping, clusters, record.state, reached, metrics[0], scores)

    def _run(self, job: TrialJob) -> str:
        return self._tracker.child(job.key, job.label, {}, {})

    def _artifacts(self, job: TrialJob, record: TrialRecord) -> None:
        run = self._run(job)
        if job.condition is not None and job.condition.is_file():
            track_clustering(self._tracker, run, job.condition, _clustering_facts(job.condition))
        newest = record.rungs[-1].get("checkpoint_path") if record.rungs else None
        if newest and intact(Path(newest), SAMPLES_FILE):
            self._tracker.artifact(run, Path(newest) / SAMPLES_FILE)


def _others(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters but C, which MLflow has under the name that comes first where it chooses an axis."""
    return {name: value for name, value in params.items() if name != "num_clusters"}


def _reached(record: TrialRecord) -> int:
    """Of how many kimg the last report is."""
    return int(record.rungs[-1]["kimg"]) if record.rungs else 0


def _quality(job: TrialJob) -> dict[str, float]:
    """How the clustering behind a trial uses its clusters and, where there are labels, agrees with them."""
    if job.condition is None:
        return {"num_used": 1.0, "utilization_ratio": 1.0, "kl_from_uniform": 0.0}
    return {name: float(value) for name, value in _clustering_facts(job.condition)["quality"].items()}


def _clustering_facts(condition: Path) -> dict[str, Any]:
    """The facts of a stored clustering, by its file."""
    facts = Store(condition.parents[2]).facts(condition.parent)
    if facts is None:
        raise RuntimeError(f"{condition.parent} is not whole; remove that folder and run again")
    return facts
