"""What is known of each trial, kept as JSON by the driver; a search that goes on is told it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cedm_ray.stages.storage.checkpoints import whole_checkpoint
from cedm_ray.stages.storage.store import read_json, write_json

if TYPE_CHECKING:
    from cedm_ray.stages.training.trial_job import TrialJob

RECORD_FILE = "trial.json"
State = Literal["running", "paused", "stopped", "complete", "failed"]
Rung = Mapping[str, Any]


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it stands."""

    key: str
    label: str
    grouping: str
    num_clusters: int
    params: dict[str, Any]
    state: State
    utilization_ratio: float | None = None
    rungs: tuple[Rung, ...] = field(default=())
    """Reports in the order of their kimg: kimg, nimg, loss, score, ..."""
    reason: str | None = None
    """Why a trial failed."""

    @property
    def over(self) -> bool:
        return self.state not in ("running", "paused")

    def rung_at(self, kimg: int) -> Rung | None:
        """The report at so many kimg, or the last one before."""
        reached = [rung for rung in self.rungs if rung["kimg"] <= kimg]
        return reached[-1] if reached else None

    def with_rung(self, rung: Rung) -> TrialRecord:
        """With one more report; one of the same kimg is replaced."""
        others = [old for old in self.rungs if old["kimg"] != rung["kimg"]]
        return replace(self, rungs=tuple(sorted([*others, rung], key=lambda each: each["kimg"])))


@dataclass(frozen=True)
class FinalScore:
    """Score of the visual groups at the full budget."""

    num_clusters: int
    kimg: int
    mean: float
    std: float
    """Standard deviation over the sets of images (0 for one set)."""
    num_sets: int
    num_images: int
    export: str
    scores: tuple[dict[str, Any], ...] = ()
    """All scores, each with its detector, weights, resize, dtype and counts; the first one is the search's own."""


def unconditional_record(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """The complete training without a condition, which others are compared with; None where there is none."""
    return next((r for r in records if r.grouping == "none" and r.state == "complete" and r.rungs), None)


def last_checkpoint(record: TrialRecord) -> Path | None:
    """The checkpoint of a trial's last report, if it is whole; None where the report names none."""
    last = record.rungs[-1]
    named = last.get("checkpoint_path")
    return None if named is None else whole_checkpoint(Path(named), last["nimg"])


def new_record(job: TrialJob, params: Mapping[str, Any]) -> TrialRecord:
    """The record of a trial that starts."""
    return TrialRecord(job.key, job.label, job.grouping, job.num_clusters, dict(params), "running")


def read_record(path: Path) -> TrialRecord | None:
    """The record in a trial's folder, or None; what was done is then told again by the training's checkpoint."""
    found = read_json(path / RECORD_FILE)
    try:
        return None if found is None else TrialRecord(**{**found, "rungs": tuple(found["rungs"])})
    except (TypeError, KeyError):  # not as it was written
        return None


def write_record(path: Path, record: TrialRecord) -> None:
    """Keep a record in its trial's folder."""
    write_json(path / RECORD_FILE, asdict(record))
