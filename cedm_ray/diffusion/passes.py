"""The network's passes of a training step: wrapped for several processes, compiled, in parts, scaled."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cedm_ray.devices import net_device
from cedm_ray.diffusion.compiled import Compiled
from cedm_ray.diffusion.compute import Compute, autocast
from cedm_ray.diffusion.loss import TrainingDenoiser, edm_loss_per_pixel
from cedm_ray.diffusion.precond import EDMPrecond


@dataclass(frozen=True)
class Draw:
    """What a step trains on: a process's part of the batch with everything that was drawn for it."""

    y: Tensor
    """Images in [-1, 1], augmented, shape ``(B, C, R, R)``, float32."""
    sigma: Tensor
    """Noise levels, shape ``(B,)``."""
    noise: Tensor
    """Unit Gaussian noise, shape of ``y``."""
    clusters: Tensor | None
    """Conditions, shape ``(B,)``, int64."""
    augment_labels: Tensor | None
    """Augmentation of each image, shape ``(B, 9)``."""

    def parts(self, size: int) -> Iterator["Draw"]:
        """The same in parts of ``size`` images."""
        for start in range(0, len(self.y), size):
            rows = slice(start, start + size)
            clusters = None if self.clusters is None else self.clusters[rows]
            augment_labels = None if self.augment_labels is None else self.augment_labels[rows]
            yield Draw(self.y[rows], self.sigma[rows], self.noise[rows], clusters, augment_labels)


class Passes:
    """The network as a training step calls it.

    Args:
        net: The network, on its device, laid out in memory as ``compute`` says.
        compute: How to compute it.
        local: Images of this process in a step.
        sigma_data: Standard deviation of the images.
    """

    def __init__(self, net: EDMPrecond, compute: Compute, local: int, sigma_data: float) -> None:
        self.size = part_size(local, compute.device_batch)
        self._device = net_device(net)
        self._compute = compute
        self._sigma_data = sigma_data
        # A static graph cannot be held back (torch stops reducing the gradients) nor compiled in buckets.
        self._plain = _distributed(net, static_graph=self.size == local and not compute.compile)
        # After the wrapping, so that gradients are reduced while the rest of the backward pass is computed.
        self._denoiser: TrainingDenoiser = Compiled(self._plain, "training") if compute.compile else self._plain

    def __call__(self, draw: Draw, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the gradients of the scaled loss to the parameters' and return the loss, unscaled and detached.

        The loss is summed over pixels and channels and averaged over the images of this process; averaged over
        processes it is the whole batch's.
        """
        total: Tensor | None = None
        for start, part in zip(range(0, len(draw.y), self.size), draw.parts(self.size), strict=True):
            last = start + self.size >= len(draw.y)
            with nullcontext() if last else self._held_back():
                pixels = self._pixels(part)
                loss = pixels.sum() / len(draw.y)
                scale(loss).backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _pixels(self, part: Draw) -> Tensor:
        y, noise = part.y, part.noise
        if self._compute.channels_last:
            y, noise = (each.contiguous(memory_format=torch.channels_last) for each in (y, noise))
        with autocast(self._device, self._compute.precision):
            return edm_loss_per_pixel(
                self._denoiser, y, part.sigma, noise, part.clusters, part.augment_labels, sigma_data=self._sigma_data
            )

    def _held_back(self) -> AbstractContextManager[object]:
        """Gradients are kept in this process, to be reduced with those of the last part."""
        return self._plain.no_sync() if isinstance(self._plain, DistributedDataParallel) else nullcontext()


def part_size(local: int, device_batch: int | None) -> int:
    """Images that are computed at once: the largest divisor of ``local`` up to ``device_batch``.

    Parts are equal, so that the network is compiled for one shape and each image weighs the same.
    """
    most = min(device_batch or local, local)
    return next(size for size in range(most, 0, -1) if local % size == 0)


def _distributed(net: EDMPrecond, *, static_graph: bool) -> EDMPrecond | DistributedDataParallel:
    if not dist.is_initialized():
        return net
    device = net_device(net)
    return DistributedDataParallel(
        net,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
    )
