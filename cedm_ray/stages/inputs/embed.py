"""Images to embeddings: Ray Data streams them through a pool of backbones into Parquet, an index keeping the order."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import IMAGES, PackedImages
from cedm_ray.devices import default_device
from cedm_ray.features.backbones import PIXELS, BackboneSpec
from cedm_ray.features.neighbors import search_neighbors
from cedm_ray.features.pixels import pixel_stats
from cedm_ray.settings import EmbedSettings
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.read_images import read_images
from cedm_ray.stages.storage.bucket import address
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.bucket_files import fetch_files, forget_files
from cedm_ray.stages.storage.paths import absolute
from cedm_ray.stages.storage.store import Store

VALUES, NEIGHBORS = "embeddings.npy", "neighbors.npy"
ROWS = 1024  # of a block: written as one row group, read as one batch
CALL_BATCHES, CALL_BYTES = 8, 64 * 2**20
"""Most that an actor is given at once: batches of the backbone, and bytes of images."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of all images and their nearest neighbours, in files that every process maps into its memory."""

    file: Path
    neighbors_file: Path
    inputs: dict[str, Any]
    """What the embeddings were made from."""

    @property
    def values(self) -> NDArray[np.float32]:
        """Shape ``(N, D)``, float32, in the order of the dataset; mapped read-only."""
        return _mapped(self.file)

    @property
    def neighbors(self) -> NDArray[np.int32]:
        """The k nearest other images of each image by cosine, shape ``(N, k)``, int32; mapped read-only."""
        return _mapped(self.neighbors_file)


def _mapped(file: Path) -> np.ndarray:
    found: np.ndarray = np.load(here(file), mmap_mode="r", allow_pickle=False)
    return found


def backbone_spec(config: SearchConfig, packed: PackedImages) -> BackboneSpec:
    """The backbone that the settings name, for these images."""
    stats = pixel_stats(packed.images) if config.backbone == PIXELS else None
    return BackboneSpec(config.backbone, absolute(config.backbone_weights), stats)


class Embedder:
    """One copy of the backbone in an actor of the pool: several batches of images in, their embeddings out."""

    def __init__(self, backbone: BackboneSpec, batch_size: int, threads: int, board: Board, total: int) -> None:
        torch.set_num_threads(threads)
        self._device = default_device()
        self._backbone, self._batch_size = backbone.load(self._device), batch_size
        self._board, self._total = board, total

    def __call__(self, batch: Batch) -> Batch:
        # Sent and fetched once for all batches: between them a GPU waits neither for a copy nor for Ray.
        images = torch.from_numpy(np.ascontiguousarray(batch["image"])).to(self._device)
        found = []
        for part in torch.split(images, self._batch_size):
            found.append(self._backbone(part))
            self._board.add("embed", "embeddings", len(part), self._total, "images")
        return {"index": batch["index"], "embedding": torch.cat(found).cpu().numpy()}


def embed(ctx: Context, spec: BackboneSpec | None = None, weights_hash: str | None = None) -> Embeddings:
    """The embeddings of the search's images, from the store or through a backbone.

    The memory of this stage does not grow with the number of images: the driver holds one block of rows, each actor
    a few batches, and Ray Data what lies between its operators, for which it waits when its share of the object store
    is used up.

    Args:
        ctx: The search.
        spec: The backbone (None: the one of the settings).
        weights_hash: What identifies its weights.
    """
    spec = spec or backbone_spec(ctx.config, ctx.packed)
    inputs = {
        "images": ctx.packed.facts.pixels_sha256,
        "backbone": spec.name,
        "weights": weights_hash or ctx.weights_hash,
        # A backbone computes in bfloat16 on a GPU: such embeddings are others.
        "dtype": "bfloat16" if ctx.shares.gpus_per_worker and spec.name != PIXELS else "float32",
    }
    path = ctx.store.path("embeddings", inputs)
    if ctx.store.facts(path) is None:
        with ctx.store.create(path, inputs, {"num_images": len(ctx.packed)}) as scratch:
            _stream(ctx, spec, scratch)
            gather(scratch, scratch / VALUES, len(ctx.packed))
    neighbor_inputs = {**inputs, "k": ctx.config.num_neighbors}
    neighbors_file = ctx.store.path("neighbors", neighbor_inputs) / NEIGHBORS
    return Embeddings(path / VALUES, neighbors_file, inputs)


