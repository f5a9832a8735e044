"""k-means on unit-length features: the plain way of grouping that TEMI is compared with."""

import hashlib
import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.clustering.types import Clustering, make_clustering
from cedm_ray.errors import UserError, require

_BLOCK = 8192
_MAX_SEED = 2**31 - 2**20  # a C int in faiss, which adds to it at every redo


def fit_kmeans(
    embeddings: NDArray[np.float32],
    num_clusters: int,
    *,
    seed: int,
    num_iterations: int = 50,
    num_redos: int = 3,
    threads: int = 1,
    use_gpu: bool = False,
) -> Clustering:
    """Group images by k-means on their features at length 1, every cluster used.

    At length 1 a squared distance is ``2 - 2 cos``, so that images are compared by the cosine, as they are for TEMI's
    neighbours, and no image counts for more because its feature is long. The centroids are plain means, not put back
    to length 1: the objective stays the sum of squared distances to them. Centroids start by k-means++, all images
    take part in every iteration, and each image goes to the centroid nearest to it after the last one.

    Args:
        embeddings: Features, shape ``(N, D)``, float32, finite; may be read-only. A zero vector stays zero.
        num_clusters: Clusters C, in ``[2, N]``.
        seed: Seed of the starting centroids, in ``[0, 2**31 - 2**20)``.
        num_iterations: Iterations of each start.
        num_redos: Starts, of which the one with the lowest objective counts.
        threads: CPU threads of faiss.
        use_gpu: Whether to search the nearest centroids on the GPU.

    Returns:
        The clustering with r_C = 1, without head losses, whose ``max_prob`` is 1. On a CPU the same arguments give
        the same clustering.

    Raises:
        UserError: If there are fewer than C distinct features.
        ValueError: If an argument lies outside its bounds.
        RuntimeError: If a GPU is demanded and faiss sees none.

    Source: Lloyd, IEEE Trans. Inf. Theory 28, 1982; k-means++: Arthur and Vassilvitskii, SODA 2007.
    """
    if embeddings.ndim != 2 or embeddings.dtype != np.float32 or embeddings.shape[1] == 0:
        raise ValueError(f"embeddings are {embeddings.dtype} of shape {embeddings.shape}; float32 (N, D) is due")
    require(2 <= num_clusters <= len(embeddings), "num_clusters", num_clusters, f"lie in [2, {len(embeddings)}]")
    require(0 <= seed < _MAX_SEED, "seed", seed, f"lie in [0, {_MAX_SEED})")
    for name, value in (("num_iterations", num_iterations), ("num_redos", num_redos), ("threads", threads)):
        require(value >= 1, name, value, "be at least 1")
    units = _units(embeddings)
    _require_distinct(units, num_clusters)
    # Imported here: faiss brings a second OpenMP runtime, which a process without it need not have.
    faiss = importlib.import_module("faiss")
    settings = faiss.ClusteringParameters()
    settings.seed, settings.niter, settings.nredo = seed, num_iterations, num_redos
    settings.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    settings.min_points_per_centroid = 1  # below its default faiss warns, and nothing more
    settings.max_points_per_centroid = -(-len(units) // num_clusters)  # all images; beyond this faiss takes a sample
    index = _index(faiss, units.shape[1], use_gpu)
    centroids, assignments = _train(faiss, units, num_clusters, settings, index, threads)
    return make_clustering(_fill_empty(units, centroids, assignments), num_clusters)


def _train(
    faiss: Any, units: NDArray[np.float32], num_clusters: int, settings: Any, index: Any, threads: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Centroids, shape ``(C, D)``, and the nearest one of each image, shape ``(N,)``."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        clustering = faiss.Clustering(units.shape[1], num_clusters, settings)
        clustering.train(units, index)
        centroids = faiss.vector_float_to_array(clustering.centroids).reshape(num_clusters, -1)
        index.reset()
        index.add(centroids)
        blocks = [index.search(units[start : start + _BLOCK], 1)[1] for start in range(0, len(units), _BLOCK)]
    finally:
        faiss.omp_set_num_threads(before)
    return centroids, np.concatenate(blocks)[:, 0]


def _index(faiss: Any, dim: int, use_gpu: bool) -> Any:
    if not use_gpu:
        return faiss.IndexFlatL2(dim)
    if not hasattr(faiss, "GpuIndexFlatL2") or faiss.get_num_gpus() < 1:
        raise RuntimeError("use_gpu is true, but faiss sees no GPU; leave it out to compute on the CPU")
    return faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), dim)


def _fill_empty(
    units: NDArray[np.float32], centroids: NDArray[np.float32], assignments: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Give each empty cluster the image farthest from its centroid as a new centroid, and the images nearest to that.

    An image that lies on its centroid never moves, so a cluster filled here stays filled, and after at most C rounds
    none is empty. Among C distinct features and fewer used centroids some image always lies off its centroid.
    """
    num_clusters = len(centroids)
    if len(np.unique(assignments)) == num_clusters:
        return assignments
    assignments = assignments.copy()
    distances = _squared_distances(units, centroids, assignments)
    while (empty := np.flatnonzero(np.bincount(assignments, minlength=num_clusters) == 0)).size:
        farthest = int(distances.argmax())
        if distances[farthest] == 0:
            raise ValueError(f"there are fewer distinct features than clusters, {num_clusters}")
        to_farthest = _squared_distances(units, units[farthest : farthest + 1], np.zeros_like(assignments))
        nearer = to_farthest < distances
        assignments[nearer] = empty[0]
        distances[nearer] = to_farthest[nearer]
    return assignments


def _squared_distances(
    units: NDArray[np.float32], centroids: NDArray[np.float32], assignments: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distance of each image to its centroid, shape ``(N,)``: 0 for equal vectors and no others."""
    distances = np.empty(len(units))
    for start in range(0, len(units), _BLOCK):
        part = slice(start, start + _BLOCK)
        difference = (units[part] - centroids[assignments[part]]).astype(np.float64)  # whose squares do not underflow
        distances[part] = np.einsum("nd,nd->n", difference, difference)
    return distances


def _units(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows at length 1; zero rows stay zero."""
    largest = np.abs(embeddings).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("embeddings hold NaN or infinity; look at the backbone and its weights")
    scaled = embeddings / np.where(largest > 0, largest, 1)  # first, so that no square over- or underflows
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    units = scaled / np.where(norms > 0, norms, 1)
    return np.ascontiguousarray(units + 0.0, dtype=np.float32)  # + 0 turns -0 into 0, the same vector in other bytes


def _require_distinct(units: NDArray[np.float32], num_clusters: int) -> None:
    seen: set[bytes] = set()
    for row in units:
        seen.add(hashlib.blake2b(row, digest_size=16).digest())
        if len(seen) == num_clusters:
            return
    raise UserError(
        f"{len(units)} images have only {len(seen)} distinct features; {num_clusters} clusters need as many: "
        f"ask for at most {len(seen)} clusters, or look for duplicate images"
    )
