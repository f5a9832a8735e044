"""What a search found: kept as JSON, printed as tables, drawn as figures, and told to MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.markup import escape

from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.scores import Score, series_name
from cedm_ray.report.bound_figure import FittedCurve
from cedm_ray.report.figures import curves_figure, score_figure
from cedm_ray.report.rows import Curve, Row
from cedm_ray.report.tables import probes_table, scores_table, to_csv, to_markdown, trials_table
from cedm_ray.stages.lower_bound import LowerBound
from cedm_ray.stages.probes import ProbeRecord
from cedm_ray.stages.records import FinalScore, TrialRecord
from cedm_ray.stages.score_rows import score_row
from cedm_ray.stages.store import read_json, write_json
from cedm_ray.stages.upper_bound import UpperBound

if TYPE_CHECKING:
    from cedm_ray.stages.context import Context
    from cedm_ray.stages.tracking import Tracker

RESULT_FILE = "result.json"
COMPARABLE = ("fid", "fdd")
NOT_COMPARABLE = "; not comparable with FID or FDD"


@dataclass(frozen=True)
class SearchResult:
    """Everything that a finished search says."""

    name: str
    folder: str
    grouping: str
    """What makes the clusters: temi, kmeans, or a grouping whose C is given."""
    metric: str
    """Name of the score, lower is better."""
    scored: Mapping[str, Any]
    """What makes the score comparable: detector, weights, resize, dtype, dimensions, number of real images."""
    num_images: int
    """Generated images behind each score of the search."""
    total_kimg: int
    cutoff: float
    upper_bound: UpperBound | None
    """C_max; None where C was not searched over."""
    lower_bound: LowerBound | None
    searched: tuple[int, int] | None
    """C was searched over from the first of these to below the second."""
    trials: tuple[TrialRecord, ...]
    best: int
    """The number of clusters with the lowest score: the visual groups, C_V."""
    final: FinalScore
    tracking_uri: str
    ui_command: str
    run_id: str

    def rows(self, *, probes: bool = True) -> list[Row]:
        """One row per trial, at the budget of the search, and per probe."""
        found = []
        for trial in self.trials:
            rung = trial.rung_at(self.total_kimg) or {"kimg": 0, "score": None}
            found.append(
                Row(
                    trial.num_clusters,
                    trial.utilization_ratio,
                    rung["kimg"],
                    rung["score"],
                    trial.state,
                    trial.grouping,
                    self.num_images,
                )
            )
        if probes:
            found += self.probe_rows()
        return found

    def probe_rows(self) -> list[Row]:
        """One row per probe of the search for C_max."""
        probes = self.upper_bound.probes if self.upper_bound else ()
        return [
            Row(p.num_clusters, p.ratio, 0, None, "probe", self.grouping, fidelity=p.fidelity, seed=p.seed)
            for p in probes
        ]

    @property
    def c_max(self) -> int | None:
        return None if self.upper_bound is None else self.upper_bound.c_max

    def baselines(self) -> dict[str, float]:
        """Scores of the trainings without clusters, at the budget of the search."""
        scores = {t.label: t.rung_at(self.total_kimg) for t in self.trials if t.grouping != self.grouping}
        return {label: float(rung["score"]) for label, rung in scores.items() if rung is not None}

    def to_pandas(self) -> pd.DataFrame:
        """The trials as a data frame, one row each."""
        return pd.DataFrame([asdict(row) for row in self.rows(probes=False)])

    def figures(self) -> dict[str, Any]:
        """Matplotlib figures by file name."""
        shown = [row for row in self.rows() if row.grouping == self.grouping]
        curves = [
            Curve(
                trial.label,
                trial.num_clusters if trial.grouping == self.grouping else None,
                tuple((rung["kimg"], rung["score"]) for rung in trial.rungs),
                self.num_images,
            )
            for trial in self.trials
            if trial.rungs
        ]
        return {
            "score_by_clusters.png": score_figure(
                shown, metric=self.metric, c_max=self.c_max, utilization_cutoff=self.cutoff, baselines=self.baselines()
            ),
            "score_by_kimg.png": curves_figure(curves, metric=self.metric),
        }

    def track(self, tracker: Tracker) -> None:
        """Tell MLflow's parent run: the figures of the search, the tables and the pictures."""
        found: dict[str, float] = {"best_num_clusters": self.best, "final_kimg": self.final.kimg}
        if self.upper_bound is not None:
            found["c_max"] = self.upper_bound.c_max
            if self.upper_bound.interval is not None:
                found["c_max_lower"], found["c_max_upper"] = self.upper_bound.interval
        for score in self.scores():
            # The distances' names say their detector; others are of one detector among several.
            own = metric_name(score.detector) == score.metric
            name = series_name(score.metric if own else f"{score.metric}_{score.detector}", score.num_images)
            found[f"final_{name}"] = score.value
            if score.std is not None:
                found[f"final_{name}_std"] = score.std
        tracker.points(self.run_id, found)
        series = f"{series_name(self.metric, self.num_images)}_by_clusters"
        for row in self.rows(probes=False):
            if row.grouping == self.grouping and row.score is not None:
                tracker.points(self.run_id, {series: row.score}, step=row.num_clusters)
        for probe in self.upper_bound.probes if self.upper_bound else ():
            name = "utilization_ratio_by_clusters" + ("" if probe.fidelity == "full" else "_low_fidelity")
            tracker.points(self.run_id, {name: probe.ratio}, step=probe.num_clusters)
        for name in ("score_by_clusters.png", "score_by_kimg.png", "trials.csv"):
            tracker.artifact(self.run_id, Path(self.folder) / name)
        for file in sorted(Path(self.final.export).iterdir()):
            tracker.artifact(self.run_id, file, "export")
        table = to_markdown(self.rows(probes=False), self.metric, self.best, self.grouping)
        tracker.describe(self.run_id, f"{self.sentence()}\n\n{table}")

    def scores(self) -> list[Score]:
        """All scores of the final model, the search's own first."""
        return [Score(**score) for score in self.final.scores]

    def sentence(self) -> str:
        """The result in words."""
        what = (
            f"Trained on {self.grouping} ({self.best} groups)"
            if self.searched is None
            else f"The best of the tried numbers of clusters in [{self.searched[0]}, {self.searched[1]}) is {self.best}"
        )
        return (
            f"{what}: {self.metric} {self.final.mean:.4g} +- {self.final.std:.2g} at {self.final.kimg:,} kimg "
            f"({self.final.num_sets} x {self.final.num_images:,} images)."
        )


