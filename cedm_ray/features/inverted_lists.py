"""Approximate nearest neighbours: only the lists of images that lie near a query are searched, at a measured recall."""

import importlib
import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.features.unit_rows import BLOCK, UnitRows, mask_of_others

MIN_RECALL = 0.95
_QUERIES = 500  # on which the recall is measured: its standard error is below 0.01
_TRAINING_IMAGES = 64  # per list
_FIRST_PROBES = 8
# Of the lists. An image in a list is compared some fifteen times as slowly as one in a product of matrices, so that an
# exact search takes no longer than one of more lists than this.
_LARGEST_SHARE = 1 / 16
_TIE = 1e-6  # of cosine: products of one pair of rows in another order differ by less
_SEED = 0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    """Other rows ``(n, k)``, int64, the most similar first, and their cosines, float32; -1 where a list gave none."""

    indices: NDArray[np.int64]
    cosines: NDArray[np.float32]


def search_lists(rows: UnitRows, k: int, *, gpu: bool) -> tuple[NDArray[np.int32], float] | None:
    """The k most similar other rows of each row, all but a few of them, by faiss's inverted lists.

    The rows are dealt to about ``4 sqrt(N)`` lists by spherical k-means, and those in the lists nearest to a query are
    compared with it. How many lists those are is found by doubling, until the recall of 500 random rows, against their
    exact neighbours, is at least ``MIN_RECALL``. The same rows give the same neighbours.

    Args:
        rows: What is searched, N rows.
        k: Neighbours per row, below N.
        gpu: Whether to search on the GPU.

    Returns:
        Indices ``(N, k)``, int32, and the recall: the share of neighbours found that are as similar as the k-th exact
        one. None if so many lists would be needed that an exact search is as quick.
    """
    rng = np.random.default_rng(_SEED)
    index = _filled_index(rows, gpu, rng)
    recall = _set_probes(index, rows, k, _sample(rng, len(rows), _QUERIES))
    if recall < MIN_RECALL:
        return None
    indices = np.empty((len(rows), k), dtype=np.int32)
    short = []
    for start, block in rows.blocks():
        own = np.arange(start, start + len(block))
        found = _search(index, block, own, k)
        indices[own] = found.indices
        short.append(own[(found.indices < 0).any(axis=1)])
    missing = np.concatenate(short)  # the lists probed for them hold fewer than k others
    for start in range(0, len(missing), BLOCK):
        some = missing[start : start + BLOCK]
        indices[some] = exact(rows, some, k).indices
    return indices, recall


def exact(rows: UnitRows, queries: NDArray[np.int64], k: int) -> _Found:
    """The exact neighbours of some rows, on the CPU; a block of all rows is held at a time."""
    faiss = importlib.import_module("faiss")
    units = rows[queries]
    heap = faiss.ResultHeap(len(units), k + 1, keep_max=True)
    for start, block in rows.blocks():
        cosines, indices = faiss.knn(units, block, min(k + 1, len(block)), faiss.METRIC_INNER_PRODUCT)
        heap.add_result(cosines, indices + start)
    heap.finalize()
    return _without(heap.I, heap.D, queries)


def _sample(rng: np.random.Generator, num_rows: int, wanted: int) -> NDArray[np.int64]:
    picked: NDArray[np.int64] = np.sort(rng.choice(num_rows, min(wanted, num_rows), replace=False))
    return picked


def _filled_index(rows: UnitRows, gpu: bool, rng: np.random.Generator) -> Any:
    faiss = importlib.import_module("faiss")
    num_lists = max(1, min(round(4 * math.sqrt(len(rows))), len(rows) // 4))
    if gpu:
        index = faiss.GpuIndexIVFFlat(
            faiss.StandardGpuResources(), rows.dim, num_lists, faiss.METRIC_INNER_PRODUCT, faiss.GpuIndexIVFFlatConfig()
        )
    else:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.dim), rows.dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = _SEED, True
    index.cp.min_points_per_centroid = 1  # below its default faiss warns, and nothing more
    index.train(rows[_sample(rng, len(rows), _TRAINING_IMAGES * num_lists)])
    for _, block in rows.blocks():
        index.add(block)
    return index


def _set_probes(index: Any, rows: UnitRows, k: int, queries: NDArray[np.int64]) -> float:
    """Let the index probe enough lists, but not more than a certain share of them; the recall that it has then."""
    units, truth = rows[queries], exact(rows, queries, k)
    num_probes, recall = _FIRST_PROBES, 0.0
    while recall < MIN_RECALL and num_probes <= _LARGEST_SHARE * index.nlist:
        index.nprobe = num_probes
        found = _search(index, units, queries, k)
        recall = float((found.cosines >= truth.cosines[:, -1:] - _TIE).mean())
        _log.info("recall %.4f of %d neighbours with %d of %d lists", recall, k, num_probes, index.nlist)
        num_probes *= 2
    return recall


def _search(index: Any, units: NDArray[np.float32], own: NDArray[np.int64], k: int) -> _Found:
    cosines, indices = index.search(units, k + 1)
    return _without(indices, cosines, own)


def _without(indices: NDArray[np.int64], cosines: NDArray[np.float32], own: NDArray[np.int64]) -> _Found:
    kept = mask_of_others(indices, own)
    return _Found(indices[kept].reshape(len(own), -1), cosines[kept].reshape(len(own), -1))
