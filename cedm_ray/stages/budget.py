"""What a search may spend, what it has spent, and the plan that is printed before anything starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.budget import Limits, Speed, Workload, check_budget, search_kimg
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.records import TrialRecord
from cedm_ray.stages.store import key_of, read_json, write_json

PUBLISHED = {32: 200e6 / 86_400 / 4, 64: 200e6 / (2 * 86_400) / 4}
"""Images that one A100 trains on a second, by the side of the images: 4 of them take about one and two days for 200
million (arXiv 2403.00570). Rough, and of those networks only."""
TIES_EXPECTED = 3
"""Numbers of clusters that are expected to tie, for which retrainings are set aside."""
UNBOUNDED = 10**9
"""Numbers of clusters of a grid that no budget comes to the end of."""


def limits_of(config: SearchConfig) -> Limits:
    budget = config.budget
    return Limits(budget.mimg, budget.gpu_hours, budget.wall_hours)


def workload(config: SearchConfig, *, has_labels: bool, grid_points: int | None = None) -> Workload:
    """What a search trains; ``grid_points``: numbers of clusters of the grid, once they are known."""
    granularity, searched = config.granularity, config.grouping in SEARCHED
    own = 0 if searched else 1
    baselines = [name for name in ("none", "labels") if name != config.grouping and (has_labels or name == "none")]
    return Workload(
        grid_points=(granularity.grid_points if grid_points is None else grid_points) if searched else 0,
        total_kimg=granularity.total_kimg,
        num_baselines=own + (len(baselines) if granularity.baselines else 0),
        num_confirmed=config.confirm * TIES_EXPECTED if searched else 0,
        final_kimg=config.final.total_kimg - granularity.total_kimg,
        share=granularity.share,
    )


@dataclass(frozen=True)
class KnownSpeed:
    """How fast one training is, and how that is known."""

    images_per_s: float
    source: str


class Speeds:
    """How fast trainings of these settings were, kept beside the store for the next search's plan.

    Args:
        storage: Folder of the store.
        config: The settings.
        resolution: Side of the images.
    """

    def __init__(self, storage: Path, config: SearchConfig, resolution: int) -> None:
        tree = config.model_dump(mode="json")
        sections = ("diffusion", "compute", "score", "resources")
        inputs = {name: tree[name] for name in sections} | {"resolution": resolution}
        self._file = storage / "speeds" / f"{key_of(inputs)}.json"
        self._config, self._resolution = config, resolution

    def known(self, *, gpus: bool) -> KnownSpeed | None:
        """Given, measured by an earlier search, or published; None where nothing is known."""
        given = self._config.budget.images_per_s
        if given is not None:
            return KnownSpeed(given, "as given")
        measured = read_json(self._file)
        if measured is not None:
            return KnownSpeed(float(measured["images_per_s"]), "measured by earlier trainings of these settings")
        side = next((side for side in sorted(PUBLISHED) if self._resolution <= side), None)
        if not gpus or side is None or self._resolution < min(PUBLISHED):
            return None
        workers = self._config.resources.num_workers
        return KnownSpeed(PUBLISHED[side] * workers, f"a rough published figure for {workers} A100 GPUs")

    def measured(self, images_per_s: float) -> None:
        """Keep what was measured, scoring included."""
        write_json(self._file, {"images_per_s": images_per_s})


@dataclass(frozen=True)
class Spent:
    """What trainings have cost so far."""

    mimg: float
    device_hours: float
    energy_kwh: float | None
    """None where no device reports it."""

    @classmethod
    def of(cls, records: Sequence[TrialRecord]) -> Spent:
        """The sum over trials, those included that an earlier search had stored."""
        rungs = [rung for record in records for rung in record.rungs]
        energy = [rung["energy_kwh"] for rung in rungs if rung.get("energy_kwh") is not None]
        return cls(
            mimg=sum(record.rungs[-1]["kimg"] for record in records if record.rungs) / 1000,
            device_hours=sum(float(rung.get("device_hours") or 0) for rung in rungs),
            energy_kwh=sum(energy) if energy else None,
        )


@dataclass(frozen=True)
class Plan:
    """What a search is going to train and what that takes, before anything has started.

    Args:
        config: The settings.
        work: What is to be trained.
        known: Expected speed of one training; None where nothing is known.
        at_once: Trainings side by side; None where the cluster is not known yet.
        passed_hours: Hours of the clock that went by without training.
    """

    config: SearchConfig
    work: Workload
    known: KnownSpeed | None
    at_once: int | None
    passed_hours: float = 0.0

    @property
    def speed(self) -> Speed | None:
        if self.known is None:
            return None
        resources = self.config.resources
        devices = resources.num_workers * (resources.gpus_per_worker or 1)
        return Speed(self.known.images_per_s, devices, self.at_once or 1)

    def check(self) -> None:
        """Refuse a budget that is too small for a single training.

        Raises:
            UserError: If it is.
        """
        check_budget(self.work, limits_of(self.config), self.speed)

    @property
    def search_kimg(self) -> float | None:
        """What the search over C may train, one training at least; None where a speed decides that is not known."""
        limits = limits_of(self.config)
        if limits.given and limits.mimg is None and self.speed is None:
            return None
        if not self.work.grid_points:
            return 0.0
        found = search_kimg(self.work, limits, self.speed, passed_hours=self.passed_hours)
        return max(found, float(self.work.total_kimg))

    def lines(self) -> list[tuple[str, str]]:
        """The plan for people: pairs of a name and a text."""
        return [*self._search_lines(), *self._other_lines(), *self._sum_lines()]

    def _search_lines(self) -> list[tuple[str, str]]:
        settings, work, space = self.config.granularity, self.work, bool(self.config.space)
        if not work.grid_points:
            return []
        allowed = self.search_kimg
        budget = "as much as the hours allow, once the first rung has shown the speed"
        if allowed is not None:
            trainings, share = allowed / work.total_kimg, allowed / work.grid_kimg
            budget = f"at most {mimg(allowed)}, {_figure(trainings)} whole trainings, {share:.0%} of the grid"
        points = f"{work.grid_points} numbers of clusters, log-spaced over [2, C_max)"
        rungs = ", ".join(f"{rung:,}" for rung in settings.rungs_kimg())
        how = f"sampler {settings.sampler_name(space=space)}, rule {settings.rule_name(space=space)}"
        return [
            ("grid", f"{points}, {mimg(work.total_kimg)} each: {mimg(work.grid_kimg)}"),
            ("search", budget),
            ("", f"{how}, scored at {rungs} kimg"),
        ]

    def _other_lines(self) -> list[tuple[str, str]]:
        config, work = self.config, self.work
        own = [] if config.grouping in SEARCHED else [f"one on {config.grouping}"]
        others = work.num_baselines - len(own)
        made = ", ".join([*own, *([f"{others} to compare with"] if others else [])])
        lines = []
        if made:
            lines.append(("trainings" if own else "beside it", f"{made}: {mimg(work.baselines_kimg)}"))
        if work.num_confirmed:
            times = "once more" if config.confirm == 1 else f"{config.confirm} times more"
            course = f"each C that ties, about {TIES_EXPECTED}, is trained {times}"
            lines.append(("confirm", f"{course}: {mimg(work.num_confirmed * work.total_kimg)}"))
        final = config.final
        what = config.grouping if own else "the best"
        course = f"{what} goes on from {work.total_kimg:,} to {final.total_kimg:,} kimg: {mimg(work.final_kimg)}"
        return [*lines, ("final", f"{course}; scored on {final.num_sets} x {final.num_images:,} images")]

    def _sum_lines(self) -> list[tuple[str, str]]:
        allowed, work, speed = self.search_kimg, self.work, self.speed
        unknown = "unknown until the first rung is measured; --budget.images-per-s gives a speed to plan with"
        if allowed is None:
            return [("time", unknown)]
        total = allowed + work.around_kimg
        saved = f", against {mimg(work.full_grid_kimg)} with the full grid" if work.grid_points else ""
        lines = [("in all", f"at most {mimg(total)}{saved}")]
        if self.known is None or speed is None:
            return [*lines, ("time", unknown)]
        wall = speed.wall_hours(total - work.final_kimg, work.final_kimg)
        beside = f"{self.at_once} at once" if self.at_once else "one training after another"
        hours = (
            f"about {_figure(speed.device_hours(total))} device-hours, {_figure(wall)} hours of the clock ({beside})"
        )
        return [*lines, ("time", f"{hours}, at {self.known.images_per_s:,.0f} images/s ({self.known.source})")]


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

    def heard(self, records: Sequence[TrialRecord]) -> KnownSpeed | None:
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
        self._speeds.measured(measured.images_per_s)
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


def mimg(kimg: float) -> str:
    """Images seen, in words; four digits."""
    return f"{_figure(kimg / 1000, 4)} Mimg"


def _figure(value: float, digits: int = 3) -> str:
    """A number to so many digits, never with an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:,.{digits}g}"


def costs(spent: Spent, work: Workload) -> dict[str, Any]:
    """What a search has cost, and what training every C of the grid would have cost, for the result."""
    return {
        "spent_mimg": spent.mimg,
        "grid_mimg": work.full_grid_kimg / 1000,
        "device_hours": spent.device_hours,
        "energy_kwh": spent.energy_kwh,
    }
