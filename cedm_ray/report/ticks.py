"""Logarithmic axes with round, readable numbers."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

_LOG_FROM = 4.0  # ratio of the largest to the smallest score above which a linear axis would flatten the best ones
_EVEN_BELOW = 2.0


def log_clusters(axes: Axes, clusters: Sequence[int]) -> None:
    """Make x a logarithmic axis for numbers of clusters, with room on both sides."""
    low, high = (min(clusters), max(clusters)) if clusters else (1, 10)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    plain_ticks(axes.xaxis, nice_ticks(low, high, whole=True))


def log_scores(axes: Axes, scores: Sequence[float]) -> None:
    """Make y a logarithmic axis if the scores are spread widely."""
    if scores and min(scores) > 0 and max(scores) > _LOG_FROM * min(scores):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis, nice_ticks(min(scores), max(scores)))


def log_axis(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic with room on both sides; where a value has no logarithm, it stays linear."""
    if values and min(values) > 0:
        axis = axes.xaxis if which == "x" else axes.yaxis
        low, high = min(values), max(values)
        margin = max((high / low) ** 0.08, 1.08)
        axes.set(**{f"{which}scale": "log", f"{which}lim": (low / margin, high * margin)})
        plain_ticks(axis, nice_ticks(low, high))


def plain_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Put ticks at these values only, written as plain numbers."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers around ``[low, high]``: 1, 1.5, 2, 3, 5 and 7 times powers of ten, fewer on a wide range.

    A range of less than a factor of two gets even steps, of whole numbers only where these are asked for.
    """
    if high < _EVEN_BELOW * low:
        locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        return [float(tick) for tick in locator.tick_values(low, high) if tick > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    return [factor * 10.0**decade for decade in decades for factor in factors]
