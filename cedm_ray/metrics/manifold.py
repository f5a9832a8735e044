"""Precision, recall, density and coverage: how far two sets of features share the space that each of them fills."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cedm_ray.errors import UserError, require
from cedm_ray.metrics.features import Features, blocks, check_features


@dataclass(frozen=True)
class Manifold:
    """What generated and real images share; the balls are those that reach to an image's k-th neighbour of its set."""

    precision: float
    """Share of the generated images that lie in the ball of some real image, in ``[0, 1]``."""
    recall: float
    """Share of the real images that lie in the ball of some generated image, in ``[0, 1]``."""
    density: float
    """Mean number of real images whose balls hold a generated one, over k; near 1 for equal sets, may exceed it."""
    coverage: float
    """Share of the real images whose ball holds a generated image, in ``[0, 1]``."""


def manifold_metrics(
    real: Features,
    generated: Features,
    num_neighbors: int = 5,
    *,
    block: int = 2048,
    device: torch.device | str = "cpu",
) -> Manifold:
    """Precision, recall, density and coverage of generated features.

    A ball is open: a point at the radius itself is outside, and an image with k or more copies in its own set, whose
    radius is 0, has an empty ball. Distances are computed in float64 and rounded to float32, so that equal distances
    tie.

    Args:
        real: Features of real images, shape ``(N, D)``.
        generated: Features of generated images, shape ``(M, D)``.
        num_neighbors: k, the neighbour that sets the radius of a ball; the image itself does not count.
        block: Images of each side that are compared at a time; memory grows with its square, not with N times M.
        device: Where to compute.

    Returns:
        The four values.

    Raises:
        UserError: If a set has fewer than ``num_neighbors`` + 1 images.
        ValueError: If ``num_neighbors`` or ``block`` is below 1, shapes do not match or a value is not finite.

    Source: arXiv 1904.06991, Eq. 1 and 2 (precision, recall), with strict inequality; arXiv 2002.09797, Sec. 3.2
    (density, coverage).
    """
    require(num_neighbors >= 1, "num_neighbors", num_neighbors, "be at least 1")
    check_features(block, real=real, generated=generated)
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= num_neighbors:
            raise UserError(
                f"{len(features)} {name} images are too few for num_neighbors = {num_neighbors}; at least "
                f"{num_neighbors + 1} are needed: score more images or lower num_neighbors"
            )
    real_radii, generated_radii = (_radii(each, num_neighbors, block, device) for each in (real, generated))
    in_real = torch.zeros(len(generated), dtype=torch.bool, device=device)
    in_generated, covered = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    num_inside = torch.zeros((), dtype=torch.int64, device=device)
    for rows, x in blocks(real, block, device):
        for columns, y in blocks(generated, block, device):
            distances = _distances(x, y)
            inside = distances < real_radii[rows, None]
            num_inside += inside.sum()
            in_real[columns] |= inside.any(0)
            covered[rows] |= inside.any(1)
            in_generated[rows] |= (distances < generated_radii[columns]).any(1)
    return Manifold(
        precision=_share(in_real),
        recall=_share(in_generated),
        density=(1 / num_neighbors) * (int(num_inside) / len(generated)),
        coverage=_share(covered),
    )


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``(B, C)``, float32, of ``x`` ``(B, D)`` and ``y`` ``(C, D)``, float64."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = torch.addmm(norms, x, y.T, alpha=-2)
    # |x|^2 + |y|^2 - 2xy of two equal vectors is rounding noise, up to D epsilon of the norms, instead of 0.
    squared.masked_fill_(squared <= norms.mul_(x.shape[1] * torch.finfo(torch.float64).eps), 0)
    return squared.float().sqrt_()


def _radii(features: Features, k: int, block: int, device: torch.device | str) -> Tensor:
    """Distance of each image to its k-th neighbour, shape ``(N,)``, float32."""
    nearest = torch.full((len(features), k), torch.inf, device=device)  # so far, of each image
    for rows, x in blocks(features, block, device):
        for columns, y in blocks(features[: rows.stop], block, device):  # each pair of blocks once
            distances = _distances(x, y)
            if rows == columns:
                distances.fill_diagonal_(torch.inf)  # an image is not its own neighbour
            else:
                nearest[columns] = _smallest(nearest[columns], distances.T)
            nearest[rows] = _smallest(nearest[rows], distances)
    return nearest.amax(1)


def _smallest(nearest: Tensor, distances: Tensor) -> Tensor:
    k = nearest.shape[1]
    return torch.cat((nearest, distances), 1).topk(k, dim=1, largest=False, sorted=False).values


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)
