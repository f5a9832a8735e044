"""What a search found: kept as JSON, printed as tables, drawn as figures, and told to MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from cedm_ray.granularity.decision import TieSet
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.scores import Score, series_name
from cedm_ray.report.bound_figure import FittedCurve
from cedm_ray.report.figures import figures
from cedm_ray.report.pages import efficiencies
from cedm_ray.report.read_run import RESULT_FILE, SO_FAR_FILE, read_run
from cedm_ray.report.rows import Row
from cedm_ray.report.run import Run
from cedm_ray.report.tables import probes_table, scores_table, trials_table
from cedm_ray.report.write import write_report
from cedm_ray.stages import story
from cedm_ray.stages.budget import mimg
from cedm_ray.stages.lower_bound import LowerBound
from cedm_ray.stages.probes import ProbeRecord
from cedm_ray.stages.records import FinalScore, TrialRecord
from cedm_ray.stages.score_rows import score_row
from cedm_ray.stages.store import read_json, write_json
from cedm_ray.stages.upper_bound import UpperBound

if TYPE_CHECKING:
    from cedm_ray.stages.context import Context
    from cedm_ray.stages.tracking import Tracker

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
    """Name of the score that decides, lower is better."""
    metrics: tuple[str, ...]
    """Names of all scores, the deciding one first."""
    scored: Mapping[str, Any]
    """What makes the score comparable: detector, weights, resize, dtype, dimensions, number of real images."""
    images_sha256: str
    """Digest of the real images."""
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
    tie_set: TieSet
    """The numbers of clusters that noise cannot tell from it."""
    pareto: tuple[int, ...] | None
    """Numbers of clusters that no other one beats in all scores, where several are minimised."""
    final: FinalScore
    mosaics: Mapping[int, str]
    """Pictures of the clusterings, by C."""
    confidence: str | None
    """File of the samples that the clustering is most and least sure of."""
    costs: Mapping[str, float | None]
    """Images seen, device-hours and energy, and what the full grid would have seen."""
    tracking_uri: str
    ui_command: str
    run_id: str
    page: str | None = None
    """Address of the search's page in MLflow, once what :attr:`ui_command` says is done."""

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

    def figures(self) -> dict[str, Figure]:
        """The figures of the search as matplotlib objects, by name: ``score_by_clusters``, ``upper_bound``, ..."""
        return figures(read_run(Path(self.folder)))

    def track(self, tracker: Tracker, files: Sequence[Path]) -> None:
        """Tell MLflow's parent run: the figures of the search, the tables and the pictures."""
        found: dict[str, float] = {"best_num_clusters": self.best, "final_kimg": self.final.kimg}
        found |= {"tie_set_smallest": self.tie_set.smallest, "tie_set_size": len(self.tie_set.clusters)}
        found |= {name: value for name, value in self.costs.items() if value is not None}
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
        for file in files:
            tracker.artifact(self.run_id, file)
        for file in story.smaller(files, Path(self.folder) / story.SMALL):
            tracker.artifact(self.run_id, file, story.SMALL)
        for file in sorted(Path(self.final.export).iterdir()):
            tracker.artifact(self.run_id, file, "export")

    def best_score(self) -> tuple[str, float]:
        """Label and score of the best C's training at the end of the search; of several the one with the lowest."""
        own = [t for t in self.trials if t.grouping == self.grouping and t.num_clusters == self.best]
        rungs = [(t.label, rung) for t in own for rung in t.rungs if rung["kimg"] == self.total_kimg]
        label, rung = min(rungs, key=lambda each: float(each[1]["score"]))
        return label, float(rung["score"])

    def facts(self) -> list[tuple[str, str]]:
        """What else is to be said of the result, by name."""
        ties, scored = self.tie_set, self.scored
        tied = f"C = {', '.join(map(str, ties.clusters))} within the noise of {ties.margin:.1%}"
        found = [("tie set", f"{tied}; the smallest is {ties.smallest}")]
        if self.pareto:
            found.append(("Pareto front", f"C = {', '.join(map(str, self.pareto))}"))
        found.append(("cost", _cost(self.costs)))
        if self.lower_bound:
            found.append(("lower bound", self.lower_bound.sentence()))
        return [
            *found,
            ("final", self.sentence()),
            (
                "score",
                f"Fréchet distance on {scored['dim']} features of {scored['detector']}, {self.num_images:,} generated "
                f"against {scored['count']:,} real images{'' if self.metric in COMPARABLE else NOT_COMPARABLE}",
            ),
        ]

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
    """Keep a result with its tables and figures in the folder of its run and in MLflow.

    The JSON comes last: what makes a search count as done is written when everything else is.
    """
    tree = asdict(result)
    run = Run.from_tree(tree, ctx.folder)
    files = write_report(run, ctx.folder)
    result.track(ctx.tracker, files)
    factors = {f"sample_efficiency_against_{_plain(each.other)}": each.factor for each in efficiencies(run)}
    ctx.tracker.points(result.run_id, {name: factor for name, factor in factors.items() if factor is not None})
    story.tell(ctx.tracker, run, result.facts(), {file.name for file in files})
    ctx.tracker.end(ctx.tracker.parent_id, "complete")  # a search that is done is not opened again to say so
    write_json(ctx.folder / RESULT_FILE, tree)
    (ctx.folder / SO_FAR_FILE).unlink(missing_ok=True)


def _plain(label: str) -> str:
    """A label as part of a metric's name."""
    return label.split(" ")[0]


def write_so_far(ctx: Context, base: Mapping[str, Any], records: Sequence[TrialRecord]) -> None:
    """Keep what a search has found so far, for whoever looks at it while it goes on."""
    tree = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in base.items()
    }
    tree["trials"] = [asdict(record) for record in records]
    write_json(ctx.folder / SO_FAR_FILE, tree)
    story.tell(ctx.tracker, Run.from_tree(tree, ctx.folder))


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
    tree["tie_set"] = TieSet(**{**tree["tie_set"], "clusters": tuple(tree["tie_set"]["clusters"])})
    for name in ("metrics", "pareto", "searched"):
        tree[name] = None if tree[name] is None else tuple(tree[name])
    tree["mosaics"] = {int(c): file for c, file in tree["mosaics"].items()}
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


def _cost(costs: Mapping[str, float | None]) -> str:
    """What the search has cost, in words."""
    spent, grid = costs["spent_mimg"] or 0.0, costs["grid_mimg"] or 0.0
    said = mimg(spent * 1000)
    if grid > spent:
        said += f" (a full grid: {mimg(grid * 1000)})"
    hours, energy = costs["device_hours"], costs["energy_kwh"]
    said += f", {hours:,.3g} device-hours" if hours else ""
    return said + (f", {energy:,.3g} kWh" if energy else "")


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
    label, score = result.best_score()
    lines = [
        ("best C", f"{result.best}"),
        *(
            (f"{result.metric} at {result.total_kimg:,} kimg" if i == 0 else "", f"{label}: {value:.4g}")
            for i, (label, value) in enumerate({label: score, **result.baselines()}.items())
        ),
    ]
    lines += [
        *result.facts(),
        ("artifacts", result.folder),
        ("model", result.final.export),
        ("MLflow UI", result.ui_command),
        *([("its page", result.page)] if result.page else []),
    ]
    console.print(scores_table([score_row(score) for score in result.scores()]))
    console.print()
    print_pairs(lines, console)


def print_pairs(lines: Sequence[tuple[str, str]], console: Console) -> None:
    """Names, aligned to the right, each with its text."""
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(f"{name:>{width}}  {escape(text)}", soft_wrap=True)
