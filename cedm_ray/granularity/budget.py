"""What a search may train, from what it was given: images, hours of its devices, or hours of the clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_UP, Context

from cedm_ray.errors import UserError

RESERVE = 1.05
"""Hours are planned with so much more than the measured speed asks for: evaluation, start and checkpoints take time."""


@dataclass(frozen=True)
class Limits:
    """What a whole search may use; None: no such limit."""

    mimg: float | None = None
    device_hours: float | None = None
    wall_hours: float | None = None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in (self.mimg, self.device_hours, self.wall_hours))


@dataclass(frozen=True)
class Workload:
    """What a search trains, in thousands of images seen."""

    grid_points: int
    """Numbers of clusters of the full grid, all of which could be tried."""
    total_kimg: int
    """One training to the search's budget."""
    num_baselines: int
    """Trainings that are always made."""
    num_confirmed: int
    """Retrainings for which images are set aside."""
    final_kimg: int
    """From the end of the best training to its full budget."""
    share: float
    """Of the full grid, where there is no limit."""

    @property
    def grid_kimg(self) -> int:
        return self.grid_points * self.total_kimg

    @property
    def baselines_kimg(self) -> int:
        return self.num_baselines * self.total_kimg

    @property
    def around_kimg(self) -> int:
        """Everything but the search over C."""
        return (self.num_baselines + self.num_confirmed) * self.total_kimg + self.final_kimg

    @property
    def full_grid_kimg(self) -> int:
        """What it would cost to train every C of the grid to the end."""
        return self.grid_kimg + self.around_kimg


@dataclass(frozen=True)
class Speed:
    """How fast one training is."""

    images_per_s: float
    devices: float
    """Of one training: GPUs, or processes on a CPU."""
    at_once: int = 1
    """Trainings side by side."""

    def device_hours(self, kimg: float) -> float:
        return kimg * 1000 / self.images_per_s / 3600 * self.devices

    def wall_hours(self, side_by_side_kimg: float, alone_kimg: float) -> float:
        """Hours of the clock for trainings that can run side by side, and for one that runs alone."""
        return (side_by_side_kimg / self.at_once + alone_kimg) * 1000 / self.images_per_s / 3600


def search_kimg(work: Workload, limits: Limits, speed: Speed | None, *, passed_hours: float = 0.0) -> float:
    """What the search over C may train within all limits, in thousands of images seen.

    Args:
        work: What is to be trained around it.
        limits: What was given.
        speed: Measured or expected; None while it is unknown, when only ``mimg`` can be planned with.
        passed_hours: Hours of the clock that went by without training.

    Returns:
        At most the full grid; without limits the share of it, but at least one whole training.
    """
    if not limits.given:
        return max(work.share * work.grid_kimg, float(work.total_kimg))
    found = [float(work.grid_kimg)]
    if limits.mimg is not None:
        found.append(limits.mimg * 1000 - work.around_kimg)
    if speed is not None and limits.device_hours is not None:
        found.append(limits.device_hours / RESERVE / speed.device_hours(1) - work.around_kimg)
    if speed is not None and limits.wall_hours is not None:
        hours = (limits.wall_hours - passed_hours) / RESERVE
        beside = (hours / speed.wall_hours(0, 1) - work.final_kimg) * speed.at_once
        found.append(beside - (work.num_baselines + work.num_confirmed) * work.total_kimg)
    return min(found)


def check_budget(work: Workload, limits: Limits, speed: Speed | None) -> None:
    """Refuse a budget that does not even hold one training beside the baselines and the final training.

    Raises:
        UserError: If it does not.
    """
    one = work.total_kimg if work.grid_points else 0
    if search_kimg(work, limits, speed) >= one:
        return
    # The limit that is missed by most is named, so that rounding does not decide which ones are missed.
    needs = _needs(one + work.around_kimg, work.final_kimg, limits, speed)
    worst = max(needs, key=lambda need: (need.share, need.limit))
    subject = "one training and what stands around it" if one else "the trainings"
    raise UserError(
        f"budget.{worst.limit} is {worst.given:g}; {subject} {worst.words()}: raise it, "
        f"or lower final.total_kimg or granularity.total_kimg, or give --granularity.no-baselines"
    )


@dataclass(frozen=True)
class _Need:
    """What is needed of something that has a limit."""

    limit: str
    """Its setting."""
    given: float
    least: float
    """What is needed, in the unit of the limit."""
    verb: str
    unit: str

    @property
    def share(self) -> float:
        """Of the limit; above 1 where it is missed."""
        return self.least / self.given

    def words(self) -> str:
        return f"{self.verb} {_rounded_up(self.least)} {self.unit}"


def _needs(kimg: float, alone_kimg: float, limits: Limits, speed: Speed | None) -> Iterator[_Need]:
    """For each limit that is given and can be compared; ``alone_kimg`` of all images are seen by one training alone."""
    if limits.mimg is not None:
        yield _Need("mimg", limits.mimg, kimg / 1000, "see", "Mimg")
    if speed is None:
        return
    unit = f"hours at {speed.images_per_s:,.0f} images/s"
    if limits.device_hours is not None:
        yield _Need("gpu_hours", limits.device_hours, RESERVE * speed.device_hours(kimg), "take about", unit)
    if limits.wall_hours is not None:
        hours = RESERVE * speed.wall_hours(kimg - alone_kimg, alone_kimg)
        yield _Need("wall_hours", limits.wall_hours, hours, "take about", unit)


def _rounded_up(value: float) -> str:
    """Three digits, never less than the value: what a message asks for is enough."""
    return f"{Context(prec=3, rounding=ROUND_UP).create_decimal(repr(float(value))):f}"
