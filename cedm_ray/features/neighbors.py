"""Nearest neighbours by cosine, exact, with faiss."""

import importlib
import subprocess
import sys
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8192
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


def knn(embeddings: NDArray[np.float32], k: int = 50, *, use_gpu: bool | None = None) -> NDArray[np.int32]:
    """The k most similar other images of each image by the cosine of their embeddings, the most similar first.

    Args:
        embeddings: Shape ``(N, D)``, float32, finite. A zero vector is equally far from everything.
        k: Neighbours per image, in ``[1, N)``; the image itself is left out, its exact duplicates are not.
        use_gpu: Where to search; None for the GPU where faiss answers there.

    Returns:
        Indices, shape ``(N, k)``, int32.

    Raises:
        ValueError: If k or the embeddings are out of bounds.
        RuntimeError: If a GPU is demanded and none answers.
    """
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings are {embeddings.dtype} of shape {embeddings.shape}; float32 (N, D) is due")
    num_images, dim = embeddings.shape
    if not 1 <= k < num_images:
        raise ValueError(f"k is {k}; it must lie in [1, {num_images}), below the number of images")
    units = _units(embeddings)
    index = _index(dim, use_gpu)
    index.add(units)
    found = np.empty((num_images, k), dtype=np.int32)
    for start in range(0, num_images, _BLOCK):
        _, candidates = index.search(units[start : start + _BLOCK], k + 1)
        found[start : start + _BLOCK] = _without_self(candidates, start)
    return found


def _units(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows at length 1; zero rows stay zero."""
    largest = np.abs(embeddings).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("embeddings hold NaN or infinity; look at the backbone and its weights")
    scaled = embeddings / np.where(largest > 0, largest, 1)  # first, so that no square over- or underflows
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.ascontiguousarray(scaled / np.where(norms > 0, norms, 1), dtype=np.float32)


def _index(dim: int, use_gpu: bool | None) -> Any:
    # Imported here: faiss brings a second OpenMP runtime, which a process without it need not have.
    faiss = importlib.import_module("faiss")
    gpu = use_gpu is not False and faiss_device() == "cuda"
    if use_gpu and not gpu:
        raise RuntimeError("use_gpu is true, but no GPU answers faiss; leave it out to search on the CPU")
    return faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dim) if gpu else faiss.IndexFlatIP(dim)


def _without_self(candidates: NDArray[np.int64], start: int) -> NDArray[np.int64]:
    """Drop the image itself from its k + 1 candidates, or the last candidate where duplicates pushed it out."""
    own = candidates == np.arange(start, start + len(candidates))[:, None]
    own[~own.any(axis=1), -1] = True
    others: NDArray[np.int64] = candidates[~own]
    return others.reshape(len(candidates), -1)
