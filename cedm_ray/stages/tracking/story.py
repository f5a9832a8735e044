"""What a search and its trainings say of themselves in MLflow: pages in Markdown."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cedm_ray.clustering.clustering_io import MOSAIC_FILE
from cedm_ray.report.rows import metric_title
from cedm_ray.report.run import Run
from cedm_ray.report.trial import Trial
from cedm_ray.stages.storage.checkpoints import SAMPLES_FILE
from cedm_ray.stages.tracking import links
from cedm_ray.stages.tracking.runs_view import compared_name, runs_view

if TYPE_CHECKING:
    from cedm_ray.stages.tracking.tracker import Tracker

MAX_ROWS = 24
"""Trainings on the page of a search; MLflow cuts off what is longer than 8,000 characters."""
FIGURES = {
    "score_by_clusters.png": "Score and share of used clusters against C",
    "upper_bound.png": "The search for C_max",
    "score_by_kimg.png": "Score against images seen",
    "samples_by_clusters.png": "Samples of every C from the same noise",
}
"""Figures on the page of a search, each with its title."""
SMALL_FOLDER, SMALL_WIDTH = "page", 760
"""Folder of their small copies, and the width in pixels that MLflow leaves for a page's text in a window of 1,600."""


def small_copies(files: Iterable[Path], folder: Path) -> list[Path]:
    """Copies of the figures that the page shows, as wide as it is: MLflow shows pictures as wide as they are."""
    made = []
    for file in files:
        if file.name in FIGURES:
            folder.mkdir(exist_ok=True)
            with Image.open(file) as picture:
                picture.thumbnail((SMALL_WIDTH, picture.height), Image.Resampling.LANCZOS)
                picture.save(folder / file.name)
            made.append(folder / file.name)
    return made


def tell(tracker: Tracker, run: Run, facts: Sequence[tuple[str, str]] = (), files: Collection[str] = ()) -> None:
    """Write the pages of a search and of its trainings, and the view that shows the trainings side by side.

    Args:
        tracker: MLflow; trainings that it has not heard of are left out.
        run: The search, as far as it is known.
        facts: What else is to be said of a finished search, by name.
        files: Names of the figures that it has in MLflow.
    """
    known = {trial.key: name for trial in run.trials if (name := tracker.known(trial.key)) is not None}
    for trial in run.trials:
        if trial.key in known:
            _tell_trial(tracker, run, trial, known[trial.key])
    tracker.view(run.name, runs_view(run, tracker.parent_key))
    tracker.describe(tracker.parent_key, Page(run, tracker.parent_key, known).text(facts, files))


def _tell_trial(tracker: Tracker, run: Run, trial: Trial, name: str) -> None:
    score = run.score_at_budget(trial)
    tracker.points(name, {"num_clusters": float(trial.num_clusters)})
    if score is not None:
        tracker.points(name, {compared_name(run): score})
    tracker.describe(name, trial_page(run, trial, tracker.parent_key, name))


