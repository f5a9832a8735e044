"""Training of the denoiser as a generator over steps; the caller logs, saves and stops."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cedm_ray.diffusion.augment import augment
from cedm_ray.diffusion.ema import ema_beta, update_ema
from cedm_ray.diffusion.loss import Denoiser, edm_loss_per_pixel, sample_sigma
from cedm_ray.diffusion.order import EpochOrder
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net, local_batch
from cedm_ray.diffusion.streams import Purpose, torch_seed
from cedm_ray.diffusion.unet import NO_CONDITION

__all__ = ["NetSettings", "Progress", "TrainSettings", "TrainState", "build_net", "new_state", "train"]


@dataclass
class TrainState:
    """Everything that a run needs to go on, changed in place by `train`."""

    net: EDMPrecond
    """The network in training."""
    ema: EDMPrecond
    """Its moving average, the one to sample from; in eval mode, without gradients."""
    optimizer: torch.optim.Adam
    """Adam over ``net.parameters()``, in their order."""
    nimg: int
    """Images seen so far, over all processes."""


@dataclass(frozen=True)
class Progress:
    """What one step did."""

    nimg: int
    """Images seen so far, over all processes, this step included."""
    loss: Tensor
    """Loss of this process's part of the batch before the update, shape ``()``, on the training device."""
    lr: float
    """Learning rate of the step."""


def new_state(net: EDMPrecond) -> TrainState:
    """State of a run at its start; the moving average begins as a copy of the network.

    Args:
        net: Network with its initial weights, on the device to train on, the same in every process.
    """
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    # The learning rate is set at every step.
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    return TrainState(net.train(), ema, optimizer, nimg=0)


def train(
    state: TrainState,
    images: Tensor,
    class_index: Tensor | None,
    *,
    settings: TrainSettings,
    stop_nimg: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Progress]:
    """Train until ``stop_nimg`` images have been seen, one step for each item taken from the iterator.

    A step's images are found from ``(seed, nimg)``; its augmentation, noise levels and noise, its dropout, and which
    images lose their condition from ``(seed, nimg, rank)``. So a run that is saved, loaded and continued goes on bit
    for bit as if it had not been interrupted, on the same number of processes, and no generator's state is kept.
    Torch's global generators of the CPU and of the training device are left as they were. With torch.distributed
    initialised, every process calls this with the same state, and gradients are averaged over processes.

    Args:
        state: The run; changed in place, and whole again whenever a step has been yielded.
        images: Shape ``(N, C, R, R)``, uint8, on the CPU (it may be a memory map) or on the training device.
        class_index: Cluster of each image, shape ``(N,)``, int64; None for an unconditional network.
        settings: How to train.
        stop_nimg: Images after which to stop, counted from the start of the run; the last step may pass it.
        seed: Seed of the run.
        rank: This process, in ``[0, world_size)``.
        world_size: Number of processes.

    Returns:
        Iterator over steps.

    Raises:
        UserError: If ``total_batch`` cannot be split over the processes.
        ValueError: If images, clusters, settings, processes and network do not fit together.

    Source: arXiv 2206.00364, App. F.2; arXiv 2403.00570, App. B.
    """
    _check(state.net, images, class_index, settings, rank, world_size)
    return _steps(state, images, class_index, settings, stop_nimg, seed, rank, world_size)


def _steps(
    state: TrainState,
    images: Tensor,
    class_index: Tensor | None,
    settings: TrainSettings,
    stop_nimg: int,
    seed: int,
    rank: int,
    world_size: int,
) -> Iterator[Progress]:
    net = _wrap(state.net)
    order = EpochOrder(len(images), seed)
    batch = settings.total_batch
    local = local_batch(batch, world_size)
    while state.nimg < stop_nimg:
        chosen = order.take(state.nimg + rank * local, local)
        y = _to_device(images, chosen, net_device(state.net)).to(torch.float32) / 127.5 - 1
        clusters = None if class_index is None else _to_device(class_index, chosen, y.device)
        state.net.train()
        loss = _backward(net, state, y, clusters, settings, seed, rank)
        _clean_gradients(state.net)
        seen = state.nimg + batch
        lr = settings.lr * min(seen / max(settings.lr_rampup_kimg * 1000, 1.0), 1.0)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        beta = ema_beta(batch, seen, settings.ema_halflife_kimg * 1000, settings.ema_rampup_ratio)
        update_ema(state.ema, state.net, beta)
        state.nimg = seen
        yield Progress(seen, loss, lr)


