"""Where the features lie while TEMI trains on them, and how a batch of them reaches the device."""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Placement = Literal["float32", "bfloat16", "streamed"]

_RESIDENT_SHARE = 0.5  # of the free memory; the rest is for weights, optimizer, activations and neighbours
_BLOCK = 8192  # images moved at a time


def choose_placement(num_bytes: int, free_bytes: int | None) -> Placement:
    """How to hold the features: on the device in float32, in bfloat16 where that is too much, or else on the host.

    Args:
        num_bytes: Bytes of the features in float32.
        free_bytes: Free bytes of the device; None for a CPU, which reads the features where they lie.

    Returns:
        The placement.
    """
    if free_bytes is None or num_bytes <= free_bytes * _RESIDENT_SHARE:
        return "float32"
    return "bfloat16" if num_bytes / 2 <= free_bytes * _RESIDENT_SHARE else "streamed"


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


class Features:
    """The features of a dataset, from which batches are drawn.

    Features that stay where the caller has them are standardised batch by batch; those that are copied, once and in
    float32, so that bfloat16 rounds values of one size.

    Args:
        embeddings: Shape ``(N, D)``, float32; may be read-only. Not copied on a CPU, nor where it is streamed.
        standardize: Whether each feature is brought to mean 0 and standard deviation 1; a constant one becomes 0.
        placement: How they are held.
        device: Where batches are wanted.

    Raises:
        ValueError: If a feature is not finite.
    """

    def __init__(
        self, embeddings: NDArray[np.float32], *, standardize: bool, placement: Placement, device: torch.device
    ) -> None:
        self.placement, self.device = placement, device
        host = view(embeddings)
        if not all(bool(torch.isfinite(block).all()) for block in torch.split(host, _BLOCK)):
            raise ValueError("embeddings hold NaN or infinity; every feature must be finite")
        self.mean_std = _mean_std(host, device) if standardize else None
        """Mean and standard deviation of each feature, both of shape ``(D,)``; None where they are left as they are."""
        self._still_to_apply = self.mean_std
        self.source = host
        """The features as they are held: where they were given, or a copy on the device."""
        if placement == "bfloat16" or (placement == "float32" and device.type != "cpu"):
            self.source = self._copied(host, torch.bfloat16 if placement == "bfloat16" else torch.float32)
            self._still_to_apply = None

    def __len__(self) -> int:
        return len(self.source)

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All features in order.

        Args:
            size: Images of a block; the last one may be smaller.

        Yields:
            Blocks, shape ``(size, D)``, float32, on the device.
        """
        for block in torch.split(self.source, size):
            yield self._standardized(block.to(self.device, torch.float32, copy=self._still_to_apply is not None))

    def batches(self, rows: Tensor, out: Tensor) -> Iterator[Tensor]:
        """Batches of features, one after another in the same memory.

        Args:
            rows: Images of each batch, shape ``(steps, R)``, int64, on the device.
            out: Where each batch is written, shape ``(R, D)``, float32, on the device.

        Yields:
            ``out``.
        """
        for batch in self._streamed(rows.cpu(), out) if self.placement == "streamed" else self._resident(rows, out):
            yield self._standardized(batch)

    def _resident(self, rows: Tensor, out: Tensor) -> Iterator[Tensor]:
        for picked in rows:
            if self.source.dtype == out.dtype:
                torch.index_select(self.source, 0, picked, out=out)
            else:
                out.copy_(self.source[picked])
            yield out

    def _streamed(self, rows: Tensor, out: Tensor) -> Iterator[Tensor]:
        """Gather on the host while the device computes the step before; waits only for a buffer that is being read."""
        cuda = self.device.type == "cuda"
        buffers = [torch.empty(out.shape, pin_memory=cuda) for _ in range(2)]
        copied = [torch.cuda.Event() if cuda else None for _ in buffers]  # type: ignore[no-untyped-call]
        for step, picked in enumerate(rows):
            buffer, event = buffers[step % 2], copied[step % 2]
            if event is not None:
                event.synchronize()  # returns at once before the first record
            torch.index_select(self.source, 0, picked, out=buffer)
            out.copy_(buffer, non_blocking=True)
            if event is not None:
                event.record()
            yield out

    def _copied(self, host: Tensor, dtype: torch.dtype) -> Tensor:
        copy = torch.empty(host.shape, dtype=dtype, device=self.device)
        for part, block in zip(torch.split(copy, _BLOCK), torch.split(host, _BLOCK), strict=True):
            part.copy_(self._standardized(block.to(self.device, copy=True)))
        return copy

    def _standardized(self, x: Tensor) -> Tensor:
        """In place."""
        return x if self._still_to_apply is None else x.sub_(self._still_to_apply[0]).div_(self._still_to_apply[1])


def view(array: NDArray[Any]) -> Tensor:
    """The array as a tensor that shares its memory, which is never written to."""
    with warnings.catch_warnings():
        # Shared memory is mapped read-only, of which torch warns since it has no read-only tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array))


def _mean_std(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean of each feature and its standard deviation, 1 where it is constant."""
    std, mean = torch.std_mean(host, dim=0, correction=0)
    return mean.to(device), torch.where(std > 0, std, 1.0).to(device)
