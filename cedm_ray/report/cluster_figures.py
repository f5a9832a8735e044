"""Scores against the number of clusters; no figure touches pyplot, so that any process can draw them."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from cedm_ray.report.colours import BASELINE_COLOURS, BLUE, DARK, GREY, ORANGE, RED
from cedm_ray.report.rows import Row, TieSet, best_row, metric_title, one_count
from cedm_ray.report.ticks import log_clusters, log_scores

_STATES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("complete", "trained to the full budget", {"marker": "o", "color": BLUE}),
    ("stopped", "stopped early (last score)", {"marker": "o", "facecolors": "none", "edgecolors": BLUE}),
    ("paused", "paused (last score)", {"marker": "s", "facecolors": "none", "edgecolors": GREY}),
    ("running", "still running (last score)", {"marker": "^", "facecolors": "none", "edgecolors": GREY}),
    ("failed", "failed (last score)", {"marker": "x", "color": RED}),
)
_SHOWN_OF_TIE_SET = 6  # a longer list would leave the axes no width


def score_figure(
    rows: Sequence[Row],
    *,
    metric: str,
    c_max: int | None,
    utilization_cutoff: float,
    baselines: Mapping[str, float],
    interval: tuple[int, int] | None = None,
    tie_set: TieSet | None = None,
    best: int | None = None,
) -> Figure:
    """Score (above) and share of used clusters (below) against the number of clusters.

    Args:
        rows: Trials and probes; those without a score appear below only, those without r_C above only.
        metric: Name of the score, lower is better.
        c_max: The upper bound of the search, or None while it is unknown.
        utilization_cutoff: Value of r_C at which C_max was found.
        baselines: Scores of runs without clusters, by name, for example "unconditional".
        interval: Ends of the interval of C_max, or None where there is none.
        tie_set: Numbers of clusters that are as good as the best one, or None.
        best: The number of clusters that was decided for; None while that is open: the lowest score is starred then.

    Returns:
        The figure, 9 by 7 inches.

    Raises:
        ValueError: If the scores are of different numbers of images.
    """
    count = one_count(rows)
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_scores(upper, rows, baselines, tie_set, best)
    _draw_utilization(lower, rows, utilization_cutoff)
    for axes in (upper, lower):
        _draw_bound(axes, c_max, interval)
        _finish(axes)
    figure.suptitle("Which number of clusters gives the best images", fontsize=13)
    upper.set_ylabel(f"{metric_title(metric, count)}, lower is better")
    lower.set_ylabel("share of clusters used, $r_C$")
    lower.set_xlabel("number of clusters, $C$")
    log_clusters(lower, _clusters(rows, c_max, interval))
    return figure


def metrics_figure(
    rows: Mapping[str, Sequence[Row]],
    *,
    baselines: Mapping[str, Mapping[str, float]],
    c_max: int | None,
    interval: tuple[int, int] | None = None,
    pareto: Sequence[int] | None = None,
) -> Figure:
    """Several scores beside each other against the number of clusters, one panel for each.

    Args:
        rows: Trials by metric, lower is better.
        baselines: Scores of runs without clusters, by metric and by name.
        c_max: The upper bound of the search, or None while it is unknown.
        interval: Ends of the interval of C_max, or None where there is none.
        pareto: Numbers of clusters that no other one beats in all metrics, or None where they are not known.

    Returns:
        The figure, 5 inches wide for each metric.

    Raises:
        ValueError: If the scores of a metric are of different numbers of images.
    """
    figure = Figure(figsize=(5 * len(rows), 6), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (metric, shown) in zip(panels, rows.items(), strict=True):
        _draw_scores(axes, shown, baselines.get(metric, {}))
        if pareto is not None:
            complete = [row for row in shown if row.state == "complete" and row.train_seed is None]
            front = [row for row in complete if row.num_clusters in pareto]
            _draw_rings(axes, front, f"Pareto front ({len(set(pareto))})")
        _draw_bound(axes, c_max, interval)
        axes.grid(True, alpha=0.25, linewidth=0.6)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=9, frameon=False, ncols=2)
        axes.set_title(metric_title(metric, one_count(shown)), fontsize=12)
        axes.set_xlabel("number of clusters, $C$")
        log_clusters(axes, _clusters(shown, c_max, interval))
    panels[0].set_ylabel("lower is better")
    figure.suptitle("The same trainings in the eyes of each metric", fontsize=13)
    return figure


def _draw_scores(
    axes: Axes,
    rows: Sequence[Row],
    baselines: Mapping[str, float],
    tie_set: TieSet | None = None,
    best: int | None = None,
) -> None:
    """The scores of trials against C: the state in the marker, the best starred, repeats small, the tie set filled."""
    scored = [row for row in rows if row.score is not None]
    if tie_set is not None and tie_set.low is not None and tie_set.high is not None:
        share = f"within {100 * tie_set.margin:.2g} % of the best"
        axes.axhspan(tie_set.low, tie_set.high, color=ORANGE, alpha=0.18, linewidth=0, label=share, zorder=0)
    for state, label, style in _STATES:
        points = [row for row in scored if row.state == state and row.train_seed is None]
        _scatter(axes, points, label, {"s": 42, "zorder": 3, **style})
    repeats = [row for row in scored if row.train_seed is not None]
    _scatter(axes, repeats, "trained again, another seed", {"s": 90, "zorder": 5, "color": DARK, "marker": "_"})
    spread = [row for row in scored if len(row.sets) > 1]
    if spread:
        ends = [min(row.sets) for row in spread], [max(row.sets) for row in spread]
        clusters = [row.num_clusters for row in spread]
        axes.vlines(clusters, *ends, color=BLUE, linewidth=1.2, label="range over sets of images", zorder=2)
    if tie_set is not None:
        _draw_tie_set(axes, scored, tie_set)
    starred = best_row(rows, best)
    if starred is not None and starred.score is not None:
        label = f"best: C = {starred.num_clusters}, {starred.score:.4g}"
        axes.scatter([starred.num_clusters], [starred.score], s=290, marker="*", color=RED, label=label, zorder=3.2)
    for i, (name, value) in enumerate(baselines.items()):
        colour = BASELINE_COLOURS[i % len(BASELINE_COLOURS)]
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"{name}: {value:.4g}", zorder=2)
    shown = [score for row in scored for score in (row.score or 0.0, *row.sets)] + list(baselines.values())
    log_scores(axes, shown)


def _scatter(axes: Axes, rows: Sequence[Row], label: str, style: Mapping[str, Any]) -> None:
    if rows:
        axes.scatter([row.num_clusters for row in rows], [row.score or 0.0 for row in rows], label=label, **style)


def _draw_tie_set(axes: Axes, scored: Sequence[Row], tie_set: TieSet) -> None:
    members = [row for row in scored if row.num_clusters in tie_set.clusters and row.train_seed is None]
    names = [str(clusters) for clusters in sorted(tie_set.clusters)]
    if len(names) > _SHOWN_OF_TIE_SET:
        names = [*names[: _SHOWN_OF_TIE_SET - 2], "…", names[-1]]
    style = {"s": 42, "zorder": 4, "facecolors": ORANGE, "edgecolors": DARK, "linewidths": 0.8}
    _scatter(axes, members, f"tie set: C = {', '.join(names)}", style)
    smallest = [row for row in members if row.num_clusters == tie_set.smallest]
    _draw_rings(axes, smallest, f"its smallest: C = {tie_set.smallest}")


def _draw_rings(axes: Axes, rows: Sequence[Row], label: str) -> None:
    style = {"s": 230, "zorder": 3.1, "facecolors": "none", "edgecolors": DARK, "linewidths": 1.3, "marker": "o"}
    _scatter(axes, rows, label, style)


def _draw_utilization(axes: Axes, rows: Sequence[Row], cutoff: float) -> None:
    styles: tuple[tuple[bool, str, dict[str, Any]], ...] = (
        (True, "probe (clustering only)", {"marker": "D", "facecolors": "none", "edgecolors": GREY, "s": 28}),
        (False, "trial", {"marker": "o", "color": BLUE, "s": 36}),
    )
    for is_probe, label, style in styles:
        points = [
            (row.num_clusters, row.utilization_ratio)
            for row in rows
            if row.utilization_ratio is not None and (row.state == "probe") is is_probe and row.train_seed is None
        ]
        if points:
            axes.scatter([x for x, _ in points], [y for _, y in points], label=label, zorder=3, **style)
    axes.axhline(cutoff, color=RED, linestyle="--", linewidth=1.3, label=f"cutoff: {cutoff:g}", zorder=2)


def _draw_bound(axes: Axes, c_max: int | None, interval: tuple[int, int] | None) -> None:
    """C_max as a line, and its interval as a shade."""
    if c_max is not None:
        axes.axvline(c_max, color=GREY, linestyle="-.", linewidth=1.2, label=f"$C_{{max}}$ = {c_max}", zorder=1)
    if interval is not None:
        label = f"interval of $C_{{max}}$: [{interval[0]}, {interval[1]}]"
        axes.axvspan(*interval, facecolor=to_rgba(DARK, 0.1), edgecolor=to_rgba(DARK, 0.25), label=label, zorder=0)


def _clusters(rows: Sequence[Row], c_max: int | None, interval: tuple[int, int] | None) -> list[int]:
    bounds = [] if c_max is None else [c_max]
    return [row.num_clusters for row in rows] + bounds + list(interval or ())


def _finish(axes: Axes) -> None:
    axes.grid(True, alpha=0.25, linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        # Beside the axes: within them no corner is free for every shape that the points can take.
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, frameon=False, borderaxespad=0)
