"""Images of each cluster side by side, which is what a person judges a clustering by."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.errors import require
from cedm_ray.report.image_rows import ImageRow, check_images, labelled_rows


def cluster_mosaic(
    images: NDArray[np.uint8],
    assignments: NDArray[np.integer],
    *,
    num_clusters: int,
    rows: int = 20,
    columns: int = 12,
    seed: int = 0,
) -> Image.Image:
    """Random images of clusters, one row per cluster, from the largest cluster to the smallest.

    Rows are used clusters only: all of them, or, if they are more than ``rows``, some spread evenly over the order of
    their sizes, the largest and the smallest among them. Columns are drawn at random, without replacement, so that bad
    members show as often as they are; a cluster with fewer leaves cells blank. What a cluster shows depends on the
    seed and its members alone, not on which other clusters are shown.

    Args:
        images: Shape ``(N, C, H, W)``, uint8, with 1 or 3 channels; may be mapped, as only those shown are read.
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, num_clusters)``.
        num_clusters: Clusters that were available, used or not.
        rows: Most clusters to show.
        columns: Most images to show of a cluster.
        seed: Seed of the choice of images, at least 0.

    Returns:
        An RGB image; left of each row stand the cluster's index and its number of images.

    Raises:
        ValueError: If the images are not of that kind, or a value lies outside its bounds.
    """
    _check(images, assignments, num_clusters)
    for name, value, least in (("rows", rows, 1), ("columns", columns, 1), ("seed", seed, 0)):
        require(value >= least, name, value, f"be at least {least}")
    sizes = np.bincount(assignments, minlength=num_clusters)
    shown, used = _spread(sizes, rows), int(np.count_nonzero(sizes))
    chosen = "All" if len(shown) == used else f"{len(shown):,} of the"
    return labelled_rows(
        [
            ImageRow(
                f"cluster {cluster}\n{sizes[cluster]:,} image{'s' if sizes[cluster] > 1 else ''}",
                _members(images, assignments, cluster, columns, seed),
            )
            for cluster in shown
        ],
        f"{chosen} {used:,} used clusters (C = {num_clusters:,}), largest first; random images",
    )


def _check(images: NDArray[np.uint8], assignments: NDArray[np.integer], num_clusters: int) -> None:
    check_images(images)
    if assignments.shape != images.shape[:1] or not np.issubdtype(assignments.dtype, np.integer):
        due = f"integers, ({images.shape[0]},) is due"
        raise ValueError(f"assignments are {assignments.dtype} of shape {assignments.shape}; {due}")
    require(num_clusters >= 1, "num_clusters", num_clusters, "be at least 1")
    for value in (int(assignments.min()), int(assignments.max())):
        require(0 <= value < num_clusters, "an assignment", value, f"lie in [0, {num_clusters})")


def _spread(sizes: NDArray[np.integer], rows: int) -> list[int]:
    """Used clusters, at most ``rows`` of them at even steps from the largest to the smallest."""
    ranked = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    steps = np.linspace(0, len(ranked) - 1, min(rows, len(ranked)))
    return [int(cluster) for cluster in ranked[steps.round().astype(np.int64)]]


def _members(
    images: NDArray[np.uint8], assignments: NDArray[np.integer], cluster: int, columns: int, seed: int
) -> NDArray[np.uint8]:
    members = np.flatnonzero(assignments == cluster)
    random = np.random.default_rng((seed, cluster))
    chosen: NDArray[np.uint8] = images[random.choice(members, min(columns, len(members)), replace=False)]
    return chosen
