"""What MLflow's run of a search is told when the search is done: its numbers, its tables and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.scores import series_name
from cedm_ray.report.pages import efficiencies
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.tracking import story

if TYPE_CHECKING:
    from cedm_ray.stages.tracking.tracker import Tracker


def track_result(tracker: Tracker, result: SearchResult, files: Sequence[Path]) -> None:
    """Tell MLflow's parent run of a finished search.

    Args:
        tracker: MLflow.
        result: What was found.
        files: Tables and pictures of the report.
    """
    run = tracker.parent_key
    tracker.points(run, _numbers(result))
    series = f"{series_name(result.metric, result.num_images)}_by_clusters"
    for row in result.view.rows():
        if row.grouping == result.grouping and row.train_seed is None and row.score is not None:
            tracker.points(run, {series: row.score}, step=row.num_clusters)
    for probe in result.upper_bound.probes if result.upper_bound else ():
        name = "utilization_ratio_by_clusters" + ("" if probe.fidelity == "full" else "_low_fidelity")
        tracker.points(run, {name: probe.ratio}, step=probe.num_clusters)
    for file in files:
        tracker.artifact(run, file)
    for file in story.small_copies(files, Path(result.folder) / story.SMALL_FOLDER):
        tracker.artifact(run, file, story.SMALL_FOLDER)
    for file in sorted(Path(result.final.export).iterdir()):
        tracker.artifact(run, file, "export")
    factors = {_first_word(each.other): each.factor for each in efficiencies(result.view) if each.factor is not None}
    tracker.points(run, {f"sample_efficiency_against_{other}": factor for other, factor in factors.items()})


def _numbers(result: SearchResult) -> dict[str, float]:
    """The numbers of a search by the names that MLflow has them under."""
    found: dict[str, float] = {"best_num_clusters": result.best, "final_kimg": result.final.kimg}
    found |= {"tie_set_smallest": result.tie_set.smallest, "tie_set_size": len(result.tie_set.clusters)}
    found |= {name: value for name, value in result.costs.items() if value is not None}
    if result.upper_bound is not None:
        found["c_max"] = result.upper_bound.c_max
        if result.upper_bound.interval is not None:
            found["c_max_lower"], found["c_max_upper"] = result.upper_bound.interval
    for score in result.scores():
        # The distances' names say their detector; others are of one detector among several.
        own = metric_name(score.detector) == score.metric
        name = series_name(score.metric if own else f"{score.metric}_{score.detector}", score.num_images)
        found[f"final_{name}"] = score.value
        if score.std is not None:
            found[f"final_{name}_std"] = score.std
    return found


def _first_word(label: str) -> str:
    """Of a label, as part of a metric's name."""
    return label.split(" ")[0]