@dataclass(frozen=True)
class Page:
    """The page of a search."""

    run: Run
    parent: str
    """Its run in MLflow."""
    known: Mapping[str, str]
    """The runs of its trainings, by their keys."""

    def text(self, facts: Sequence[tuple[str, str]], files: Collection[str]) -> str:
        """All of it; the arguments are those of :func:`tell`."""
        parts = [self.headline(), self.addresses(), self.table()]
        if facts:
            model = f"[export]({links.artifacts(self.parent, 'export')}), among the artifacts: safetensors and JSON"
            rows = [f"| {name} | {text.replace('|', ' ')} |" for name, text in (*facts, ("model", model))]
            parts.append("\n".join(["| &emsp;&emsp;&emsp;&emsp;&emsp; | |", "|:---|:---|", *rows]))
        parts += [self.figure(name, title) for name, title in FIGURES.items() if name in files]
        return "\n\n".join(parts) + "\n"

    def figure(self, name: str, title: str) -> str:
        """A small picture that leads to the artifact itself."""
        small = links.picture(self.parent, f"{SMALL_FOLDER}/{name}")
        return f"#### {title}\n[![{title}]({small})]({links.artifacts(self.parent, name)})"

    def headline(self) -> str:
        """What was found, in words."""
        run, bound = self.run, self.run.upper_bound
        interval = "" if bound is None or bound.interval is None else f" (interval {list(bound.interval)})"
        c_max = [] if bound is None else [f"C_max is {bound.c_max}{interval}."]
        if run.best is None or run.tie_set is None:
            return " ".join(["**No result yet**; the tag `state` says whether the search goes on.", *c_max])
        tried = {trial.num_clusters for trial in run.trials if trial.grouping == run.grouping}
        said = [f"**C = {run.best} is the best of the {len(tried)} numbers of clusters that were trained on.**"]
        if len(tried) == 1:
            said = [f"**Trained on {run.grouping} (C = {run.best}).**"]
        compared = run.compared()
        if compared:
            listed = "; ".join(f"{label}: {score:.4g}" for label, score in compared.items())
            said.append(f"{run.metric} at {run.total_kimg:,} kimg, lower is better: {listed}.")
        ties = ", ".join(str(c) for c in run.tie_set.clusters if c != run.best)
        if ties:
            said.append(f"Noise cannot tell C = {ties} from it.")
        if run.final is not None and run.final.scores:
            said.append(f"Trained on to {run.final.kimg:,.10g} kimg, it scores {run.final.scores[0].value:.4g}.")
        return " ".join([*said, *c_max])

    def addresses(self) -> str:
        """Where the trainings, and the probes, are shown together."""
        run = self.run
        found = [f"[table]({links.view(run.name)})", f"[charts]({links.view(run.name, charts=True)})"]
        own = [self.known[t.key] for t in self.chosen() if t.grouping == run.grouping and t.key in self.known]
        if len(own) > 1:
            found.append(f"[parallel coordinates and scatter plots]({links.compare(own)})")
        if run.upper_bound is not None and run.upper_bound.probes:
            wanted = f'tags.mlflow.parentRunId = "{links.run_id(self.parent)}" and tags.stage = "upper_bound"'
            found.append(f"[the probes of C_max]({links.runs(wanted, 'num_clusters')})")
        return f"The trainings side by side: {', '.join(found)}."

    def chosen(self) -> list[Trial]:
        """The trainings that are shown, by C: where they are too many, those with the lowest scores."""
        run, scores = self.run, {}
        for trial in run.trials:
            rung = trial.rung_at(run.total_kimg)
            score = rung.score(run.metric) if rung else None
            scores[trial.key] = math.inf if score is None else score
        found = sorted(run.trials, key=lambda trial: scores[trial.key])[:MAX_ROWS]
        return sorted(found, key=lambda t: (t.num_clusters, t.grouping != run.grouping, t.train_seed or 0))

    def table(self) -> str:
        """The trainings, each with a link to its own page."""
        run, trials = self.run, self.chosen()
        # MLflow's tables have no room between columns but what stands in them.
        names = [f"{name}&emsp;&emsp;" for name in ("training", "C", metric_title(run.metric), "kimg", "r_C", "state")]
        lines = [f"| {' | '.join(names)} |", "|:---|---:|---:|---:|---:|:---|"]
        for trial in trials:
            rung, name = trial.rung_at(run.total_kimg), self.known.get(trial.key)
            score = rung.score(run.metric) if rung else None
            best = "**" if trial == run.best_trial else ""
            cells = [
                trial.label if name is None else f"[{trial.label}]({links.page(name)})",
                str(trial.num_clusters),
                "" if score is None else f"{best}{score:.4g}{best}",
                f"{rung.kimg:,.10g}" if rung else "0",
                "" if trial.utilization_ratio is None else f"{trial.utilization_ratio:.4f}",
                trial.state,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if len(trials) < len(run.trials):
            lines.append(
                f"\n{len(run.trials) - len(trials)} more, with higher scores or none yet, are in `trials.csv`."
            )
        return "\n".join(lines)


def trial_page(run: Run, trial: Trial, parent: str, name: str) -> str:
    """The page of a training.

    Args:
        run: The search.
        trial: The training.
        parent: The search's run in MLflow.
        name: Its own.
    """
    last = trial.rungs[-1] if trial.rungs else None
    said = [f"A training of the search [{run.name}]({links.page(parent)})"]
    said.append("without a condition" if trial.grouping == "none" else f"on {trial.num_clusters} {_groups(trial)}")
    for rung in trial.rungs:
        score = rung.score(run.metric)
        if score is not None and (rung is last or rung is trial.rung_at(run.total_kimg)):
            said.append(f"{run.metric} {score:.4g} at {rung.kimg:,.10g} kimg")
    text = ", ".join(said) + "."
    if trial.reason:
        text += f" It failed: `{trial.reason.replace('`', '')}`."
    if trial.state in ("complete", "stopped") and last is not None:
        if last.checkpoint_path is not None and (run.place(last.checkpoint_path) / SAMPLES_FILE).is_file():
            text += f"\n\n#### Samples\n![samples]({links.picture(name, SAMPLES_FILE)})"
        if trial.grouping == run.grouping and trial.num_clusters in run.mosaics:
            text += _clusters(name)
    return text


def _groups(trial: Trial) -> str:
    return {"labels": "classes", "temi": "clusters of TEMI", "kmeans": "clusters of k-means"}.get(
        trial.grouping, f"groups ({trial.grouping})"
    )


def probe_page(parent: str, name: str, said: str, *, mosaic: bool) -> str:
    """The page of a clustering that was made for the sake of its r_C.

    Args:
        parent: The search's run in MLflow.
        name: Its own.
        said: What came of it.
        mosaic: Whether it has a picture of its clusters.
    """
    text = f"A clustering for [the search]({links.page(parent)}), with no training on it. {said.strip()}."
    return text + (_clusters(name) if mosaic else "")


def _clusters(name: str) -> str:
    return f"\n\n#### Images of some clusters, a row each\n![clusters]({links.picture(name, MOSAIC_FILE)})"
