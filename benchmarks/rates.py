"""What the benchmarks count and measure alike: the machine's rate of matrix products, operations, memory."""

import resource
import sys
import time
from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the names of precisions in the settings."""


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of the work, until the device has done it."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of square matrix products, the best of a few sizes, in operations per second.

    A multiplication and an addition are two operations. The precision is that of the dtype: torch's default for
    float32 leaves TF32 out.
    """
    sizes = [4096, 8192] if device.type == "cuda" else [1024, 2048, 3072]
    if device.type == "cpu" and dtype == torch.float16:
        sizes = [256]  # few processors have products of this kind, and others take a minute for large ones
    repeats = 20 if device.type == "cuda" else 3
    return max(_rate_of_size(size, repeats, device, dtype) for size in sizes)


def _rate_of_size(size: int, repeats: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(matrix)

    def work() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix, out=out)

    work()
    return 2 * size**3 * repeats / min(seconds(work, device) for _ in range(3))


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions that the work calls; it must be eager."""
    # Holds 100 MB, which a script that measures memory and counts nothing need not hold.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak from here on; on a CPU the peak of the process cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held at once, 10^9 bytes: of tensors on CUDA, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
