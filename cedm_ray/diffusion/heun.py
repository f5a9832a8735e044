"""The deterministic sampler of EDM: from noise along the probability flow to an image."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cedm_ray.diffusion.compute import Precision, autocast
from cedm_ray.diffusion.unet import NO_CONDITION

SamplingDenoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""D(x, sigma, class_index); an `EDMPrecond`, bare or compiled."""


def sigma_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of the sampler, from ``sigma_max`` down to ``sigma_min`` and then 0.

    Returns:
        Shape ``(num_steps + 1,)``, float64.

    Raises:
        ValueError: If ``num_steps`` is below 1, or not 0 < sigma_min < sigma_max.

    Source: arXiv 2206.00364, Eq. 5.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min}, sigma_max {sigma_max}; needed: 0 < sigma_min < sigma_max")
    share = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + share * (low - high)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def heun_sample(
    net: SamplingDenoiser,
    latents: Tensor,
    class_index: Tensor | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    guidance: float = 0.0,
    precision: Precision = "float32",
) -> Tensor:
    """Integrate the probability flow with Heun's second-order method; 2 num_steps - 1 network calls.

    Nothing in it waits for a GPU.

    Args:
        net: The denoiser, in eval mode.
        latents: Unit Gaussian noise, shape ``(N, C, R, R)``.
        class_index: Cluster of each image, shape ``(N,)``, int64, or None.
        num_steps: Steps of the integration.
        sigma_min: Lowest noise level above 0.
        sigma_max: Noise level of the start.
        rho: Exponent of the spacing; higher puts more steps near ``sigma_min``.
        guidance: w of classifier-free guidance, D = (1 + w) D_cond - w D_uncond. Other than 0, it asks for a network
            that was trained with label dropout, and each call computes 2 N images.
        precision: Products within the network; its preconditioning is float32 and the integration float64 in any case.

    Returns:
        Images, shape ``(N, C, R, R)``, float64, about [-1, 1].

    Raises:
        ValueError: If the guidance is not finite, or is not 0 and there is no condition to guide to.

    Source: arXiv 2206.00364, Algorithm 1; arXiv 2207.12598, Eq. 6 (guidance).
    """
    if not math.isfinite(guidance) or (guidance and class_index is None):
        raise ValueError(f"guidance is {guidance}; it must be finite, and 0 without a condition")
    # The levels stay on the CPU: a level that is compared or read there never waits for a GPU.
    levels: list[float] = sigma_steps(num_steps, sigma_min, sigma_max, rho).tolist()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        with autocast(x.device, precision):
            return _denoise(net, x, sigma, class_index, guidance)

    x: Tensor = latents.to(torch.float64) * levels[0]
    for now, after in pairwise(levels):
        slope = (x - denoise(x, now)) / now
        euler = x + (after - now) * slope
        if after > 0:
            mean_slope = (slope + (euler - denoise(euler, after)) / after) / 2
            x = x + (after - now) * mean_slope
        else:
            x = euler
    return x


def _denoise(net: SamplingDenoiser, x: Tensor, sigma: float, class_index: Tensor | None, guidance: float) -> Tensor:
    noisy = x.to(torch.float32)
    level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
    if guidance == 0 or class_index is None:
        denoised: Tensor = net(noisy, level, class_index)
        return denoised.to(torch.float64)
    both = torch.cat([class_index, torch.full_like(class_index, NO_CONDITION)])
    with_condition, without = net(noisy.repeat(2, 1, 1, 1), level.repeat(2), both).to(torch.float64).chunk(2)
    guided: Tensor = (1 + guidance) * with_condition - guidance * without
    return guided
