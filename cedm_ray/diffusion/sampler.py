"""Generating images: batch after batch from the numbers of the images to their pixels."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cedm_ray.diffusion.compiled import Compiled
from cedm_ray.diffusion.compute import Precision
from cedm_ray.diffusion.heun import SamplingDenoiser, heun_sample
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sample_batch import even_batch, fitting_batch
from cedm_ray.diffusion.starts import draw_conditions, initial_noise, onto
from cedm_ray.errors import require


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: x 127.5 + 128, clipped to 0..255, fraction dropped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


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
        batch_size: Images that are computed together; None for equal batches, as large as
            :func:`~cedm_ray.diffusion.sample_batch.fitting_batch` says.
        num_steps: Steps of the integration.
        guidance: As for :func:`~cedm_ray.diffusion.heun.heun_sample`.
        device: Where to compute.
        precision: As for ``heun_sample``. Where fp16 overflows, a RuntimeWarning says so, and the batch and those after
            it are computed in float32.
        compile: Compile the network, for batches of one size: a smaller last one is filled up with images that are
            thrown away. Where it cannot be compiled, a RuntimeWarning says why, and it is computed without.

    Yields:
        Images, shape ``(B, C, R, R)``, uint8, on ``device``, in the order of ``indices``.

    Raises:
        ValueError: If ``batch_size`` is below 1, or ``cluster_probs`` does not fit the network.
    """
    _check(net, cluster_probs, batch_size)
    if batch_size is None:
        batch_size = even_batch(len(indices), max(fitting_batch(net, device) // (2 if guidance else 1), 1))
    denoiser: SamplingDenoiser = Compiled(net, "sampling") if compile else net
    starts = _starts(net, seed, indices, cluster_probs, batch_size, device, fill_up=compile)
    start = next(starts, None)
    while start is not None:
        images = _in_eval_mode(net, denoiser, start, num_steps, guidance, precision)
        # Here, and not after the caller has waited for the images: a GPU still computes, and the drawing takes no time.
        following = next(starts, None)
        if precision == "fp16" and not bool(images.isfinite().all()):
            warnings.warn(
                "the network's values leave the range of fp16; images are sampled in float32, slower: sample in bf16",
                RuntimeWarning,
                stacklevel=2,
            )
            precision = "float32"
            images = _in_eval_mode(net, denoiser, start, num_steps, guidance, precision)
        yield to_uint8(images[: start.count])
        start = following


def _check(net: EDMPrecond, cluster_probs: Tensor | None, batch_size: int | None) -> None:
    expected = None if net.label_dim == 0 else (net.label_dim,)
    given = None if cluster_probs is None else tuple(cluster_probs.shape)
    if given != expected:
        raise ValueError(f"cluster_probs has shape {given}; the network has label_dim {net.label_dim}: pass {expected}")
    require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "be at least 1")


def _starts(
    net: EDMPrecond,
    seed: int,
    indices: Sequence[int],
    cluster_probs: Tensor | None,
    batch_size: int,
    device: torch.device | str,
    *,
    fill_up: bool,
) -> Iterator[_Start]:
    """The batches one after another, each drawn when it is asked for; with ``fill_up`` all of one size."""
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    for first in range(0, len(indices), batch_size):
        part = indices[first : first + batch_size]
        size = min(batch_size, len(indices)) if fill_up else len(part)
        filled = [part[i % len(part)] for i in range(size)]
        noise = initial_noise(seed, filled, shape, device)
        clusters = None if cluster_probs is None else onto(draw_conditions(seed, filled, cluster_probs), device)
        yield _Start(len(part), noise, clusters)


def _in_eval_mode(
    net: EDMPrecond, denoiser: SamplingDenoiser, start: _Start, num_steps: int, guidance: float, precision: Precision
) -> Tensor:
    training = net.training
    net.eval()
    try:
        return heun_sample(denoiser, start.noise, start.clusters, num_steps, guidance=guidance, precision=precision)
    finally:
        net.train(training)
