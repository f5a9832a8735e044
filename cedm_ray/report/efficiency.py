"""How many images a training needs to be as good as another one ever gets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cedm_ray.report.rows import Curve


@dataclass(frozen=True)
class Efficiency:
    """One training compared with another one, ``other``."""

    other: str
    target: float
    """Best score of the other."""
    other_kimg: float
    """Where the other reaches it."""
    own_kimg: float | None
    """Where the one reaches it, None where it never does."""
    at_least: bool
    """Whether the one was as good at its first report already, so that it may have been before."""

    @property
    def factor(self) -> float | None:
        """How many times fewer images the one needs (more where it is below 1), None where it never gets there."""
        return None if self.own_kimg is None else self.other_kimg / self.own_kimg

    def __str__(self) -> str:
        if self.factor is None:
            return "n.a."
        return f"{'≥ ' if self.at_least else ''}{self.factor:.3g}"

    def sentence(self) -> str:
        """In words, for "C = 20 ..."."""
        what = f"as good as {self.other} at its best ({self.target:.4g})"
        if self.factor is None:
            return f"is never {what}"
        if self.factor >= 1:
            return f"is {what} with {'at least ' if self.at_least else ''}{self.factor:.3g} times fewer images"
        return f"is {what} with {'at most ' if self.at_least else ''}{1 / self.factor:.3g} times as many images"


def sample_efficiency(own: Curve, other: Curve) -> Efficiency | None:
    """The sample-efficiency factor of a training over another one.

    Between two reports ln score is taken as linear in ln kimg.

    Args:
        own: Scores of the one, lower is better, ascending in kimg.
        other: Scores of the other.

    Returns:
        The comparison, None where one of the two has no score.

    Source: arXiv 2403.00570, Figs. 2 and 9.
    """
    if not own.points or not other.points:
        return None
    other_kimg, target = min(other.points, key=lambda point: (point[1], point[0]))
    reached = kimg_to_reach(own.points, target)
    return Efficiency(other.label, target, other_kimg, reached, own.points[0][1] <= target)


def kimg_to_reach(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (kimg, score) first comes down to a score.

    Args:
        points: Ascending in kimg, with kimg above 0.
        target: The score to reach.

    Returns:
        The kimg by linear interpolation of the logarithms, the first one where the curve begins at or below the target,
        None where it stays above. Scores that have no logarithm are not interpolated: the later report counts.
    """
    before: tuple[float, float] | None = None
    for kimg, score in points:
        if score <= target:
            if before is None or score <= 0:
                return kimg
            share = math.log(before[1] / target) / math.log(before[1] / score)
            return before[0] * math.exp(share * math.log(kimg / before[0]))
        before = kimg, score
    return None
