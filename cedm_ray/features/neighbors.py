"""Nearest neighbours by cosine, with faiss: exact up to a stated number of images, approximate above it."""

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cedm_ray.features.inverted_lists import MIN_RECALL, search_lists
from cedm_ray.features.unit_rows import BLOCK, UnitRows, mask_of_others

# Images up to which the search is exact. Its time grows with the square of their number: extrapolated from 50,000,
# 200,000 images of 768 dimensions take some five to ten minutes on two CPU cores. A million on a GPU is reckoned from
# rates of products, at a few minutes, and was not measured.
EXACT_UP_TO = {"cpu": 200_000, "cuda": 1_000_000}

_log = logging.getLogger(__name__)
# In a process of its own: where driver and build do not fit, faiss ends the whole process rather than raise.
_GPU_PROBE = """
import faiss, numpy as np
index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), 2)
index.add(np.eye(2, dtype=np.float32))
assert (index.search(np.eye(2, dtype=np.float32), 1)[1][:, 0] == [0, 1]).all()
"""


def faiss_device() -> Literal["cpu", "cuda"]:
    """Where faiss searches: on the GPU only if it really finds a neighbour there, else on the CPU."""
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "GpuIndexFlatIP") or faiss.get_num_gpus() < 1:
        return "cpu"
    try:
        done = subprocess.run([sys.executable, "-c", _GPU_PROBE], capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "cpu"
    return "cuda" if done.returncode == 0 else "cpu"


@dataclass(frozen=True)
class Neighbors:
    """Nearest neighbours, and how they were found."""

    indices: NDArray[np.int32]
    """The k most similar other images of each image, the most similar first, shape ``(N, k)``."""
    method: Literal["exact", "approximate"]
    recall: float
    """Share of them that are as similar as the k-th exact one, measured on random images; 1 where all are exact."""


def search_neighbors(
    embeddings: NDArray[np.float32],
    k: int = 50,
    *,
    use_gpu: bool | None = None,
    method: Literal["auto", "exact", "approximate"] = "auto",
) -> Neighbors:
    """The k most similar other images of each image by the cosine of their embeddings.

    Args:
        embeddings: Shape ``(N, D)``, float32, finite; may be mapped from a file. A zero vector is equally far from
            everything.
        k: Neighbours per image, in ``[1, N)``; the image itself is left out, its exact duplicates are not.
        use_gpu: Where to search; None for the GPU where faiss answers there.
        method: ``exact``, ``approximate`` with a recall of at least ``MIN_RECALL``, or ``auto``: exact up to
            ``EXACT_UP_TO`` images. Where an approximate search of that recall would take as long as an exact one, the
            exact one is done.

    Raises:
        ValueError: If k or the embeddings are out of bounds.
        RuntimeError: If a GPU is demanded and none answers.
    """
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings are {embeddings.dtype} of shape {embeddings.shape}; float32 (N, D) is due")
    if not 1 <= k < len(embeddings):
        raise ValueError(f"k is {k}; it must lie in [1, {len(embeddings)}), below the number of images")
    gpu = use_gpu is not False and faiss_device() == "cuda"
    if use_gpu and not gpu:
        raise RuntimeError("use_gpu is true, but no GPU answers faiss; leave it out to search on the CPU")
    rows = UnitRows(embeddings)
    large = len(rows) > EXACT_UP_TO["cuda" if gpu else "cpu"]
    if method == "approximate" or (method == "auto" and large):
        found = search_lists(rows, k, gpu=gpu)
        if found is not None:
            return Neighbors(found[0], "approximate", found[1])
        _log.info("an approximate search of recall %g would take as long as an exact one, which is done", MIN_RECALL)
    return Neighbors(_exact(rows, k, gpu), "exact", 1.0)


def knn(
    embeddings: NDArray[np.float32],
    k: int = 50,
    *,
    use_gpu: bool | None = None,
    method: Literal["auto", "exact", "approximate"] = "auto",
) -> NDArray[np.int32]:
    """The indices of ``search_neighbors``, which see; shape ``(N, k)``, int32, the most similar first."""
    return search_neighbors(embeddings, k, use_gpu=use_gpu, method=method).indices


def _exact(rows: UnitRows, k: int, gpu: bool) -> NDArray[np.int32]:
    units = rows[:]
    search = _searcher(units, gpu)
    found = np.empty((len(units), k), dtype=np.int32)
    for start in range(0, len(units), BLOCK):
        candidates = search(units[start : start + BLOCK], k + 1)
        own = np.arange(start, start + len(candidates))
        found[own] = candidates[mask_of_others(candidates, own)].reshape(-1, k)
    return found


def _searcher(units: NDArray[np.float32], gpu: bool) -> Callable[[NDArray[np.float32], int], NDArray[np.int64]]:
    # Imported here: faiss brings a second OpenMP runtime, which a process without it need not have.
    faiss: Any = importlib.import_module("faiss")
    if not gpu:  # without an index, which would be a copy of all
        return lambda queries, k: faiss.knn(queries, units, k, faiss.METRIC_INNER_PRODUCT)[1]
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), units.shape[1])
    index.add(units)
    return lambda queries, k: index.search(queries, k)[1]
