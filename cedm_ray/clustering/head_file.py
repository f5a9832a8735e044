"""The TEMI head behind a clustering, on disk: with it, images that were not there at training get clusters too."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_assign import ROWS_OF_ONE_HEAD
from cedm_ray.clustering.temi_precision import fast_matmul
from cedm_ray.errors import UserError, one_line
from cedm_ray.weights.whole_file import whole_file

FORMAT = "cedm_ray.clustering.temi_head/1"
_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class TemiHead:
    """One head and what stands around it: from embeddings to the probabilities of the clusters.

    Raises:
        ValueError: If the parts do not fit one another.
    """

    heads: Heads
    """A single head, H = 1, in float32 on the host."""
    temperature: float
    """Divides the logits."""
    mean: Tensor | None
    """Mean of each feature over the training images, shape ``(D,)``; None where features are not standardised."""
    std: Tensor | None
    """Standard deviation of each feature, shape ``(D,)``."""

    def __post_init__(self) -> None:
        if len(self.heads.hidden_weight) != 1:
            raise ValueError(f"there are {len(self.heads.hidden_weight)} heads; one is due")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 and finite")
        shapes = [None if value is None else tuple(value.shape) for value in (self.mean, self.std)]
        if shapes not in ([None, None], [(self.dim,), (self.dim,)]):
            raise ValueError(f"mean and std have shapes {shapes}; both must be ({self.dim},), or both None")
        if self.std is not None and not bool((self.std > 0).all()):
            raise ValueError("std holds a value that is not above 0")

    @property
    def dim(self) -> int:
        """Features of an image, D."""
        return self.heads.hidden_weight.shape[2]

    @property
    def num_clusters(self) -> int:
        """Clusters, C."""
        return self.heads.last_direction.shape[1]


@torch.no_grad()
def head_probs(head: TemiHead, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probability of each cluster for each image, in float32 on the host.

    Args:
        head: The head.
        embeddings: Features as the backbone gives them, shape ``(N, D)``, float32.

    Returns:
        The softmax of the logits over the temperature, shape ``(N, C)``, float32. The largest of a row is the cluster,
        and its value the confidence.

    Raises:
        ValueError: If the embeddings are of another shape or dtype.

    Source: arXiv 2303.17896, Sec. 3.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != head.dim or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings are {embeddings.shape} {embeddings.dtype}; (N, {head.dim}) float32 is due")
    found = np.empty((len(embeddings), head.num_clusters), np.float32)
    with fast_matmul(_CPU, tf32=False):
        # In the blocks in which the training images are assigned, whose sums are the same ones then.
        for start in range(0, len(embeddings), ROWS_OF_ONE_HEAD):
            rows = slice(start, start + ROWS_OF_ONE_HEAD)
            x = torch.from_numpy(np.array(embeddings[rows]))
            if head.mean is not None and head.std is not None:
                x = x.sub_(head.mean).div_(head.std)
            found[rows] = torch.softmax(head.heads(x)[0] / head.temperature, dim=-1).numpy()
    return found


def save_head(head: TemiHead, path: Path) -> None:
    """Write a head; a reader sees either the whole file or none.

    Args:
        head: What to write.
        path: File to write, by convention ``*.safetensors``; its folder must exist. An older file is replaced.
    """
    scale = {} if head.mean is None or head.std is None else {"mean": head.mean, "std": head.std}
    tensors = {name: value.detach().contiguous() for name, value in {**head.heads.state_dict(), **scale}.items()}
    with whole_file(path) as partial:
        partial.write_bytes(save(tensors, metadata={"format": FORMAT, "temperature": repr(head.temperature)}))


def load_head(path: Path) -> TemiHead:
    """Read a head and check it.

    Args:
        path: File that :func:`save_head` wrote.

    Returns:
        The head, in float32 on the host.

    Raises:
        UserError: If the file is missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        wrong = [name for name, value in tensors.items() if value.dtype != torch.float32 or not value.isfinite().all()]
        if wrong:
            raise ValueError(f"{wrong[0]} is not finite float32")
        mean, std = tensors.pop("mean", None), tensors.pop("std", None)
        return TemiHead(_heads(tensors), float(metadata["temperature"]), mean, std)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        what = f"{path} does not hold a TEMI head ({one_line(error)})"
        raise UserError(f"{what}; remove it and run the search again") from error


def _heads(tensors: dict[str, Tensor]) -> Heads:
    num_heads, hidden_dim, in_dim = tensors["hidden_weight"].shape
    _, num_clusters, bottleneck_dim = tensors["last_direction"].shape
    heads = Heads(
        in_dim,
        num_clusters,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        bottleneck_dim=bottleneck_dim,
        generator=torch.Generator(),
    )
    heads.load_state_dict(tensors)
    return heads.requires_grad_(False)