def write_result(ctx: Context, result: SearchResult) -> None:
    """Keep a result with its table and its figures in the folder of its run and in MLflow.

    The JSON comes last: what makes a search count as done is written when everything else is.
    """
    (ctx.folder / "trials.csv").write_text(to_csv(result.rows(), result.metric), encoding="utf-8")
    for name, figure in result.figures().items():
        figure.savefig(ctx.folder / name, dpi=120)
    result.track(ctx.tracker)
    write_json(ctx.folder / RESULT_FILE, asdict(result))


def read_result(folder: Path) -> SearchResult | None:
    """The result of a finished run, or None."""
    tree = read_json(folder / RESULT_FILE)
    if tree is None:
        return None
    tree["trials"] = tuple(TrialRecord(**{**trial, "rungs": tuple(trial["rungs"])}) for trial in tree["trials"])
    if tree["upper_bound"] is not None:
        tree["upper_bound"] = _upper_bound(tree["upper_bound"])
    if tree["lower_bound"] is not None:
        tree["lower_bound"] = LowerBound(tuple((given, used) for given, used in tree["lower_bound"]["used"]))
    return SearchResult(**{**tree, "final": FinalScore(**tree["final"])})


def _upper_bound(tree: Mapping[str, Any]) -> UpperBound:
    probes, curve, interval = tree["probes"], tree["curve"], tree["interval"]
    return UpperBound(
        **{
            **tree,
            "interval": None if interval is None else tuple(interval),
            "probes": tuple(ProbeRecord(**probe) for probe in probes),
            "curve": None if curve is None else FittedCurve(**{name: tuple(line) for name, line in curve.items()}),
        }
    )


def show(result: SearchResult, console: Console) -> None:
    """Print what a search found."""
    upper = result.upper_bound
    if upper is not None and upper.probes:
        rows = result.probe_rows()
        console.print()
        console.print(probes_table(rows, utilization_cutoff=result.cutoff, c_max=upper.c_max, interval=upper.interval))
    if upper is not None and upper.outcome == "capped":
        console.print("Even one cluster per image would be used well: C_max is the number of images.")
    console.print()
    console.print(trials_table(result.rows(probes=False), result.metric, result.best, result.grouping))
    failed = [trial for trial in result.trials if trial.state == "failed"]
    for trial in failed:
        console.print(f"{trial.label} failed: {escape(trial.reason or '')}")
    console.print()
    scored = result.scored
    best = next(t for t in result.trials if t.grouping == result.grouping and t.num_clusters == result.best)
    rung = best.rung_at(result.total_kimg) or {}
    lines = [
        ("best C", f"{result.best}"),
        *(
            (f"{result.metric} at {result.total_kimg:,} kimg" if i == 0 else "", f"{label}: {value:.4g}")
            for i, (label, value) in enumerate({best.label: rung["score"], **result.baselines()}.items())
        ),
    ]
    lines += [
        *((("lower bound", result.lower_bound.sentence()),) if result.lower_bound else ()),
        ("final", result.sentence()),
        (
            "score",
            f"Fréchet distance on {scored['dim']} features of {scored['detector']}, {result.num_images:,} generated "
            f"against {scored['count']:,} real images{'' if result.metric in COMPARABLE else NOT_COMPARABLE}",
        ),
        ("artifacts", result.folder),
        ("model", result.final.export),
        ("MLflow UI", result.ui_command),
    ]
    console.print(scores_table([score_row(score) for score in result.scores()]))
    console.print()
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(f"{name:>{width}}  {escape(text)}", soft_wrap=True)