def _stream(ctx: Context, spec: BackboneSpec, out: Path) -> None:
    settings, num_images = ctx.config.embed, len(ctx.packed)
    # An operator that takes every CPU stops the stream for good, without a word: the reading tasks need one too.
    spare = max(ray.cluster_resources().get("CPU", 1.0) - 1.0, 0.5)
    cpus = min(settings.cpus_per_actor, spare / settings.num_actors)
    ray.data.DataContext.get_current().enable_progress_bars = False
    at_once = _at_once(settings, num_images, ctx.packed.images[0].nbytes)
    rows = ray.data.range(num_images, override_num_blocks=max(1, num_images // 2048))
    stream = rows.map_batches(
        read_images,
        batch_size=at_once,
        fn_kwargs={"file": ctx.images / IMAGES, "column": "id"},
        num_cpus=min(0.5, spare),
    ).map_batches(
        Embedder,
        batch_size=at_once,
        compute=ray.data.ActorPoolStrategy(size=settings.num_actors),
        num_cpus=cpus,
        num_gpus=ctx.shares.gpus_per_worker,
        fn_constructor_kwargs={
            "backbone": spec,
            "batch_size": settings.batch_size,
            "threads": max(1, round(settings.cpus_per_actor)),
            "board": ctx.board,
            "total": num_images,
        },
    )
    try:
        stream.write_parquet(address(out), compression="zstd", row_group_size=ROWS)
        fetch_files(out)
        forget_files(out)
    finally:
        ctx.board.remove("embed")


def _at_once(settings: EmbedSettings, num_images: int, image_bytes: int) -> int:
    """Images that an actor is given at once; few enough that all actors end at about the same time."""
    shared = num_images // (16 * settings.num_actors * settings.batch_size)
    fitting = CALL_BYTES // (settings.batch_size * image_bytes)
    return settings.batch_size * max(1, min(CALL_BATCHES, shared, fitting))


def gather(folder: Path, out: Path, num_images: int) -> None:
    """Bring embeddings from Parquet files into one array in the order of their index; one block is held at a time.

    Args:
        folder: Has the Parquet files, with the columns ``index`` and ``embedding``.
        out: File to write: shape ``(N, D)``, float32, in NumPy's format.
        num_images: Images that there must be, N.

    Raises:
        RuntimeError: If an image is missing or there twice.
    """
    values: np.memmap[Any, np.dtype[np.float32]] | None = None
    seen = np.zeros(num_images, dtype=bool)
    for file in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=["index", "embedding"]):
            index = batch["index"].to_numpy()
            rows = _rows(batch["embedding"])
            if values is None:
                values = open_memmap(out, mode="w+", dtype=np.float32, shape=(num_images, rows.shape[1]))
                _take_room(out)
            if seen[index].any() or len(np.unique(index)) != len(index):
                raise RuntimeError(f"embeddings in {folder} hold an image twice")
            values[index], seen[index] = rows, True
    if values is None or not seen.all():
        raise RuntimeError(f"embeddings in {folder} are not whole: {int(seen.sum())} of {num_images} images")
    values.flush()


def _take_room(file: Path) -> None:
    """Give a file that is mapped into memory its place on the disk: a write without it kills the process.

    Raises:
        OSError: If the disk is full.
    """
    with open(file, "r+b") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot be asked
                raise OSError(error.errno, error.strerror, str(file)) from error


def _rows(column: pa.Array) -> NDArray[np.float32]:
    storage = getattr(column, "storage", column)  # a tensor column keeps its lists inside
    flat = storage.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    rows: NDArray[np.float32] = flat.reshape(len(column), -1)
    return rows


def find_neighbors(ctx: Context, embeddings: Embeddings) -> None:
    """Make the file of the nearest neighbours, unless it is in the store."""
    path = embeddings.neighbors_file.parent
    if ctx.store.facts(path) is None:
        task = ray.remote(_search).options(num_cpus=ctx.shares.cpus_per_probe, num_gpus=ctx.shares.gpus_per_probe)
        ray.get(task.remote(embeddings, ctx.config.num_neighbors, ctx.store))
    facts = ctx.store.facts(path) or {}
    if facts.get("method") == "approximate":
        ctx.terminal.line(f"  the neighbours are approximate: {facts['recall']:.1%} of the nearest ones are found")


def _search(embeddings: Embeddings, k: int, store: Store) -> None:
    found = search_neighbors(embeddings.values, k)
    facts = {"method": found.method, "recall": found.recall}
    with store.create(embeddings.neighbors_file.parent, {**embeddings.inputs, "k": k}, facts) as scratch:
        np.save(scratch / NEIGHBORS, found.indices, allow_pickle=False)
