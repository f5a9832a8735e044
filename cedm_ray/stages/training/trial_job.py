"""From the parameters of a trial to everything that decides its training, and where that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cedm_ray.config import SearchConfig
from cedm_ray.diffusion.compute import ComputeSettings
from cedm_ray.settings import SEARCHED, DiffusionSettings, ScoreSettings
from cedm_ray.stages.inputs.clusterings import ClusteringJob, clustering_job
from cedm_ray.stages.inputs.groupings import GivenGrouping
from cedm_ray.stages.inputs.scoring import Scoring
from cedm_ray.stages.storage.store import Store

OWN_PARAMS = ("grouping", "num_clusters", "train_seed")
"""Parameters of a trial that are no settings."""


@dataclass(frozen=True)
class TrialJob:
    """One training of C-EDM: everything that decides it, and where it is kept."""

    label: str
    """What a person calls it: C=17, C=17 (seed 3), unconditional, labels (10)."""
    grouping: str
    """Where the condition comes from: temi, kmeans, labels, superclasses, clip, file or none."""
    num_clusters: int
    clustering: ClusteringJob | None
    """A clustering that may still have to be made."""
    condition: Path | None
    """File of the clustering; None without a condition."""
    images: Path
    diffusion: DiffusionSettings
    compute: ComputeSettings
    score: ScoreSettings
    scoring: Scoring
    rungs_kimg: tuple[int, ...]
    """Where the model is scored and checkpointed, ascending, in thousands of images seen."""
    search_kimg: int
    """Where the search ends, and with it the comparison of trials; a final training goes on."""
    final_sets: int
    """Sets of images to score after the last rung."""
    final_images: int
    num_workers: int
    seed: int
    inputs: dict[str, Any]
    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def score_key(self) -> str:
        """Under which the progress of scoring is told."""
        return f"{self.key}/score"

    def finally_scored(self, rung: Mapping[str, Any]) -> bool:
        """Whether a rung is the last one of this job and holds the scores of its final sets of images."""
        scores = rung.get("final_scores", {}).get(self.scoring.metric, ())
        sets = len(scores), rung.get("final_images")
        return rung["kimg"] >= self.rungs_kimg[-1] and sets == (self.final_sets, self.final_images)

    @property
    def checkpoints(self) -> Path:
        """Where Ray Train keeps the checkpoints; the same path goes on from the newest."""
        return self.path / "train"

    @property
    def features(self) -> Path:
        """Where the workers leave the features of the first final set of generated images."""
        return self.path / "features"


@dataclass(frozen=True)
class Planner:
    """Turns the parameters that a searcher proposes into jobs; the same parameters always give the same job."""

    config: SearchConfig
    store: Store
    embedding_inputs: dict[str, Any]
    images: Path
    images_sha256: str
    given: Mapping[str, GivenGrouping]
    """Groupings that no clustering of the embeddings makes, by name."""
    scoring: Scoring

    def job(self, params: Mapping[str, Any], *, total_kimg: int | None = None) -> TrialJob:
        """The job of a trial.

        Args:
            params: ``grouping``, ``num_clusters``, for a retraining ``train_seed``, and dotted paths of other settings.
                ``train_seed`` stands for the search's seed in everything of the training (first weights, order,
                noise) and in the images that score it, so that the scores of retrainings are independent; the
                clustering stays the search's.
            total_kimg: Train to the final budget instead of the search's, and score the final sets there.
        """
        grouping, num_clusters = str(params["grouping"]), int(params["num_clusters"])
        others = {name: value for name, value in params.items() if name not in OWN_PARAMS}
        config = self.config.with_values(others) if others else self.config
        seed = int(params.get("train_seed", config.seed))
        clustering: ClusteringJob | None = None
        if grouping in SEARCHED:
            clustering = clustering_job(config, self.embedding_inputs, self.images, num_clusters, self.store)
        condition = clustering or (None if grouping == "none" else self.given[grouping])
        inputs = self._inputs(config, condition, seed)
        rungs = config.granularity.rungs_kimg()
        if total_kimg is not None and total_kimg > rungs[-1]:
            rungs = (*rungs, total_kimg)
        return TrialJob(
            label=_label(grouping, num_clusters) + (f" (seed {seed})" if seed != config.seed else ""),
            grouping=grouping,
            num_clusters=num_clusters,
            clustering=clustering,
            condition=None if condition is None else condition.file,
            images=self.images,
            diffusion=config.diffusion,
            compute=config.compute,
            score=config.score,
            scoring=self.scoring,
            rungs_kimg=rungs,
            search_kimg=config.granularity.total_kimg,
            final_sets=0 if total_kimg is None else config.final.num_sets,
            final_images=config.final.num_images,
            num_workers=config.resources.num_workers,
            seed=seed,
            inputs=inputs,
            path=self.store.path("trials", inputs),
        )

    def _inputs(
        self, config: SearchConfig, condition: ClusteringJob | GivenGrouping | None, seed: int
    ) -> dict[str, Any]:
        """All that decides a training, from which its key is made."""
        return {
            "images": self.images_sha256,
            "condition": {"none": 1} if condition is None else condition.inputs,
            "diffusion": asdict(config.diffusion),
            "score": {name: value for name, value in asdict(config.score).items() if name != "batch_size"},
            **config.compute.asked_precisions(),
            "scoring": [asdict(reference.facts) for reference in self.scoring.references],
            "rungs_kimg": config.granularity.rungs_kimg(),
            "num_workers": config.resources.num_workers,
            "seed": seed,
        }

    def fixed(self) -> list[dict[str, Any]]:
        """Parameters of the trainings whose C is not searched over.

        The search's own grouping, where it is such a one, and what its result is compared with: training without a
        condition, and on the labels where there are any.
        """
        own = self.config.grouping
        wanted = [own] if own not in SEARCHED else []
        if self.config.granularity.baselines:
            wanted += [name for name in ("none", "labels") if name != own]
        sizes = {"none": 1, **{name: grouping.num_clusters for name, grouping in self.given.items()}}
        return [{"grouping": name, "num_clusters": sizes[name]} for name in wanted if name in sizes]


def _label(grouping: str, num_clusters: int) -> str:
    if grouping in SEARCHED:
        return f"C={num_clusters}"
    return "unconditional" if grouping == "none" else f"{grouping} ({num_clusters})"
