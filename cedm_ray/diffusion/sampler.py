"""Deterministic sampling: from unit noise and a cluster to an image."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cedm_ray.diffusion.compiled import Compiled
from cedm_ray.diffusion.compute import Precision, autocast
from cedm_ray.diffusion.fitting import even_batch, fitting_batch
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.streams import Purpose, numpy_stream
from cedm_ray.diffusion.unet import NO_CONDITION

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
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
    net: Denoiser,
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
            slope = (slope + (euler - denoise(euler, after)) / after) / 2
            euler = x + (after - now) * slope
        x = euler
    return x


def _denoise(net: Denoiser, x: Tensor, sigma: float, class_index: Tensor | None, guidance: float) -> Tensor:
    noisy = x.to(torch.float32)
    level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
    if guidance == 0 or class_index is None:
        denoised: Tensor = net(noisy, level, class_index)
        return denoised.to(torch.float64)
    both = torch.cat([class_index, torch.full_like(class_index, NO_CONDITION)])
    with_condition, without = net(noisy.repeat(2, 1, 1, 1), level.repeat(2), both).to(torch.float64).chunk(2)
    guided: Tensor = (1 + guidance) * with_condition - guidance * without
    return guided


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: x 127.5 + 128, clipped to 0..255, fraction dropped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Unit Gaussian noise of the images ``indices``; image i depends on ``(seed, i)`` alone.

    Args:
        seed: Seed of the set of images.
        indices: Which images, each in ``[0, 2^64)``.
        shape: Shape of one image.
        device: Where the result lies; the numbers are drawn on the CPU and so are the same on every device.

    Returns:
        Shape ``(len(indices), *shape)``, float32.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(noise, indices, strict=True):
        numpy_stream(seed, Purpose.NOISE, index).standard_normal(dtype=np.float32, out=row)
    return _onto(torch.from_numpy(noise), device)


def _onto(rows: Tensor, device: torch.device | str) -> Tensor:
    """The rows on the device; a GPU fetches them in its turn, and neither waits for the other."""
    if torch.device(device).type != "cuda":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def draw_conditions(seed: int, indices: Sequence[int], cluster_probs: Tensor) -> Tensor:
    """Draw the cluster of each image from q(c); image i depends on ``(seed, i)`` and q alone.

    The draw inverts the cumulative distribution at one uniform number from a stream of its own: the noise of an
    image is the same whatever the clustering, so that grids of different clusterings compare image by image.

    Args:
        seed: Seed of the set of images.
        indices: Which images.
        cluster_probs: q(c), shape ``(C,)``, non-negative; it is normalised to sum 1.

    Returns:
        Shape ``(len(indices),)``, int64 in ``[0, C)``, on the CPU; a cluster of probability 0 is never drawn.

    Raises:
        ValueError: If ``cluster_probs`` is negative, not finite, or sums to 0.

    Source: arXiv 2403.00570, Sec. 3.2.
    """
    probs = cluster_probs.detach().to("cpu", torch.float64).numpy()
    if probs.ndim != 1 or not np.isfinite(probs).all() or (probs < 0).any() or probs.sum() <= 0:
        raise ValueError("cluster_probs must be one row of finite, non-negative numbers with a positive sum")
    cumulative = probs.cumsum()
    # Divided by its own last entry it ends at exactly 1, so no uniform number falls behind the last used cluster.
    cumulative /= cumulative[-1]
    uniform = np.array([numpy_stream(seed, Purpose.CONDITION, index).random() for index in indices])
    return torch.from_numpy(np.searchsorted(cumulative, uniform, side="right").astype(np.int64))


@dataclass(frozen=True)
class _Start:
    """What a batch starts from."""

    count: int
    """Images that are asked for; the rows after them fill the batch up."""
    noise: Tensor
    clusters: Tensor | None


@torch.no_grad()
def generate(
    net: EDMPrecond,
    *,
    seed: int,
    indices: Sequence[int],
    cluster_probs: Tensor | None,
    batch_size: int | None,
    num_steps: int = 18,
    guidance: float = 0.0,
    device: torch.device | str,
    precision: Precision = "float32",
    compile: bool = False,
) -> Iterator[Tensor]:
    """Generate the images ``indices`` of the set ``seed``, one batch after another.

    Args:
        net: The denoiser, on ``device``; it is used in eval mode, and its mode is restored after each batch. On a GPU
            it is fastest with channels innermost (``net.to(memory_format=torch.channels_last)``).
        seed: Seed of the set of images.
        indices: Which images; split them over processes as you like, image i stays the same.
        cluster_probs: q(c), shape ``(label_dim,)``; None for an unconditional network.
        batch_size: Images that are computed together; None for equal batches, as large as :func:`fitting_batch` says.
        num_steps: Steps of the integration.
        guidance: As for :func:`heun_sample`.
        device: Where to compute.
        precision: As for :func:`heun_sample`. Where fp16 overflows, a RuntimeWarning says so, and the batch and those
            after it are computed in float32.
        compile: Compile the network, for batches of one size: a smaller last one is filled up with images that are
            thrown away. Where it cannot be compiled, a RuntimeWarning says why, and it is computed without.

    Yields:
        Images, shape ``(B, C, R, R)``, uint8, on ``device``, in the order of ``indices``.

    Raises:
        ValueError: If ``batch_size`` is below 1, or ``cluster_probs`` does not fit the network.
    """
    expected = None if net.label_dim == 0 else (net.label_dim,)
    given = None if cluster_probs is None else tuple(cluster_probs.shape)
    if given != expected:
        raise ValueError(f"cluster_probs has shape {given}; the network has label_dim {net.label_dim}: pass {expected}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if batch_size is None:
        batch_size = even_batch(len(indices), max(fitting_batch(net, device) // (2 if guidance else 1), 1))
    denoiser: Denoiser = Compiled(net, "sampling") if compile else net

    def start_of(first: int) -> _Start:
        part = indices[first : first + batch_size]
        filled = [part[i % len(part)] for i in range(min(batch_size, len(indices)) if compile else len(part))]
        noise = initial_noise(seed, filled, (net.img_channels, net.img_resolution, net.img_resolution), device)
        clusters = None if cluster_probs is None else _onto(draw_conditions(seed, filled, cluster_probs), device)
        return _Start(len(part), noise, clusters)

    firsts = range(0, len(indices), batch_size)
    following = start_of(0) if firsts else None
    for first in firsts:
        assert following is not None
        start = following
        images = _in_eval_mode(net, denoiser, start, num_steps, guidance, precision)
        # Here, and not after the caller has waited for the images: a GPU still computes, and the drawing takes no time.
        following = start_of(first + batch_size) if first + batch_size < len(indices) else None
        if precision == "fp16" and not bool(images.isfinite().all()):
            warnings.warn(
                "the network's values leave the range of fp16; images are sampled in float32, slower: sample in bf16",
                RuntimeWarning,
                stacklevel=2,
            )
            precision = "float32"
            images = _in_eval_mode(net, denoiser, start, num_steps, guidance, precision)
        yield to_uint8(images[: start.count])


def _in_eval_mode(
    net: EDMPrecond, denoiser: Denoiser, start: _Start, num_steps: int, guidance: float, precision: Precision
) -> Tensor:
    training = net.training
    net.eval()
    try:
        return heun_sample(denoiser, start.noise, start.clusters, num_steps, guidance=guidance, precision=precision)
    finally:
        net.train(training)
