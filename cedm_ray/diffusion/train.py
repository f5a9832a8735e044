"""Training of the denoiser as a generator over steps; the caller logs, saves and stops."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cedm_ray.devices import net_device
from cedm_ray.diffusion.augment import Filters, augment
from cedm_ray.diffusion.compute import Compute
from cedm_ray.diffusion.ema import ema_beta, update_ema
from cedm_ray.diffusion.image_source import ImageSource
from cedm_ray.diffusion.loss import sample_sigma
from cedm_ray.diffusion.passes import Draw, Passes
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import TrainSettings, local_batch
from cedm_ray.diffusion.streams import Purpose, torch_seed
from cedm_ray.diffusion.train_state import TrainState, lay_out
from cedm_ray.diffusion.unet import NO_CONDITION

INIT_SCALE = 1024.0  # of fp16's loss; being summed over pixels, it overflows at torch's default in the first steps


@dataclass(frozen=True)
class Progress:
    """What one step did."""

    nimg: int
    """Images seen so far, over all processes, this step included."""
    loss: Tensor
    """Loss of this process's part of the batch before the update, shape ``()``, on the training device."""
    lr: float
    """Learning rate of the step."""


def train(
    state: TrainState,
    source: ImageSource,
    *,
    settings: TrainSettings,
    stop_nimg: int,
    seed: int,
    compute: Compute = Compute(),  # noqa: B008  frozen
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Progress, None, None]:
    """Train until ``stop_nimg`` images have been seen, one step for each item taken from the iterator.

    A step's images are found from ``(seed, nimg)``; its augmentation, noise levels and noise, its dropout, and which
    images lose their condition from ``(seed, nimg, rank)``. So a run that is saved, loaded and continued goes on bit
    for bit as if it had not been interrupted, on the same number of processes and computed in the same way, and no
    generator's state is kept. Torch's global generators of the CPU and of the training device are left as they were.
    With torch.distributed initialised, every process calls this with the same state, and gradients are averaged over
    processes. Nothing in a step waits for a GPU; reading a loss does.

    Args:
        state: The run; changed in place, and whole again whenever a step has been yielded.
        source: The images, and the cluster of each one unless the network is unconditional.
        settings: How to train.
        stop_nimg: Images after which to stop, counted from the start of the run; the last step may pass it.
        seed: Seed of the run.
        compute: Precision, memory layout, compilation; float32 and eager unless told otherwise.
        rank: This process, in ``[0, world_size)``.
        world_size: Number of processes.

    Returns:
        Iterator over steps; closed, it frees what it has read ahead.

    Raises:
        UserError: If ``total_batch`` cannot be split over the processes.
        ValueError: If images, clusters, settings, processes and network do not fit together.

    Source: arXiv 2206.00364, App. F.2; arXiv 2403.00570, App. B.
    """
    _check(state.net, source, settings, rank, world_size)
    return _steps(state, source, settings, stop_nimg, seed, compute, rank, world_size)


def _steps(
    state: TrainState,
    source: ImageSource,
    settings: TrainSettings,
    stop_nimg: int,
    seed: int,
    compute: Compute,
    rank: int,
    world_size: int,
) -> Generator[Progress, None, None]:
    batch = settings.total_batch
    local = local_batch(batch, world_size)
    lay_out(state, channels_last=compute.channels_last)
    if compute.precision != "fp16":
        state.scaler = None  # of an earlier leg: it would leave steps out in place of cleaning their gradients
    elif state.scaler is None:
        state.scaler = torch.amp.GradScaler(net_device(state.net).type, init_scale=INIT_SCALE)
    passes = Passes(state.net, compute, local, settings.sigma_data)
    filters = Filters.of(state.net.img_resolution, state.net.img_resolution, net_device(state.net))
    # Closed with the training, and not when the garbage is collected: a stream has tasks and threads of its own.
    with closing(source.batches(seed, state.nimg + rank * local, local, batch)) as batches:
        while state.nimg < stop_nimg:
            images, clusters = next(batches)
            draw = _draw(state, images, clusters, settings, filters, seed, rank)
            loss = _backward(passes, state, draw, seed, rank)
            seen = state.nimg + batch
            lr = settings.lr * min(seen / max(settings.lr_rampup_kimg * 1000, 1.0), 1.0)
            _update(state, lr)
            beta = ema_beta(batch, seen, settings.ema_halflife_kimg * 1000, settings.ema_rampup_ratio)
            update_ema(state.ema, state.net, beta)
            state.nimg = seen
            yield Progress(seen, loss, lr)


def _draw(
    state: TrainState,
    images: Tensor,
    clusters: Tensor | None,
    settings: TrainSettings,
    filters: Filters,
    seed: int,
    rank: int,
) -> Draw:
    y = images.to(torch.float32) / 127.5 - 1
    generator = torch.Generator(y.device)
    generator.manual_seed(torch_seed(seed, Purpose.STEP, state.nimg, rank))
    augment_labels = None
    if settings.augment_prob > 0:
        y, augment_labels = augment(y, settings.augment_prob, generator, filters)
    elif state.net.augment_dim:
        augment_labels = y.new_zeros(len(y), state.net.augment_dim)  # gives the unused weights a gradient, of zero
    dropping = torch_seed(seed, Purpose.LABEL_DROPOUT, state.nimg, rank)
    clusters = _drop_conditions(clusters, settings.label_dropout, dropping)
    sigma = sample_sigma(len(y), settings.P_mean, settings.P_std, generator, y.device)
    noise = torch.randn(y.shape, generator=generator, device=y.device)
    return Draw(y, sigma, noise, clusters, augment_labels)


def _backward(passes: Passes, state: TrainState, draw: Draw, seed: int, rank: int) -> Tensor:
    """Leave the gradients of the batch's loss in the parameters and return the loss, detached."""
    state.net.train()
    state.optimizer.zero_grad(set_to_none=True)
    # Dropout draws from torch's global generator: it is seeded for the step and put back afterwards.
    with torch.random.fork_rng([draw.y.device] if draw.y.device.type == "cuda" else []):
        torch.manual_seed(torch_seed(seed, Purpose.DROPOUT, state.nimg, rank))
        return passes(draw, lambda loss: loss if state.scaler is None else state.scaler.scale(loss))


def _update(state: TrainState, lr: float) -> None:
    """One step of Adam."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if state.scaler is None:
        _clean_gradients(state.net)
        state.optimizer.step()
        return
    # An overflow is not cleaned but skipped, and the scale lowered; the fused optimizer is told so on the device.
    state.scaler.unscale_(state.optimizer)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _drop_conditions(clusters: Tensor | None, prob: float, seed: int) -> Tensor | None:
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


def _check(net: EDMPrecond, source: ImageSource, settings: TrainSettings, rank: int, world_size: int) -> None:
    expected = (net.img_channels, net.img_resolution, net.img_resolution)
    if source.image_shape != expected:
        raise ValueError(f"images have shape {source.image_shape}; the network takes {expected}")
    if (source.class_index is None) != (net.label_dim == 0):
        what = "None" if source.class_index is None else "given"
        raise ValueError(f"class_index is {what}, but the network has label_dim {net.label_dim}")
    if source.class_index is not None:
        low, high = int(source.class_index.min()), int(source.class_index.max())
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
