"""What trained heads make of the images: the cluster of each, and the clusters that each head uses."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_features import Features
from cedm_ray.clustering.temi_gradient import head_blocks
from cedm_ray.clustering.temi_precision import fast_matmul

ROWS_OF_ONE_HEAD = 8192
"""Images that one head computes at a time."""
_ROWS_OF_ALL_HEADS = 1024


@torch.no_grad()
def assign(head: Heads, features: Features, temperature: float) -> tuple[Tensor, Tensor]:
    """The most probable cluster of each image.

    Args:
        head: A single head, H = 1, on the device of the features.
        features: Of N images.
        temperature: Divides the logits.

    Returns:
        Clusters, shape ``(N,)``, int64, and their probabilities, shape ``(N,)``, float32 in ``(0, 1]``.
    """
    with fast_matmul(features.device, tf32=False):
        found = [
            torch.softmax(head(block)[0] / temperature, dim=-1).max(dim=-1)
            for block in features.blocks(ROWS_OF_ONE_HEAD)
        ]
    # Rounding can take a sure cluster's probability a hair above 1.
    max_prob = torch.cat([part.values for part in found]).clamp_max(1)
    return torch.cat([part.indices for part in found]), max_prob


@torch.no_grad()
def head_utilization(heads: Heads, features: Features) -> NDArray[np.float64]:
    """Share of the clusters that each head gives at least one image, in one pass over the images.

    Args:
        heads: H heads of C clusters, on the device of the features.
        features: Of N images.

    Returns:
        r_C of each head, shape ``(H,)``, float64 in ``(0, 1]``.

    Source: arXiv 2403.00570, Sec. 3.3.
    """
    num_heads, num_clusters, _ = heads.last_direction.shape
    hidden_dim = heads.hidden_bias.shape[1]
    used = torch.zeros(num_heads, num_clusters, dtype=torch.bool, device=features.device)
    with fast_matmul(features.device, tf32=False):
        for x in features.blocks(_ROWS_OF_ALL_HEADS):
            for block in head_blocks(num_heads, len(x), hidden_dim, features.device):
                used[block].scatter_(1, heads.activations(x, block).logits.argmax(dim=-1), True)
    share: NDArray[np.float64] = used.double().mean(dim=1).cpu().numpy()
    return share