def _backward(
    net: Denoiser,
    state: TrainState,
    y: Tensor,
    clusters: Tensor | None,
    settings: TrainSettings,
    seed: int,
    rank: int,
) -> Tensor:
    """Leave the gradients of the batch's loss in the parameters and return the loss, detached."""
    generator = torch.Generator(y.device)
    generator.manual_seed(torch_seed(seed, Purpose.STEP, state.nimg, rank))
    labels = None
    if settings.augment_prob > 0:
        y, labels = augment(y, settings.augment_prob, generator)
    elif state.net.augment_dim:
        labels = y.new_zeros(len(y), state.net.augment_dim)  # gives the unused weights a gradient, of zero
    clusters = _drop_labels(clusters, settings.label_dropout, torch_seed(seed, Purpose.LABEL_DROPOUT, state.nimg, rank))
    sigma = sample_sigma(len(y), settings.P_mean, settings.P_std, generator, y.device)
    noise = torch.randn(y.shape, generator=generator, device=y.device)
    state.optimizer.zero_grad(set_to_none=True)
    # Dropout draws from torch's global generator: it is seeded for the step and put back afterwards.
    with torch.random.fork_rng([y.device] if y.device.type == "cuda" else []):
        torch.manual_seed(torch_seed(seed, Purpose.DROPOUT, state.nimg, rank))
        pixels = edm_loss_per_pixel(net, y, sigma, noise, clusters, labels, sigma_data=settings.sigma_data)
        # Sum over pixels and channels, mean over the batch; averaged over processes it is the whole batch's loss.
        loss = pixels.sum() / len(y)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _drop_labels(clusters: Tensor | None, prob: float, seed: int) -> Tensor | None:
    """The clusters, each of them ``NO_CONDITION`` with probability ``prob``.

    Source: arXiv 2207.12598, Algorithm 1.
    """
    if clusters is None or prob == 0:
        return clusters
    generator = torch.Generator(clusters.device)
    generator.manual_seed(seed)
    dropped = torch.rand(clusters.shape, generator=generator, device=clusters.device) < prob
    return clusters.masked_fill(dropped, NO_CONDITION)


def _clean_gradients(net: EDMPrecond) -> None:
    # After the reduction over processes, so that every process cleans the same numbers.
    for parameter in net.parameters():
        if parameter.grad is not None:
            torch.nan_to_num_(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5)


def _wrap(net: EDMPrecond) -> Denoiser:
    if not dist.is_initialized():
        return net
    device = net_device(net)
    return DistributedDataParallel(
        net,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def net_device(net: EDMPrecond) -> torch.device:
    """Device that holds the network's parameters."""
    return next(net.parameters()).device


def _to_device(rows: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    part = rows[chosen.to(rows.device)]
    if part.device.type == "cpu" and device.type == "cuda":
        part = part.pin_memory()
    return part.to(device, non_blocking=True)


def _check(
    net: EDMPrecond,
    images: Tensor,
    class_index: Tensor | None,
    settings: TrainSettings,
    rank: int,
    world_size: int,
) -> None:
    expected = (net.img_channels, net.img_resolution, net.img_resolution)
    if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}, {images.dtype}; needed: (N, *{expected}), uint8")
    if (class_index is None) != (net.label_dim == 0):
        what = "None" if class_index is None else "given"
        raise ValueError(f"class_index is {what}, but the network has label_dim {net.label_dim}")
    if class_index is not None:
        if class_index.dtype != torch.int64 or class_index.shape != images.shape[:1]:
            raise ValueError(f"class_index has shape {tuple(class_index.shape)}, {class_index.dtype}; "
                             f"needed: ({len(images)},), int64")  # fmt: skip
        low, high = int(class_index.min()), int(class_index.max())
        if low < 0 or high >= net.label_dim:
            raise ValueError(f"class_index ranges from {low} to {high}; it must lie in [0, {net.label_dim})")
    if settings.augment_prob > 0 and net.augment_dim == 0:
        raise ValueError(f"augment_prob is {settings.augment_prob}, but the network takes no augment labels: "
                         "build it with augment=True or set augment_prob to 0")  # fmt: skip
    if settings.sigma_data != net.sigma_data:
        raise ValueError(f"sigma_data is {settings.sigma_data}; the network was built with {net.sigma_data}")
    processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if (rank, world_size) != processes:
        raise ValueError(f"rank {rank} of {world_size} is asked for, but torch.distributed says {processes[0]} "
                         f"of {processes[1]}")  # fmt: skip
    local_batch(settings.total_batch, world_size)
