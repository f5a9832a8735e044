"""The denoising loss of EDM and the noise levels it is trained at."""

from collections.abc import Callable

import torch
from torch import Tensor

TrainingDenoiser = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""D(x, sigma, class_index, augment_labels); an `EDMPrecond`, bare or wrapped for several processes."""


def sample_sigma(
    n: int, P_mean: float, P_std: float, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """Draw noise levels, ln(sigma) ~ N(P_mean, P_std^2).

    Args:
        n: How many.
        P_mean: Mean of ln(sigma).
        P_std: Standard deviation of ln(sigma).
        generator: Source of randomness on ``device``.
        device: Where the result lies.

    Returns:
        sigma, shape ``(n,)``, float32.

    Source: arXiv 2206.00364, Table 1, noise distribution.
    """
    return (torch.randn(n, generator=generator, device=device) * P_std + P_mean).exp()


def loss_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight of the squared error at a noise level, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    Source: arXiv 2206.00364, Table 1, loss weighting.
    """
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def edm_loss_per_pixel(
    net: TrainingDenoiser,
    y: Tensor,
    sigma: Tensor,
    noise: Tensor,
    class_index: Tensor | None = None,
    augment_labels: Tensor | None = None,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Weighted squared error of the denoiser, for each pixel.

    Args:
        net: The denoiser.
        y: Clean images, shape ``(N, C, H, W)``, float32 in [-1, 1].
        sigma: Noise level of each image, shape ``(N,)``.
        noise: Unit Gaussian noise, shape of ``y``.
        class_index: Cluster of each image, shape ``(N,)``, int64, or None.
        augment_labels: Augmentation of each image, shape ``(N, augment_dim)``, or None.
        sigma_data: Standard deviation of the data.

    Returns:
        weight(sigma) (D(y + sigma noise; sigma) - y)^2, shape ``(N, C, H, W)``.

    Source: arXiv 2206.00364, Eq. 2 and Table 1.
    """
    s = sigma[:, None, None, None]
    denoised = net(y + noise * s, sigma, class_index, augment_labels)
    return loss_weight(s, sigma_data) * (denoised - y).square()
