"""What a search trains, what it may spend on that, and what it has spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cedm_ray.config import SearchConfig
from cedm_ray.granularity.budget import Limits, Workload
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.training.records import TrialRecord

TIES_EXPECTED = 3
"""Numbers of clusters that are expected to tie, for which retrainings are set aside."""


def limits_of(config: SearchConfig) -> Limits:
    """The limits that the settings give."""
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


def costs(spent: Spent, work: Workload) -> dict[str, Any]:
    """What a search has cost, and what training every C of the grid would have cost, for the result."""
    return {
        "spent_mimg": spent.mimg,
        "grid_mimg": work.full_grid_kimg / 1000,
        "device_hours": spent.device_hours,
        "energy_kwh": spent.energy_kwh,
    }


def mimg(kimg: float) -> str:
    """Images seen, in words; four digits."""
    return f"{figure(kimg / 1000, 4)} Mimg"


def figure(value: float, digits: int = 3) -> str:
    """A number to so many digits, never with an exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:,.{digits}g}"
