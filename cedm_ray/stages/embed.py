"""Images to embeddings: Ray Data streams them through a pool of backbones into Parquet, an index keeping the order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch

from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import IMAGES, PackedImages
from cedm_ray.features.backbones import PIXELS, BackboneSpec
from cedm_ray.features.neighbors import knn
from cedm_ray.features.pixels import pixel_stats
from cedm_ray.stages.board import Board
from cedm_ray.stages.context import Context

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of all images, shape ``(N, D)`` float32, in the order of the dataset, and what they were made from."""

    values: np.ndarray
    inputs: dict[str, Any]


def backbone_spec(config: SearchConfig, packed: PackedImages) -> BackboneSpec:
    """The backbone that the settings name, for these images."""
    weights = config.backbone_weights and config.backbone_weights.expanduser().absolute()
    stats = pixel_stats(packed.images) if config.backbone == PIXELS else None
    return BackboneSpec(config.backbone, weights, stats)


def read_images(batch: Batch, images: Path) -> Batch:
    """The images at the indices of a batch, from the packed file, which is mapped and not read whole."""
    index = batch["id"]
    return {"index": index, "image": np.load(images, mmap_mode="r")[index]}


class Embedder:
    """One copy of the backbone in an actor of the pool: batches of images in, batches of embeddings out."""

    def __init__(self, backbone: BackboneSpec, threads: int, board: Board, total: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = backbone.load(self._device)
        self._board, self._total = board, total

    def __call__(self, batch: Batch) -> Batch:
        images = torch.from_numpy(np.ascontiguousarray(batch["image"])).to(self._device)
        embedding = self._backbone(images).cpu().numpy()
        self._board.add("embed", "embeddings", len(embedding), self._total, "images")
        return {"index": batch["index"], "embedding": embedding}


def embed(ctx: Context) -> Embeddings:
    """The embeddings of the search's images, from the store or through the backbone."""
    name = ctx.config.backbone
    inputs = {"images": ctx.packed.facts.pixels_sha256, "backbone": name, "weights": ctx.weights_hash}
    path = ctx.store.path("embeddings", inputs)
    if ctx.store.facts(path) is None:
        with ctx.store.create(path, inputs, {"num_images": len(ctx.packed)}) as scratch:
            _stream(ctx, scratch)
    return Embeddings(_read(path), inputs)


def _stream(ctx: Context, out: Path) -> None:
    settings, num_images = ctx.config.embed, len(ctx.packed)
    # An operator that takes every CPU stops the stream for good, without a word: the reading tasks need one too.
    spare = max(ray.cluster_resources().get("CPU", 1.0) - 1.0, 0.5)
    cpus = min(settings.cpus_per_actor, spare / settings.num_actors)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.range(num_images, override_num_blocks=max(1, num_images // 2048))
    stream = rows.map_batches(
        read_images, batch_size=settings.batch_size, fn_kwargs={"images": ctx.images / IMAGES}, num_cpus=min(0.5, spare)
    ).map_batches(
        Embedder,
        batch_size=settings.batch_size,
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=cpus,
        num_gpus=ctx.shares.gpus_per_worker,
        fn_constructor_kwargs={
            "backbone": backbone_spec(ctx.config, ctx.packed),
            "threads": max(1, round(settings.cpus_per_actor)),
            "board": ctx.board,
            "total": num_images,
        },
    )
    try:
        stream.write_parquet(str(out), compression="zstd", row_group_size=5000)
    finally:
        ctx.board.remove("embed")


def _read(path: Path) -> np.ndarray:
    """Embeddings from Parquet in the order of their index, shape ``(N, D)`` float32."""
    table = pq.read_table(sorted(path.glob("*.parquet")), columns=["index", "embedding"])
    index = table["index"].to_numpy()
    if not np.array_equal(np.sort(index), np.arange(len(index))):
        raise RuntimeError(f"embeddings in {path} are not whole; remove that folder and run again")
    column = table["embedding"].combine_chunks()
    storage = getattr(column, "storage", column)  # a tensor column keeps its lists inside
    flat = storage.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    values = np.empty((len(index), len(flat) // len(index)), dtype=np.float32)
    values[index] = flat.reshape(len(index), -1)
    return values


def neighbors(ctx: Context, embeddings: Embeddings) -> np.ndarray:
    """The k nearest neighbours of each image by cosine, shape ``(N, k)`` int32, from the store or searched for."""
    inputs = {**embeddings.inputs, "k": ctx.config.num_neighbors}
    path = ctx.store.path("neighbors", inputs)
    if ctx.store.facts(path) is None:
        task = ray.remote(_search).options(num_cpus=ctx.shares.cpus_per_probe, num_gpus=ctx.shares.gpus_per_probe)
        with ctx.store.create(path, inputs, {}) as scratch:
            found = ray.get(task.remote(embeddings.values, ctx.config.num_neighbors))
            np.save(scratch / "neighbors.npy", found, allow_pickle=False)
    stored: np.ndarray = np.load(path / "neighbors.npy", allow_pickle=False)
    return stored


def _search(embeddings: np.ndarray, k: int) -> np.ndarray:
    return knn(embeddings, k)
