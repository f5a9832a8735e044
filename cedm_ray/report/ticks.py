"""Logarithmic axes with round, readable numbers."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

_LOG_FROM = 4.0  # ratio of the largest to the smallest score above which a linear axis would flatten the best ones


def log_clusters(axes: Axes, clusters: Sequence[int]) -> None:
    """Make x a logarithmic axis for numbers of clusters, with room on both sides."""
    low, high = (min(clusters), max(clusters)) if clusters else (1, 10)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    plain_ticks(axes.xaxis, nice_ticks(low, high))


def log_scores(axes: Axes, scores: Sequence[float]) -> None:
    """Make y a logarithmic axis if the scores are spread widely."""
    if scores and min(scores) > 0 and max(scores) > _LOG_FROM * min(scores):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, nice_ticks(min(scores), max(scores)))


def plain_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Put ticks at these values only, written as plain numbers."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers around ``[low, high]``: 1, 1.5, 2, 3, 5 and 7 times powers of ten, fewer on a wide range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors]
