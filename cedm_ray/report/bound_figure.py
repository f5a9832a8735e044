"""The figure of the search for C_max, by which a person judges whether the bound can be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from cedm_ray.errors import require
from cedm_ray.report.colours import BLUE, DARK, ORANGE, RED
from cedm_ray.report.ticks import log_clusters, plain_ticks

Fidelity = Literal["full", "low"]

_STYLES: tuple[tuple[Fidelity, str, str, str], ...] = (
    ("low", "probe at low fidelity", "D", ORANGE),
    ("full", "probe at full fidelity", "o", BLUE),
)
# Unused share, in units of the cutoff's, below which a linear axis would leave too little height to the cutoff.
_COMPRESS_FROM = 4.0
_TICKS = (0.0, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 25.0, 50.0, 100.0)  # in the same units
_LEAST_UNUSED = 0.01  # stands in for 1 - cutoff where the cutoff is 1 or nearly so


@dataclass(frozen=True)
class ProbePoint:
    """One reading of the share of used clusters."""

    num_clusters: int
    """Clusters that were available, C."""
    ratio: float
    """Share of them that hold an image, r_C in ``[0, 1]``."""
    fidelity: Fidelity
    """A probe clusters fully or cheaply."""

    def __post_init__(self) -> None:
        require(self.num_clusters >= 1, "num_clusters", self.num_clusters, "be at least 1")
        require(0 <= self.ratio <= 1, "ratio", self.ratio, "lie in [0, 1]")
        known = get_args(Fidelity)
        require(self.fidelity in known, "fidelity", repr(self.fidelity), f"be one of {', '.join(known)}")


@dataclass(frozen=True)
class FittedCurve:
    """r_C as fitted, ``ratio`` with its band from ``low`` to ``high`` at each ``num_clusters``, ascending."""

    num_clusters: tuple[float, ...]
    ratio: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("ratio", "low", "high"):
            due, count = len(self.num_clusters), len(getattr(self, name))
            require(count == due, f"the number of values in {name}", count, f"be {due}, one for each num_clusters")


def bound_figure(
    points: Sequence[ProbePoint],
    *,
    curve: FittedCurve | None,
    cutoff: float,
    c_max: int | None,
    interval: tuple[int, int | None] | None,
    confidence: float | None,
) -> Figure:
    """Share of used clusters against the number of clusters: every reading, the fit, the cutoff and C_max.

    The axes show the numbers of clusters that were tried, C_max and its interval; the curve is cut off outside them.

    Args:
        points: Readings, in any order; several at one number of clusters darken one another.
        curve: What was fitted to them, or None.
        cutoff: Value of r_C at which C_max is found, in ``(0, 1]``.
        c_max: The upper bound that was found, or None while it is unknown.
        interval: Ends of the interval of C_max, the upper one None while it is open; None where there is none.
        confidence: Confidence of the interval in ``(0, 1)``, or None where it has none.

    Returns:
        The figure, 8 by 5 inches.

    Raises:
        ValueError: If a value lies outside its bounds.
    """
    require(0 < cutoff <= 1, "cutoff", cutoff, "lie in (0, 1]")
    require(c_max is None or c_max >= 1, "c_max", c_max, "be at least 1")
    require(confidence is None or 0 < confidence < 1, "confidence", confidence, "lie in (0, 1)")
    lower, upper = (None, None) if interval is None else interval
    ends = [end for end in (lower, upper) if end is not None]
    require(ends == sorted(ends) and min(ends, default=1) >= 1, "interval", interval, "ascend from at least 1")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    log_clusters(axes, [point.num_clusters for point in points] + ends + ([] if c_max is None else [c_max]))
    _scale_ratios(axes, [point.ratio for point in points] + _in_sight(axes, curve), cutoff)
    _draw_points(axes, points)
    if curve is not None:
        _draw_curve(axes, curve)
    axes.axhline(cutoff, color=RED, linestyle="--", linewidth=1.3, label=f"cutoff: {cutoff:g}", zorder=2)
    if c_max is not None:
        axes.axvline(c_max, color=DARK, linestyle="-.", linewidth=1.2, label=f"$C_{{max}}$ = {c_max}", zorder=2)
    if lower is not None:
        _shade(axes, lower, upper, _interval_name(confidence))
    axes.grid(True, alpha=0.25, linewidth=0.6)
    # Beside the axes: within them no corner is free for every shape that the points can take.
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False, borderaxespad=0)
    axes.set_xlabel("number of clusters, $C$")
    figure.suptitle(_title(c_max, interval, confidence), fontsize=13)
    return figure


def _draw_points(axes: Axes, points: Sequence[ProbePoint]) -> None:
    for fidelity, label, marker, colour in _STYLES:
        chosen = [point for point in points if point.fidelity == fidelity]
        if chosen:
            axes.scatter(
                [point.num_clusters for point in chosen],
                [point.ratio for point in chosen],
                s=28,
                marker=marker,
                facecolors=[to_rgba(colour, 0.3)],  # equal readings add up to a darker marker
                edgecolors=[colour],
                linewidths=1.0,
                label=f"{label} ({len(chosen)})",
                zorder=4,
            )


def _draw_curve(axes: Axes, curve: FittedCurve) -> None:
    x = curve.num_clusters
    axes.plot(x, curve.ratio, color=BLUE, linewidth=1.6, label="fitted curve", zorder=3)
    axes.fill_between(x, curve.low, curve.high, color=BLUE, alpha=0.15, linewidth=0, label="band of the fit", zorder=1)


def _shade(axes: Axes, lower: int, upper: int | None, name: str) -> None:
    right = axes.get_xlim()[1] if upper is None else upper
    label = name if upper is not None else f"{name}, open"
    axes.axvspan(lower, right, facecolor=to_rgba(DARK, 0.12), edgecolor=to_rgba(DARK, 0.3), label=label, zorder=0)


def _in_sight(axes: Axes, curve: FittedCurve | None) -> list[float]:
    left, right = axes.get_xlim()
    pairs = () if curve is None else zip(curve.num_clusters, curve.ratio, strict=True)
    return [min(max(ratio, 0.0), 1.0) for num_clusters, ratio in pairs if left <= num_clusters <= right]


def _scale_ratios(axes: Axes, ratios: Sequence[float], cutoff: float) -> None:
    """Make y show all ratios, yet leave a quarter of the height or so to those above the cutoff."""
    unit = max(1 - cutoff, _LEAST_UNUSED)
    # With 2 units the cutoff stands half way up where no reading lies far below it.
    most_unused = max(1 - min(ratios, default=1.0), min(2 * unit, 1.0))
    label = "share of clusters used, $r_C$"
    if most_unused <= _COMPRESS_FROM * unit:
        axes.set_ylim(1 - 1.06 * most_unused, 1 + 0.06 * most_unused)
    else:
        # Linear in r_C above the cutoff, logarithmic in the unused share 1 - r_C far below it.
        axes.set_yscale("function", functions=(lambda r: -np.arcsinh((1 - r) / unit), lambda y: 1 + unit * np.sinh(y)))
        height = math.asinh(most_unused / unit)
        axes.set_ylim(1 - unit * math.sinh(1.06 * height), 1 + unit * math.sinh(0.06 * height))
        plain_ticks(axes.yaxis, [1 - unit * factor for factor in _TICKS if unit * factor <= 1])
        label += " (compressed below the cutoff)"
    axes.set_ylabel(label)


def _interval_name(confidence: float | None) -> str:
    return "interval" if confidence is None else f"{100 * confidence:g} % interval"


def _title(c_max: int | None, interval: tuple[int, int | None] | None, confidence: float | None) -> str:
    title = "$C_{max}$ not found yet" if c_max is None else f"$C_{{max}}$ = {c_max}"
    if interval is None:
        return title
    lower, upper = interval
    ends = f"from {lower}, open above" if upper is None else f"[{lower}, {upper}]"
    return f"{title}, {_interval_name(confidence)} {ends}"
