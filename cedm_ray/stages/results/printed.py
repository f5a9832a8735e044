"""The result of a search on the terminal: tables of probes, trials and scores, and what there is to say beside them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from cedm_ray.report.tables import probes_table, scores_table, trials_table
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.results.score_rows import score_row


def show(result: SearchResult, console: Console) -> None:
    """Print what a search found."""
    upper = result.upper_bound
    if upper is not None and upper.probes:
        rows = result.view.probe_rows()
        console.print()
        console.print(probes_table(rows, utilization_cutoff=result.cutoff, c_max=upper.c_max, interval=upper.interval))
    if upper is not None and upper.outcome == "capped":
        console.print("Even one cluster per image would be used well: C_max is the number of images.")
    console.print()
    console.print(trials_table(result.view.rows(), result.metric, result.best, result.grouping))
    for trial in result.trials:
        if trial.state == "failed":
            console.print(f"{trial.label} failed: {escape(trial.reason or '')}")
    console.print()
    console.print(scores_table([score_row(score) for score in result.scores()]))
    console.print()
    print_pairs([("best C", f"{result.best}"), *_compared(result), *result.facts(), *_places(result)], console)


def _compared(result: SearchResult) -> list[tuple[str, str]]:
    """The score of the best C beside those of the trainings that it is compared with."""
    scores = [f"{label}: {score:.4g}" for label, score in result.view.compared().items()]
    return list(zip([f"{result.metric} at {result.total_kimg:,} kimg", *[""] * len(scores)], scores, strict=False))


def _places(result: SearchResult) -> list[tuple[str, str]]:
    """Where things are."""
    found = [("artifacts", result.folder), ("model", result.final.export), ("MLflow UI", result.ui_command)]
    return [*found, ("its page", result.page)] if result.page else found


def print_pairs(lines: Sequence[tuple[str, str]], console: Console) -> None:
    """Names, aligned to the right, each with its text."""
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(f"{name:>{width}}  {escape(text)}", soft_wrap=True)
