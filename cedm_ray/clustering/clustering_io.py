"""Clusterings on disk: one safetensors file each."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cedm_ray.clustering.types import Clustering
from cedm_ray.errors import UserError
from cedm_ray.weights.whole_file import whole_file

CLUSTERING_FILE, HEAD_FILE, MOSAIC_FILE = "clustering.safetensors", "head.safetensors", "clusters.png"
"""What a clustering, its TEMI head and the picture of its clusters are called in a folder."""
_DTYPES = {"assignments": np.int64, "cluster_probs": np.float64, "max_prob": np.float32, "head_losses": np.float32}


def save_clustering(clustering: Clustering, path: Path) -> None:
    """Write a clustering; a reader sees either the whole file or none.

    Args:
        clustering: What to write.
        path: File to write, by convention ``*.safetensors``; its folder must exist. An older file is replaced.
    """
    tensors = {name: np.ascontiguousarray(getattr(clustering, name), dtype) for name, dtype in _DTYPES.items()}
    best_head = "" if clustering.best_head is None else str(clustering.best_head)
    metadata = {"num_clusters": str(clustering.num_clusters), "best_head": best_head}
    with whole_file(path) as partial:
        # Not save_file: its files are closed to everyone but their owner, whatever the umask says.
        partial.write_bytes(save(tensors, metadata=metadata))


def load_clustering(path: Path, *, num_images: int | None = None) -> Clustering:
    """Read a clustering and check it.

    Args:
        path: File that :func:`save_clustering` wrote.
        num_images: Images that the dataset has, N; None to accept any number.

    Returns:
        The clustering.

    Raises:
        UserError: If the file is missing, is not such a file, contradicts itself, or is for another number of images.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _DTYPES}
        wrong = [name for name, dtype in _DTYPES.items() if tensors[name].dtype != dtype]
        if wrong:
            raise ValueError(f"{wrong[0]} has dtype {tensors[wrong[0]].dtype}")
        best_head = int(metadata["best_head"]) if metadata["best_head"] else None
        clustering = Clustering(int(metadata["num_clusters"]), **tensors, best_head=best_head)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not hold a clustering ({error}); remove it to have it computed again") from error
    if num_images is not None and len(clustering.assignments) != num_images:
        raise UserError(
            f"{path} groups {len(clustering.assignments)} images; the dataset has {num_images}; "
            "remove it to have it computed again"
        )
    return clustering
