"""The view of a search's trainings side by side, as MLflow keeps views of runs that are shared by a link."""

from __future__ import annotations

from typing import Any

from cedm_ray.metrics.scores import series_name
from cedm_ray.report.run import Run
from cedm_ray.stages.tracking import links


def compared_name(run: Run) -> str:
    """Name of the metric by which trainings compare: the deciding score, of the images and the budget that all share.

    It begins with a digit: where MLflow's views choose a metric themselves, they take the first one of the alphabet.
    """
    return f"{run.total_kimg}_kimg/{series_name(run.metric, run.num_images)}"


def runs_view(run: Run, parent: str) -> dict[str, Any]:
    """The view of a search's trainings: ordered by C, with the score against C, parallel coordinates and curves.

    The form is that of MLflow's own shared views (3.17); below these charts MLflow adds one for each other metric.
    """
    score, curve, section = compared_name(run), series_name(run.metric, run.num_images), "search"
    clusters = {"key": "C", "type": "PARAM"}
    charts: list[dict[str, Any]] = [
        {"type": "SCATTER", "xaxis": clusters, "yaxis": {"key": score, "type": "METRIC"}},
        {"type": "BAR", "metricKey": score},
        {"type": "PARALLEL", "selectedParams": ["C"], "selectedMetrics": ["utilization_ratio", score]},
        _line(curve),
        _line("loss"),
        {"type": "SCATTER", "xaxis": clusters, "yaxis": {"key": "utilization_ratio", "type": "METRIC"}},
    ]
    common = {"metricSectionId": section, "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    columns = [f"metrics.`{name}`" for name in (score, "utilization_ratio", "device_hours")]
    return {
        "searchFilter": f'tags.mlflow.parentRunId = "{links.run_id(parent)}" and tags.stage = "granularity"',
        "orderByKey": "metrics.`num_clusters`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [*columns, *(f"tags.`{name}`" for name in ("state", "grouping", "rung_kimg"))],
        "runsHiddenMode": "SHOW_ALL",
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunCharts": [{**common, **chart, "uuid": f"search-{i}"} for i, chart in enumerate(charts)],
        "compareRunSections": [{"uuid": section, "name": "Search", "display": True, "isReordered": False}],
    }


def _line(metric: str) -> dict[str, Any]:
    """A metric against kimg."""
    as_all = {"useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}
    return {"type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], **as_all}
