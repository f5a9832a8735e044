"""The pages of a report: each from what a search holds, or the reason why it is left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.report.bound_figure import ProbePoint, bound_figure
from cedm_ray.report.cluster_figures import metrics_figure, score_figure
from cedm_ray.report.curve_figures import curves_figure, efficiency_figure
from cedm_ray.report.efficiency import Efficiency, sample_efficiency
from cedm_ray.report.groupings import Groupings, groupings_csv, groupings_markdown
from cedm_ray.report.rows import Curve, Row
from cedm_ray.report.run import Run
from cedm_ray.report.samples import confidence_picture, read_confidence, read_samples, samples_picture
from cedm_ray.report.tables import to_csv
from cedm_ray.report.trial import Rung, Trial
from cedm_ray.weights.listing import Listing

SAMPLE_PIXELS_FILE, MANIFEST_FILE = "samples.npy", "manifest.json"
Page = Figure | Image.Image | str | Path
"""What is written: a figure, a picture, a text, or a file that is copied."""


class LeftOut(Exception):
    """Why a page cannot be made of what a run holds."""


def pages(run: Run, groupings: Groupings) -> Iterator[tuple[str, Callable[[], Page]]]:
    """Every page by its file name.

    Args:
        run: The search.
        groupings: Its trainings, and those of others, by grouping and C.

    Returns:
        Names, each with a function that makes the page or raises :class:`LeftOut`.
    """
    yield "trials.csv", lambda: to_csv([*run.rows(), *run.probe_rows()], run.metric)
    yield "upper_bound.png", lambda: _bound(run)
    yield "score_by_clusters.png", lambda: _score_by_clusters(run)
    yield "metrics_by_clusters.png", lambda: _metrics_by_clusters(run)
    yield "score_by_kimg.png", lambda: _score_by_kimg(run)
    yield "sample_efficiency.png", lambda: _sample_efficiency(run)
    yield "samples_by_clusters.png", lambda: _samples_by_clusters(run)
    yield "confidence.png", lambda: _confidence(run)
    for num_clusters in _mosaic_clusters(run):
        yield f"clusters-C{num_clusters}.png", partial(_mosaic, run, num_clusters)
    yield "groupings.csv", lambda: groupings_csv(_several(groupings))
    yield "groupings.md", lambda: groupings_markdown(_several(groupings))


def _own(run: Run, rows: Sequence[Row]) -> list[Row]:
    """The rows of the grouping that C is searched over."""
    return [row for row in rows if row.grouping == run.grouping]


def _require_scores(run: Run) -> None:
    if all(row.score is None for row in run.rows()):
        raise LeftOut("no trial has a score yet")


def _bound(run: Run) -> Figure:
    bound = run.upper_bound
    if bound is None or not bound.probes:
        raise LeftOut("C_max was not searched")
    return bound_figure(
        [ProbePoint(probe.num_clusters, probe.ratio, probe.fidelity) for probe in bound.probes],
        curve=bound.curve,
        cutoff=run.cutoff,
        c_max=bound.c_max,
        interval=bound.interval,
        confidence=bound.confidence,
    )


def _score_by_clusters(run: Run) -> Figure:
    _require_scores(run)
    return score_figure(
        _own(run, [*run.rows(), *run.probe_rows()]),
        metric=run.metric,
        c_max=run.c_max,
        utilization_cutoff=run.cutoff,
        baselines=run.baselines(),
        interval=run.interval,
        tie_set=run.tie_set if run.pareto is None or run.tie_set is None else replace(run.tie_set, low=None, high=None),
        best=run.best,
    )


def _metrics_by_clusters(run: Run) -> Figure:
    if len(run.metrics) < 2:
        raise LeftOut(f"{run.metric} is the only metric")
    _require_scores(run)
    return metrics_figure(
        {metric: _own(run, run.rows(metric)) for metric in run.metrics},
        baselines={metric: run.baselines(metric) for metric in run.metrics},
        c_max=run.c_max,
        interval=run.interval,
        pareto=run.pareto,
    )


def _score_by_kimg(run: Run) -> Figure:
    curves = [_curve(run, trial) for trial in run.firsts()]
    if not any(curve.points for curve in curves):
        raise LeftOut("no trial has a score yet")
    return curves_figure([curve for curve in curves if curve.points], metric=run.metric)


def _curve(run: Run, trial: Trial) -> Curve:
    return trial.curve(run.metric, trial.num_clusters if trial.grouping == run.grouping else None, run.num_images)


def _compared(run: Run) -> tuple[Curve, list[Curve]]:
    """The curve of the best C to the end of its final training, and those that it is compared with."""
    best = run.final_trial
    if best is None or not _curve(run, best).points:
        raise LeftOut("the best C is not known yet")
    others = [_curve(run, trial) for trial in run.firsts() if trial.grouping != run.grouping]
    if not any(curve.points for curve in others):
        raise LeftOut("nothing was trained to compare the best C with")
    return _curve(run, best), [curve for curve in others if curve.points]


def efficiencies(run: Run) -> list[Efficiency]:
    """How many times fewer images the best C needs to be as good as each training that it is compared with."""
    try:
        own, others = _compared(run)
    except LeftOut:
        return []
    found = (sample_efficiency(own, other) for other in others)
    return [each for each in found if each is not None]


def _sample_efficiency(run: Run) -> Figure:
    own, others = _compared(run)
    return efficiency_figure(own, others, metric=run.metric)


def _samples_by_clusters(run: Run) -> Image.Image:
    labels, samples = [], []
    seen = {(trial.grouping, trial.num_clusters) for trial in run.firsts()}
    for grouping, clusters in sorted(seen, key=lambda each: (each[0] == run.grouping, each[1])):
        trial = run.first_trial(grouping, clusters)
        found = trial and _newest_samples(run, trial)
        if trial and found:
            rung, file = found
            score = rung.score(run.metric)
            with _reading(file):
                _check_listed(file)
                samples.append(read_samples(file))
            labels.append(f"{trial.label}\n{rung.kimg:,.10g} kimg{'' if score is None else f': {score:.4g}'}")
    if not samples:
        raise LeftOut(f"no checkpoint holds {SAMPLE_PIXELS_FILE}")
    return samples_picture(labels, samples, metric=run.metric)


def _newest_samples(run: Run, trial: Trial) -> tuple[Rung, Path] | None:
    """Samples at the budget of the search, where the others' are from; the next best are the newest ones."""
    at_budget = trial.rung_at(run.total_kimg)
    for rung in (*([at_budget] if at_budget else []), *reversed(trial.rungs)):
        if rung.checkpoint_path is not None:
            file = run.place(rung.checkpoint_path) / SAMPLE_PIXELS_FILE
            if file.is_file():
                return rung, file
    return None


