"""The conditions of the diffusion model: TEMI clusterings from the store or fitted, and the labels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cedm_ray.clustering.clustering_io import save_clustering
from cedm_ray.clustering.labels import from_labels
from cedm_ray.clustering.temi import TemiSettings, fit_temi
from cedm_ray.clustering.types import Clustering
from cedm_ray.config import SearchConfig
from cedm_ray.stages.board import Beat, Board
from cedm_ray.stages.store import Store

CLUSTERING_FILE = "clustering.safetensors"


@dataclass(frozen=True)
class ClusteringJob:
    """One TEMI clustering: everything that decides it, and where it is kept."""

    num_clusters: int
    settings: TemiSettings
    seed: int
    inputs: dict[str, Any]
    path: Path

    @property
    def file(self) -> Path:
        return self.path / CLUSTERING_FILE


def clustering_job(
    config: SearchConfig, embedding_inputs: Mapping[str, Any], num_clusters: int, store: Store
) -> ClusteringJob:
    """The TEMI clustering of these embeddings into so many clusters, with the settings of the search."""
    inputs = {
        **embedding_inputs,
        "k": config.num_neighbors,
        "temi": asdict(config.temi),
        "seed": config.seed,
        "num_clusters": num_clusters,
    }
    return ClusteringJob(num_clusters, config.temi, config.seed, inputs, store.path("clusterings", inputs))


def fit(job: ClusteringJob, embeddings: np.ndarray, neighbors: np.ndarray, cpus: float, board: Board) -> dict[str, Any]:
    """Fit a clustering unless it is stored, in the process that this is called in.

    Args:
        job: What to fit.
        embeddings: Shape ``(N, D)``, float32; may be a read-only view of shared memory.
        neighbors: Shape ``(N, k)``, int32.
        cpus: Threads to use.
        board: Where progress is told.

    Returns:
        The facts of the clustering, ``utilization_ratio`` among them.
    """
    store = Store(job.path.parents[1])
    facts = store.facts(job.path)
    if facts is not None:
        return facts
    torch.set_num_threads(max(1, round(cpus)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    beat = Beat(board, str(job.path), f"clustering into {job.num_clusters}", job.settings.epochs, "epochs")
    started_s = time.monotonic()
    try:
        clustering = fit_temi(
            embeddings,
            neighbors,
            job.num_clusters,
            job.settings,
            seed=job.seed,
            device=device,
            on_progress=lambda progress: beat(progress.epoch),
        )
    finally:
        beat.close()
    return keep(clustering, job.path, job.inputs, store, seconds=time.monotonic() - started_s)


def keep(clustering: Clustering, path: Path, inputs: dict[str, Any], store: Store, **more: Any) -> dict[str, Any]:
    """Put a clustering into the store; returns its facts."""
    facts = {
        "num_clusters": clustering.num_clusters,
        "num_used": int(np.count_nonzero(clustering.cluster_probs)),
        "utilization_ratio": clustering.utilization_ratio,
        "best_head": clustering.best_head,
        **more,
    }
    with store.create(path, inputs, facts) as scratch:
        save_clustering(clustering, scratch / CLUSTERING_FILE)
    return facts


def keep_labels(labels: np.ndarray, num_classes: int, images_sha256: str, store: Store) -> Path:
    """The labels as a clustering in the store; returns its file."""
    inputs = {"images": images_sha256, "labels": num_classes}
    path = store.path("clusterings", inputs)
    if store.facts(path) is None:
        keep(from_labels(labels, num_classes), path, inputs, store)
    return path / CLUSTERING_FILE
