"""Figures that a person looks at; none of them touches pyplot, so they can be drawn in any process."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cedm_ray.report.rows import Curve, Row, best_row, metric_title, one_count
from cedm_ray.report.ticks import log_clusters, log_scores, nice_ticks, plain_ticks

_BLUE, _RED, _GREY = "#1f5fa8", "#c0392b", "#777777"
_BASELINE_COLOURS = ("#8e5ea2", "#2a9d55", "#b8860b", "#444444")


def score_figure(
    rows: Sequence[Row],
    *,
    metric: str,
    c_max: int | None,
    utilization_cutoff: float,
    baselines: Mapping[str, float],
) -> Figure:
    """Score (above) and share of used clusters (below) against the number of clusters.

    Args:
        rows: Trials and probes; those without a score appear below only, those without r_C above only.
        metric: Name of the score, lower is better.
        c_max: The upper bound of the search, or None while it is unknown.
        utilization_cutoff: Value of r_C at which C_max was found.
        baselines: Scores of runs without clusters, by name, for example "unconditional".

    Returns:
        The figure, 8 by 7 inches.

    Raises:
        ValueError: If the scores are of different numbers of images.
    """
    count = one_count(rows)
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_scores(upper, rows, baselines)
    _draw_utilization(lower, rows, utilization_cutoff)
    for axes in (upper, lower):
        if c_max is not None:
            axes.axvline(c_max, color=_GREY, linestyle="-.", linewidth=1.2, label=f"$C_{{max}}$ = {c_max}", zorder=1)
        axes.grid(True, alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            # Beside the axes: within them no corner is free for every shape that the points can take.
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False, borderaxespad=0)
    figure.suptitle("Which number of clusters gives the best images", fontsize=13)
    upper.set_ylabel(f"{metric_title(metric, count)}, lower is better")
    lower.set_ylabel("share of clusters used, $r_C$")
    lower.set_xlabel("number of clusters, $C$")
    log_clusters(lower, [row.num_clusters for row in rows] + ([] if c_max is None else [c_max]))
    return figure


def _draw_scores(axes: Axes, rows: Sequence[Row], baselines: Mapping[str, float]) -> None:
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("complete", "trained to the full budget", {"marker": "o", "color": _BLUE}),
        ("stopped", "stopped early (last score)", {"marker": "o", "facecolors": "none", "edgecolors": _BLUE}),
        ("running", "still running (last score)", {"marker": "^", "facecolors": "none", "edgecolors": _GREY}),
        ("failed", "failed (last score)", {"marker": "x", "color": _RED}),
    )
    for state, label, style in styles:
        points = [(row.num_clusters, row.score) for row in rows if row.state == state and row.score is not None]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], s=42, label=label, zorder=3, **style)
    best = best_row(rows)
    if best is not None and best.score is not None:
        label = f"best: C = {best.num_clusters}, {best.score:.4g}"
        axes.scatter([best.num_clusters], [best.score], s=210, marker="*", color=_RED, label=label, zorder=4)
    for i, (name, value) in enumerate(baselines.items()):
        colour = _BASELINE_COLOURS[i % len(_BASELINE_COLOURS)]
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"{name}: {value:.4g}", zorder=2)
    shown = [row.score for row in rows if row.score is not None] + list(baselines.values())
    log_scores(axes, shown)


def _draw_utilization(axes: Axes, rows: Sequence[Row], cutoff: float) -> None:
    styles: tuple[tuple[bool, str, dict[str, Any]], ...] = (
        (True, "probe (clustering only)", {"marker": "D", "facecolors": "none", "edgecolors": _GREY, "s": 28}),
        (False, "trial", {"marker": "o", "color": _BLUE, "s": 36}),
    )
    for is_probe, label, style in styles:
        points = [
            (row.num_clusters, row.utilization_ratio)
            for row in rows
            if row.utilization_ratio is not None and (row.state == "probe") is is_probe
        ]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], label=label, zorder=3, **style)
    axes.axhline(cutoff, color=_RED, linestyle="--", linewidth=1.3, label=f"cutoff: {cutoff:g}", zorder=2)


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
            colour = _BASELINE_COLOURS[dashed % len(_BASELINE_COLOURS)]
            axes.plot(x, y, "--", color=colour, linewidth=1.6, label=curve.label)
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
