"""Whether early scores rank trainings as late ones do, which early stopping relies on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

MIN_RUNS = 4
"""Runs below which a rank correlation says nothing: three are in the same order by chance one time in six."""


@dataclass(frozen=True)
class RankAgreement:
    """How alike two rungs rank the runs that reached both."""

    low_kimg: int
    high_kimg: int
    spearman: float
    """Rank correlation, in [-1, 1]."""
    num_runs: int

    def sentence(self) -> str:
        """The finding in words."""
        return (
            f"the scores of {self.num_runs} trainings at {self.low_kimg:,} and at {self.high_kimg:,} kimg have a rank "
            f"correlation of {self.spearman:.2f} (1 is the same order, 0 none in common)"
        )


def rank_agreement(readings: Mapping[Hashable, Mapping[int, float]], rungs: Iterable[int]) -> tuple[RankAgreement, ...]:
    """Spearman's rank correlation between the scores at each pair of rungs.

    Early stopping trusts that an early rung ranks runs as a late one does. Only runs that reached both rungs can be
    compared, and those are the ones that early stopping took for good, so that the correlation is lower than it would
    be with all runs.

    Args:
        readings: Score of each run by kimg; values that are not finite do not count.
        rungs: Which kimg to compare.

    Returns:
        Pairs of rungs that at least 4 runs reached, ascending; none for a rung at which all scores are equal.
    """
    # Not at the top: the driver alone asks for it, once a search.
    from scipy.stats import spearmanr

    found = []
    for low, high in combinations(sorted(set(rungs)), 2):
        both = [
            (run[low], run[high])
            for run in readings.values()
            if low in run and high in run and math.isfinite(run[low]) and math.isfinite(run[high])
        ]
        if len(both) < MIN_RUNS or any(len(set(scores)) == 1 for scores in zip(*both, strict=True)):
            continue
        spearman = float(spearmanr(*zip(*both, strict=True)).statistic)
        found.append(RankAgreement(low, high, spearman, len(both)))
    return tuple(found)


def disagreement(agreements: Sequence[RankAgreement], least: float = 0.5) -> RankAgreement | None:
    """The earlier rung whose ranking is least like the highest rung's, if their correlation is below ``least``."""
    highest = max((each.high_kimg for each in agreements), default=0)
    worst = min(
        (each for each in agreements if each.high_kimg == highest), key=lambda each: each.spearman, default=None
    )
    return worst if worst is not None and worst.spearman < least else None
