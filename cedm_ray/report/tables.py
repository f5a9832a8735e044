"""Tables of trials and probes, for the terminal and for a spreadsheet."""

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.table import Table

from cedm_ray.report.rows import Row, ScoreRow, metric_title, one_count


def trials_table(rows: Sequence[Row], metric: str, best: int | None, grouping: str = "temi") -> Table:
    """All trials, ordered by the number of clusters, for the terminal; 80 columns are enough.

    Args:
        rows: Trials; probes are left out.
        metric: Name of the score, lower is better.
        best: Number of clusters to mark with a star, or None.
        grouping: What makes those clusters.

    Returns:
        The table; print it with a ``rich.console.Console``.

    Raises:
        ValueError: If the scores are of different numbers of images.
    """
    one_count(rows)
    table = _table("Trials by number of clusters")
    for i, name in enumerate(("C", "r_C", "kimg", metric_title(metric), "state", "grouping")):
        table.add_column(name, justify="right" if i < 4 else "left", no_wrap=i < 5, overflow="fold")
    for row in _ordered(rows, probes=False):
        is_best = _is_best(row, best, grouping)
        clusters, *others = _cells(row)
        table.add_row(f"* {clusters}" if is_best else clusters, *others, style="bold" if is_best else None)
    if best is not None:
        table.caption = "* best number of clusters"
    return table


def probes_table(
    rows: Sequence[Row],
    *,
    utilization_cutoff: float,
    c_max: int | None,
    interval: tuple[int, int | None] | None = None,
) -> Table:
    """All that is known of r_C, ordered by the number of clusters: probes, and the clusterings of trials.

    Args:
        rows: Probes and trials; those without r_C are left out. Fidelity and seed are columns where a row has them.
        utilization_cutoff: Value of r_C at which C_max is found.
        c_max: The upper bound that was found, or None while it is unknown.
        interval: Ends of the interval of C_max, the upper one None while it is open; None where there is none.

    Returns:
        The table; print it with a ``rich.console.Console``.
    """
    table = _table("Share of clusters used")
    table.add_column("C", justify="right")
    table.add_column("r_C", justify="right")
    table.add_column("against the cutoff")
    # A training that repeats another one has its clustering.
    known = [row for row in rows if row.utilization_ratio is not None and row.train_seed is None]
    origins = _origins(known)
    for name in origins:
        table.add_column(name, justify="right" if name == "seed" else "left")
    for row in sorted(known, key=lambda row: (row.num_clusters, row.state, *_origin_key(row))):
        ratio = row.utilization_ratio or 0.0
        side = "above" if ratio > utilization_cutoff else "at or below"
        given = [getattr(row, name) for name in origins]
        table.add_row(str(row.num_clusters), f"{ratio:.4f}", side, *("-" if x is None else str(x) for x in given))
    table.caption = f"cutoff {utilization_cutoff:g}; C_max {'not found yet' if c_max is None else c_max}"
    if interval is not None:
        lower, upper = interval
        table.caption += f"; interval from {lower}, open above" if upper is None else f"; interval [{lower}, {upper}]"
    return table


def scores_table(scores: Sequence[ScoreRow], title: str = "Scores of the final model") -> Table:
    """Scores with what they were made from, in the given order, for the terminal."""
    table = _table(title)
    for name in ("score", "value", "+-", "detector", "images"):
        table.add_column(name, justify="left" if name in ("score", "detector") else "right")
    for score in scores:
        images = f"{score.num_images:,} against {score.num_reference:,}"
        table.add_row(
            score.metric,
            f"{score.value:.5g}",
            "" if score.std is None else f"{score.std:.2g}",
            score.detector,
            f"{score.num_sets} x {images}" if score.num_sets > 1 else images,
        )
    table.caption = "+-: over the sets of images, or over the subsets or splits of the metric"
    return table


def to_csv(rows: Sequence[Row], metric: str) -> str:
    """All rows as CSV at full precision; what is unknown is an empty field.

    Fidelity, seed and the seed of a repeated training are columns, the last ones, where a row has them.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    origins = _origins(rows)
    writer.writerow(["num_clusters", "utilization_ratio", "kimg", metric, "state", "grouping", *origins])
    for row in _ordered(rows):
        fields = [row.num_clusters, row.utilization_ratio, row.kimg, row.score, row.state, row.grouping]
        writer.writerow([*fields, *(getattr(row, name) for name in origins)])
    return out.getvalue()


def _origins(rows: Sequence[Row]) -> list[str]:
    """Which of the columns that tell rows of the same C apart are worth showing."""
    names = ("fidelity", "seed", "train_seed")
    return [name for name in names if any(getattr(row, name) is not None for row in rows)]


def _origin_key(row: Row) -> tuple[str, int, int]:
    return row.fidelity or "", -1 if row.seed is None else row.seed, -1 if row.train_seed is None else row.train_seed


def _is_best(row: Row, best: int | None, grouping: str) -> bool:
    complete = row.state == "complete" and row.train_seed is None
    return row.num_clusters == best and complete and row.grouping == grouping


def _table(title: str) -> Table:
    # Plain characters: the table also goes to log files and to terminals without Unicode.
    return Table(title=title, box=box.ASCII2, title_justify="left", caption_justify="left")


def _ordered(rows: Sequence[Row], *, probes: bool = True) -> list[Row]:
    return sorted(
        (row for row in rows if probes or row.state != "probe"),
        key=lambda row: (
            *(row.num_clusters, row.grouping, row.train_seed is not None, row.state, row.kimg),
            *_origin_key(row),
        ),
    )


def _cells(row: Row) -> list[str]:
    return [
        str(row.num_clusters),
        "-" if row.utilization_ratio is None else f"{row.utilization_ratio:.4f}",
        f"{row.kimg:,.0f}" if row.kimg >= 100 or row.kimg == int(row.kimg) else f"{row.kimg:.1f}",
        "-" if row.score is None else f"{row.score:.4g}",
        row.state if row.train_seed is None else f"{row.state}, seed {row.train_seed}",
        row.grouping,
    ]
