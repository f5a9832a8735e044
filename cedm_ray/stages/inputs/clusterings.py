"""Clusterings of the embeddings by TEMI or k-means: what decides one, how it is made, and what is kept of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cedm_ray.clustering.agreement import clustering_quality
from cedm_ray.clustering.clustering_io import CLUSTERING_FILE, HEAD_FILE, MOSAIC_FILE, save_clustering
from cedm_ray.clustering.head_file import TemiHead, save_head
from cedm_ray.clustering.kmeans import fit_kmeans
from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.types import Clustering
from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import PackedImages
from cedm_ray.devices import default_device
from cedm_ray.features.neighbors import faiss_device
from cedm_ray.report.mosaic import cluster_mosaic
from cedm_ray.settings import Grouping
from cedm_ray.stages.cluster.board import Beat, Board
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.inputs.images import images_here
from cedm_ray.stages.storage.store import Store


@dataclass(frozen=True)
class ClusteringJob:
    """One clustering of the embeddings: everything that decides it, and where it is kept."""

    grouping: Grouping
    """temi or kmeans."""
    num_clusters: int
    settings: TemiSettings
    seed: int
    images: Path
    """Folder of the packed images, whose labels, if there are any, measure the clustering."""
    inputs: dict[str, Any]
    path: Path

    @property
    def file(self) -> Path:
        return self.path / CLUSTERING_FILE

    @property
    def terms(self) -> str:
        """What tells it from others of the same C: heads and seed, and gamma where it is not the usual one."""
        if self.grouping == "kmeans":
            return f"seed {self.seed}"
        gamma = "" if self.settings.gamma == TemiSettings.gamma else f"gamma {self.settings.gamma:g}, "
        return f"{gamma}{self.settings.num_heads} heads, seed {self.seed}"


def clustering_job(
    config: SearchConfig, embedding_inputs: Mapping[str, Any], images: Path, num_clusters: int, store: Store
) -> ClusteringJob:
    """The clustering of these embeddings into so many clusters, with the settings of the search."""
    inputs = {**embedding_inputs, "seed": config.seed, "num_clusters": num_clusters}
    if config.grouping == "kmeans":
        inputs["kmeans"] = 1  # to be raised when the same embeddings become other clusters
    else:
        inputs |= {"k": config.num_neighbors, "temi": asdict(config.temi), "trainer": 3}  # to be raised likewise
    path = store.path("clusterings", inputs)
    grouping: Grouping = "kmeans" if config.grouping == "kmeans" else "temi"
    return ClusteringJob(grouping, num_clusters, config.temi, config.seed, images, inputs, path)


def fit(job: ClusteringJob, embeddings: Embeddings, cpus: float, board: Board) -> dict[str, Any]:
    """Fit a clustering unless it is stored, in the process that this is called in.

    Args:
        job: What to fit.
        embeddings: The embeddings and their neighbours.
        cpus: Threads to use.
        board: Where progress is told.

    Returns:
        The facts of the clustering, ``utilization_ratio`` among them.
    """
    store = Store(job.path.parents[1])
    facts = store.facts(job.path)
    if facts is not None:
        return facts
    threads = max(1, round(cpus))
    torch.set_num_threads(threads)
    started_s = time.monotonic()
    heads: list[float] = []
    head: TemiHead | None = None
    if job.grouping == "kmeans":
        clustering = fit_kmeans(
            embeddings.values, job.num_clusters, seed=job.seed, threads=threads, use_gpu=faiss_device() == "cuda"
        )
    else:
        clustering, heads, head = _temi(job, embeddings, board)
    packed = images_here(job.images)
    seconds = time.monotonic() - started_s
    return keep(clustering, job.path, job.inputs, store, packed, head, head_utilization=heads, seconds=seconds)


def _temi(job: ClusteringJob, embeddings: Embeddings, board: Board) -> tuple[Clustering, list[float], TemiHead]:
    """A TEMI clustering, the utilization ratio of each head, and the head that made it."""
    device = default_device()
    beat = Beat(board, str(job.path), f"clustering into {job.num_clusters}", job.settings.epochs, "epochs")
    try:
        trainer = TemiTrainer(
            embeddings.values, embeddings.neighbors, job.num_clusters, job.settings, seed=job.seed, device=device
        )
        for progress in trainer.epochs():
            beat(progress.epoch)
        return trainer.clustering(), trainer.head_utilization().tolist(), trainer.head()
    finally:
        beat.close()


def keep(
    clustering: Clustering,
    path: Path,
    inputs: dict[str, Any],
    store: Store,
    packed: PackedImages,
    head: TemiHead | None = None,
    *,
    head_utilization: Sequence[float] = (),
    seconds: float | None = None,
) -> dict[str, Any]:
    """Put a clustering into the store with its quality, its head and a mosaic of its images; returns its facts.

    Labels only measure: nothing of a search reads ``quality`` but the log.
    """
    quality = clustering_quality(clustering, packed.class_labels)
    metrics = quality.metrics()
    if head_utilization:
        metrics["mean_utilization_ratio"] = statistics.fmean(head_utilization)
    facts = {
        "num_clusters": clustering.num_clusters,
        "num_used": quality.num_used,
        "utilization_ratio": quality.utilization_ratio,
        "best_head": clustering.best_head,
        "quality": metrics,
        "head_utilization": list(head_utilization),
        "head_losses": clustering.head_losses.tolist(),
        **({} if seconds is None else {"seconds": seconds}),
    }
    with store.create(path, inputs, facts) as scratch:
        save_clustering(clustering, scratch / CLUSTERING_FILE)
        if head is not None:
            save_head(head, scratch / HEAD_FILE)
        mosaic = cluster_mosaic(packed.images, clustering.assignments, num_clusters=clustering.num_clusters)
        mosaic.save(scratch / MOSAIC_FILE)
    return facts
