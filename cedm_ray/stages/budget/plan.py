"""The plan that is printed before anything starts: what a search is going to train, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.budget import Speed, Workload, check_budget, search_kimg
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.budget.speeds import KnownSpeed, Speeds
from cedm_ray.stages.budget.spending import TIES_EXPECTED, figure, limits_of, mimg, workload


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
            budget = f"at most {mimg(allowed)}, {figure(trainings)} whole trainings, {share:.0%} of the grid"
        points = f"{work.grid_points} numbers of clusters, log-spaced from 2 to the upper end of C_max's interval"
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
        hours = f"about {figure(speed.device_hours(total))} device-hours, {figure(wall)} hours of the clock ({beside})"
        return [*lines, ("time", f"{hours}, at {self.known.images_per_s:,.0f} images/s ({self.known.source})")]


def plan_of(config: SearchConfig, storage: Path, resolution: int, *, has_labels: bool) -> Plan:
    """What a search of such images is going to train, as far as that is known before the cluster is.

    Args:
        config: The settings.
        storage: The storage folder, which keeps how fast earlier trainings were.
        resolution: Side of the images.
        has_labels: Whether the images have labels.
    """
    work = workload(config, has_labels=has_labels)
    known = Speeds(storage, config, resolution).known(gpus=config.resources.gpus_per_worker != 0)
    return Plan(config, work, known, config.granularity.max_concurrent)
