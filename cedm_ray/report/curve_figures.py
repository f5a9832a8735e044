"""Scores against the images seen in training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cedm_ray.report.colours import BASELINE_COLOURS, BLUE
from cedm_ray.report.efficiency import Efficiency, sample_efficiency
from cedm_ray.report.rows import Curve, metric_title, one_count
from cedm_ray.report.ticks import log_axis, log_scores, nice_ticks, plain_ticks


def curves_figure(curves: Sequence[Curve], *, metric: str) -> Figure:
    """Score against the images seen in training, one line per number of clusters and a dashed one per baseline.

    Args:
        curves: Runs; those with ``num_clusters`` None are baselines.
        metric: Name of the score, lower is better.

    Returns:
        The figure, 8 by 5 inches.

    Raises:
        ValueError: If the scores are of different numbers of images.
    """
    count = one_count(curves)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    clusters = [curve.num_clusters for curve in curves if curve.num_clusters is not None]
    norm = LogNorm(min(clusters, default=1), max(max(clusters, default=1), min(clusters, default=1) + 1))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))  # without its palest yellow
    dashed = 0
    for curve in sorted(curves, key=lambda curve: curve.num_clusters or 0):
        x, y = [point[0] for point in curve.points], [point[1] for point in curve.points]
        if curve.num_clusters is None:
            colour = BASELINE_COLOURS[dashed % len(BASELINE_COLOURS)]
            axes.plot(x, y, "--o", color=colour, linewidth=1.6, markersize=3, label=curve.label)
            dashed += 1
        else:
            axes.plot(x, y, "-o", color=colours(norm(curve.num_clusters)), linewidth=1.5, markersize=3.5)
    if clusters:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="number of clusters, $C$", pad=0.02)
        plain_ticks(bar.ax.yaxis, nice_ticks(min(clusters), max(clusters)))
    shown = [score for curve in curves for _, score in curve.points]
    log_scores(axes, shown)
    axes.grid(True, alpha=0.25, linewidth=0.6)
    if dashed:
        axes.legend(fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("images seen in training (kimg)")
    axes.set_ylabel(f"{metric_title(metric, count)}, lower is better")
    axes.set_title("How each number of clusters learns", fontsize=13)
    return figure


def efficiency_figure(own: Curve, others: Sequence[Curve], *, metric: str) -> Figure:
    """The best number of clusters against other trainings: how many times fewer images it needs to be as good.

    Both axes are logarithmic, so that the lines between the reports are those of the factor's interpolation.

    Args:
        own: Scores of the best number of clusters, through its last training.
        others: Scores of what it is compared with.
        metric: Name of the score, lower is better.

    Returns:
        The figure, 8 by 6 inches.

    Raises:
        ValueError: If the scores are of different numbers of images.
    """
    count = one_count([own, *others])
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_mimg(own), "-o", color=BLUE, linewidth=1.8, markersize=4.5, label=own.label, zorder=4)
    for i, other in enumerate(others):
        compared = sample_efficiency(own, other)
        colour = BASELINE_COLOURS[i % len(BASELINE_COLOURS)]
        label = f"{other.label}, factor {compared or 'n.a.'}"
        axes.plot(*_mimg(other), "--o", color=colour, linewidth=1.6, markersize=4, label=label, zorder=3)
        if compared is not None:
            _draw_factor(axes, compared, colour)
    points = [point for curve in (own, *others) for point in curve.points]
    log_axis(axes, "x", [kimg / 1000 for kimg, _ in points])
    log_axis(axes, "y", [score for _, score in points])
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.set_xlabel("images seen in training (millions)")
    axes.set_ylabel(f"{metric_title(metric, count)}, lower is better")
    axes.set_title(f"How many times fewer images {own.label} needs to be as good", fontsize=13)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _mimg(curve: Curve) -> tuple[list[float], list[float]]:
    return [kimg / 1000 for kimg, _ in curve.points], [score for _, score in curve.points]


def _draw_factor(axes: Axes, compared: Efficiency, colour: str) -> None:
    """An arrow from where the other is at its best to where the one is as good."""
    if compared.own_kimg is None:
        return
    start, end = (compared.other_kimg / 1000, compared.target), (compared.own_kimg / 1000, compared.target)
    arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=2)
    middle = (start[0] * end[0]) ** 0.5, compared.target
    ground = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axes.annotate(str(compared), middle, **place, color=colour, fontsize=10, bbox=ground, zorder=5)
