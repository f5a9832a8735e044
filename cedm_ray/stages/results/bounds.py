"""The bounds of the search over C that clustering alone has found."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cedm_ray.clustering.probes import Fidelity
from cedm_ray.report.bound_figure import FittedCurve


@dataclass(frozen=True)
class ProbeRecord:
    """A probe that is done."""

    num_clusters: int
    ratio: float
    """Utilization ratio r_C: with the fit the mean over the heads, with the paper's rule that of the chosen head."""
    fidelity: Fidelity
    seed: int
    num_heads: int
    epochs: int

    @property
    def work(self) -> int:
        """Epochs times heads that were trained."""
        return self.epochs * self.num_heads


@dataclass(frozen=True)
class UpperBound:
    """What clustering alone says: no C at or above ``end`` is worth training."""

    c_max: int
    interval: tuple[int, int] | None
    """Where C_max lies, with the probability ``confidence``; with the paper's rule its last bracket; None where C_max
    is given."""
    confidence: float | None
    outcome: str
    """``found``, ``out_of_probes`` where the interval is wider than wanted, ``capped`` where even the largest number of
    clusters is used well, or ``given`` by the settings."""
    probes: tuple[ProbeRecord, ...] = ()
    """In the order in which they came."""
    curve: FittedCurve | None = None
    """The fitted mean of r_C."""

    @property
    def end(self) -> int:
        """C is searched below this: the upper end of the interval."""
        return self.c_max if self.interval is None else max(self.c_max, self.interval[1])

    def sentence(self, full_work: int) -> str:
        """In words.

        Args:
            full_work: Epochs times heads of a full probe.
        """
        if self.interval is None:
            return f"C_max is {self.c_max} (as given)"
        low, high = self.interval
        sure = "" if self.confidence is None else f"{self.confidence:.0%} "
        cost = sum(probe.work for probe in self.probes) / full_work
        wide = ", wider than wanted: bound.max-probes are spent" if self.outcome == "out_of_probes" else ""
        return (
            f"C_max is {self.c_max}, {sure}interval [{low}, {high}]{wide} "
            f"(probes: {len(self.probes)}, the work of {cost:.3g} full ones)"
        )


@dataclass(frozen=True)
class LowerBound:
    """Clusters that are used at gamma 1, whatever number is given."""

    used: tuple[tuple[int, int], ...]
    """Clusters given, C, and used, C_u, one for each overestimate."""

    @property
    def mean(self) -> float:
        return statistics.fmean(num_used for _, num_used in self.used)

    @property
    def std(self) -> float:
        """Standard deviation over the overestimates (0 for one)."""
        return statistics.stdev([num_used for _, num_used in self.used]) if len(self.used) > 1 else 0.0

    @property
    def start(self) -> int:
        """C is searched from here: the mean, in whole clusters."""
        return max(2, round(self.mean))

    def sentence(self) -> str:
        """In words."""
        given = ", ".join(str(clusters) for clusters, _ in self.used)
        return f"at gamma 1 TEMI uses {self.mean:.4g} clusters (deviation {self.std:.2g}) when it is given {given}"