def _confidence(run: Run) -> Image.Image:
    file = None if run.confidence is None else run.place(run.confidence)
    if file is None or not file.is_file():
        raise LeftOut("the run has no samples ordered by their confidence")
    with _reading(file):
        return confidence_picture(read_confidence(file))


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise LeftOut(f"{file} is damaged: {error}") from error


def _check_listed(file: Path) -> None:
    """Refuse a file that is not what the manifest beside it, if there is one, says that was written."""
    manifest = file.with_name(MANIFEST_FILE)
    listing = Listing.read(json.loads(manifest.read_text())) if manifest.is_file() else None
    fault = listing and listing.fault(file.parent, (file.name,))
    if fault is not None:
        raise ValueError(fault)


def _mosaic_clusters(run: Run) -> list[int]:
    """The numbers of clusters whose pictures belong to the report: the best one and the smallest as good as it."""
    wanted = [run.best, run.tie_set.smallest if run.tie_set else None]
    return sorted({clusters for clusters in wanted if clusters is not None})


def _mosaic(run: Run, num_clusters: int) -> Path:
    recorded = run.mosaics.get(num_clusters)
    file = None if recorded is None else run.place(recorded)
    if file is None or not file.is_file():
        raise LeftOut(f"the run names no picture of the clustering with C = {num_clusters}")
    return file


def _several(groupings: Groupings) -> Groupings:
    if len(groupings.cells) < 2:
        raise LeftOut("fewer than two groupings were trained to the end; name other runs beside this one")
    return groupings
