"""What is told while a search runs: how far pieces of work are, and facts that a program or a table can use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

TICK_S = 1.0
"""So often a process tells how far it is, and so often that is shown."""


@dataclass(frozen=True)
class Work:
    """How far one piece of work is: ``done`` of ``total`` units since ``started_s`` (seconds of the epoch)."""

    label: str
    done: float
    total: float
    unit: str
    started_s: float
    started_done: float = 0.0
    gpu: str = ""
    """How busy its GPU is, where it has one."""

    @property
    def amount(self) -> str:
        """For example ``96/200 kimg``."""
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"

    def left_s(self, now_s: float) -> float | None:
        """About how many seconds the rest takes; None where nothing was done yet, or nothing is left."""
        made, spent = self.done - self.started_done, now_s - self.started_s
        return (self.total - self.done) * spent / made if made > 0 and self.done < self.total else None

    def text(self, now_s: float) -> str:
        """For example ``C=17 96/200 kimg, 12 s left``."""
        left_s = self.left_s(now_s)
        said = f"{self.label} {self.amount}".strip()
        return said if left_s is None else f"{said}, {duration(left_s)} left"


def scoring_label(label: str) -> str:
    """What the scoring of a training is called, by which it is told from the training itself."""
    return f"{label} scoring"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class WorkCounter:
    """One piece of work of this process, which counts itself and can be shown."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._started_s = 0.0, time.time()

    def add(self, more: float) -> None:
        """So much more is done."""
        self._done += more

    def works(self) -> list[Work]:
        return [Work(self._label, self._done, self._total, self._unit, self._started_s)]


class WorkList(Protocol):
    """Where works in progress can be read."""

    def works(self) -> list[Work]: ...


@dataclass(frozen=True)
class Facts:
    """What a line says, for programs; the fields are those of the JSON object, beside ``event``, ``time``, ``text``."""

    event: ClassVar[str] = "line"


@dataclass(frozen=True)
class TrialFacts(Facts):
    """A training as it stands."""

    event: ClassVar[str] = "trial"
    label: str
    grouping: str
    num_clusters: int
    state: str
    """``running``, ``paused``, ``stopped``, ``complete``, ``failed``, or ``interrupted`` when the search is ended."""
    kimg: int
    """The last rung that it has reached."""
    metric: str
    """The score that decides."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """All scores at that rung; empty before the first one."""

    @property
    def score(self) -> float | None:
        return self.scores.get(self.metric)


@dataclass(frozen=True)
class ProbeFacts(Facts):
    """A clustering that was trained for its r_C."""

    event: ClassVar[str] = "probe"
    stage: str
    """``upper_bound`` or ``lower_bound``."""
    num_clusters: int
    num_used: int
    utilization_ratio: float
    mean_utilization_ratio: float
    """Over the heads."""
    seed: int


@dataclass(frozen=True)
class DecisionFacts(Facts):
    """What the trials say: the best C, and those that noise cannot tell from it."""

    event: ClassVar[str] = "decision"
    best: int
    tie_set: tuple[int, ...]
    smallest: int


@dataclass(frozen=True)
class StageFacts(Facts):
    """A stage begins."""

    event: ClassVar[str] = "stage"
    stage: str


@dataclass(frozen=True)
class ProgressFacts(Facts):
    """How far a stage is, told every so often."""

    event: ClassVar[str] = "progress"
    stage: str
    works: tuple[Mapping[str, Any], ...]
    """``label``, ``done``, ``total``, ``unit``, ``left_s`` and ``gpu`` of each piece of work."""


@dataclass(frozen=True)
class ResultFacts(Facts):
    """The search is done; ``result.json`` in its folder has the rest."""

    event: ClassVar[str] = "result"
    name: str
    folder: str
    best: int
    metric: str
    score: float
    """Of the final model."""
    score_std: float
    kimg: int
    c_max: int | None
    tie_set: tuple[int, ...]
    model: str
    """Folder of the exported model."""


@dataclass(frozen=True)
class ErrorFacts(Facts):
    """The search ends because of a mistake (``status`` 2) or a failure (1)."""

    event: ClassVar[str] = "error"
    status: int


@dataclass(frozen=True)
class StoppedFacts(Facts):
    """The search was ended by a signal."""

    event: ClassVar[str] = "stopped"
    resume: str
    """The command that goes on with it."""


@dataclass(frozen=True)
class PlanFacts(Facts):
    """What a search would train and take (``--dry-run``)."""

    event: ClassVar[str] = "plan"
    plan: tuple[tuple[str, str], ...]
    """Pairs of a name and a text; a line that goes on has no name."""


@dataclass(frozen=True)
class RunsFacts(Facts):
    """The runs of a storage folder (``--list-runs``)."""

    event: ClassVar[str] = "runs"
    runs: tuple[Mapping[str, Any], ...]
