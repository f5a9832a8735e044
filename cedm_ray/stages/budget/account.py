"""What the search over C may still train, while it goes on: by what was trained and how fast that was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.budget import Speed, Workload, search_kimg
from cedm_ray.stages.budget.plan import Plan
from cedm_ray.stages.budget.speeds import KnownSpeed, Speeds
from cedm_ray.stages.budget.spending import Spent, limits_of
from cedm_ray.stages.training.records import TrialRecord

UNBOUNDED = 10**9
"""More numbers of clusters than any budget pays for: stands for a grid without an end."""


class Account:
    """What the search over C may train, by what was measured so far.

    Args:
        config: The settings.
        work: What is to be trained.
        speed: Expected before the first rung; None where nothing is known.
        at_once: Trainings side by side.
        started_s: When the search started, in seconds of the monotonic clock.
        speeds: Where a measured speed is kept.
    """

    def __init__(
        self,
        config: SearchConfig,
        work: Workload,
        speed: KnownSpeed | None,
        at_once: int,
        started_s: float,
        speeds: Speeds,
    ) -> None:
        self._config, self._limits, self.work, self._known = config, limits_of(config), work, speed
        self._at_once = at_once
        self._started_s, self._speeds = started_s, speeds
        self._trained_kimg = 0.0

    def plan(self) -> Plan:
        """What is going to be trained, as far as is known now."""
        return Plan(self._config, self.work, self._known, self._at_once, self._passed_hours)

    @property
    def speed(self) -> Speed | None:
        return Plan(self._config, self.work, self._known, self._at_once).speed

    @property
    def _passed_hours(self) -> float:
        """What the clock shows beyond the trainings: embedding, clustering, starts.

        Trainings of an earlier process took none of this one's hours, which may make it negative.
        """
        elapsed_hours = (time.monotonic() - self._started_s) / 3600
        return 0.0 if self.speed is None else elapsed_hours - self.speed.wall_hours(self._trained_kimg, 0)

    def measure(self, records: Sequence[TrialRecord]) -> KnownSpeed | None:
        """Take the speed of all rungs so far, scoring included; returns it when it is the first one."""
        self._trained_kimg = Spent.of(records).mimg * 1000
        images, seconds = 0.0, 0.0
        for record in records:
            before = 0.0
            for rung in record.rungs:
                seen = rung["kimg"] * 1000 - before
                images += seen
                seconds += seen / rung["images_per_s"] + rung["score_s"]
                before = rung["kimg"] * 1000
        if not seconds:
            return None
        measured = KnownSpeed(images / seconds, "measured")
        self._speeds.keep_measured(measured.images_per_s)
        first = self._known is None or self._known.source != "measured"
        self._known = measured
        return measured if first else None

    def allowed_kimg(self) -> float:
        """What the search over C may train in all: one training at least, and no more while the speed is wanting."""
        found = self.plan().search_kimg
        return float(self.work.total_kimg) if found is None else found

    @property
    def short(self) -> bool:
        """Whether, by what is known now, the budget does not hold even one training beside the rest."""
        return self._held_kimg(self.work) < self.work.total_kimg

    def _held_kimg(self, work: Workload) -> float:
        return search_kimg(work, self._limits, self.speed, passed_hours=self._passed_hours)

    def retrainings(self, records: Sequence[TrialRecord]) -> int | None:
        """How many whole trainings the budget still holds beside the final one; None where there is no limit."""
        if not self._limits.given:
            return None
        spent_kimg = Spent.of(records).mimg * 1000
        # Whatever the grid holds: what the search over C leaves may be spent here.
        held_kimg = self._held_kimg(replace(self.work, grid_points=UNBOUNDED))
        left = held_kimg + self.work.around_kimg - self.work.final_kimg - spent_kimg
        return max(0, int(left / self.work.total_kimg))
