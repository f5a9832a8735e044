"""How near generated images lie to their nearest training images: signs of copying."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.metrics.features import Features, blocks, check_features


def top1_similarity(
    queries: Features,
    references: Features,
    *,
    block: int = 2048,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Cosine similarity of each query to the reference that is nearest in direction.

    Computed in float64 and rounded to float32, so that copies have exactly 1 and tie.

    Args:
        queries: Features, shape ``(N, D)``.
        references: Features, shape ``(M, D)``.
        block: Images of each side that are compared at a time; memory grows with its square, not with N times M.
        device: Where to compute.

    Returns:
        The highest similarities, shape ``(N,)``, float32 in ``[-1, 1]``.

    Raises:
        ValueError: If shapes do not match, a value is not finite or a vector is zero, which has no direction.
    """
    check_features(block, queries=queries, references=references)
    best = torch.full((len(queries),), -1.0, dtype=torch.float64, device=device)
    for rows, x in blocks(queries, block, device):
        x = _directions(x, "queries", rows.start)
        for columns, y in blocks(references, block, device):
            cosines = x @ _directions(y, "references", columns.start).T
            best[rows] = torch.maximum(best[rows], cosines.amax(1))
    return best.clamp_(-1, 1).float().cpu().numpy()


def mean_similarity_score(top1: NDArray[np.float32]) -> float:
    """Mean over generated images of the similarity to the nearest training image; high values hint at copying.

    Args:
        top1: Similarities of :func:`top1_similarity`, shape ``(N,)``.

    Returns:
        The mean, in ``[-1, 1]``.

    Raises:
        ValueError: If there are none or one is not finite.
    """
    return float(_checked(top1, "top1").mean(dtype=np.float64))


def similarity_auroc(generated_top1: NDArray[np.float32], test_top1: NDArray[np.float32]) -> float:
    """Chance that a generated image lies nearer to the training images than a held-out one does; ties count half.

    It is the area under the ROC curve that tells generated images (positives) from test images by their similarity
    to the nearest training image.

    Args:
        generated_top1: Similarities of generated to training images, shape ``(N,)``.
        test_top1: Similarities of held-out to training images, shape ``(M,)``.

    Returns:
        0.5 where both lie equally near, towards 1 where generated images lie nearer (memorised), towards 0 where they
        lie farther.

    Raises:
        ValueError: If a set is empty or a value is not finite.
    """
    from sklearn.metrics import roc_auc_score

    generated, test = _checked(generated_top1, "generated_top1"), _checked(test_top1, "test_top1")
    is_generated = np.concatenate((np.ones(len(generated)), np.zeros(len(test))))
    return float(roc_auc_score(is_generated, np.concatenate((generated, test))))


def _directions(x: Tensor, name: str, start: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not norms.all():
        row = start + int((norms == 0).nonzero()[0, 0])
        raise ValueError(f"{name} row {row} is a zero vector, which has no direction; look at the image and detector")
    return x / norms


def _checked(top1: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    if top1.ndim != 1 or len(top1) == 0 or not np.isfinite(top1).all():
        raise ValueError(f"{name} must be finite similarities of shape (N,), N at least 1; its shape is {top1.shape}")
    return top1
