"""Products of float32 matrices at the speed that a device has, switched on for a while only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_matmul(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Multiply float32 matrices by the fastest way that keeps float32, or on CUDA in TF32.

    On a CPU torch multiplies float32 by MKL, which leaves half of the speed of some processors unused (those of AMD
    with AVX-512). Its one way to oneDNN is to allow bfloat16 products; whether oneDNN makes use of that depends on the
    processor, so that it is tried out, and where it does, torch is left as it is. Sums are in float32 everywhere.

    The switches are those of the process: other threads multiply in the same way meanwhile.

    Args:
        device: Where the matrices lie.
        tf32: Whether products on CUDA may be rounded to TF32 (10 bits of mantissa).
    """
    if device.type == "cuda":
        with _switched(torch.backends.cuda.matmul, "tf32" if tf32 else "ieee"):
            yield
    elif device.type == "cpu" and _onednn_keeps_float32():
        with _switched(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]
            yield
    else:
        yield


def _onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies float32 as such here although bfloat16 (7 bits of mantissa) is allowed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    size = 128
    a = torch.arange(size * size, dtype=torch.float32).sin().view(size, size)
    with _switched(torch.backends.mkldnn.matmul, "bf16"):  # type: ignore[attr-defined]
        product = _product(a, a)
    exact = a.double() @ a.double()
    return bool((product - exact).abs().max() <= 1e-5 * exact.abs().max())


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@contextmanager
def _switched(matmul: object, precision: str) -> Iterator[None]:
    before = matmul.fp32_precision  # type: ignore[attr-defined]
    matmul.fp32_precision = precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        matmul.fp32_precision = before  # type: ignore[attr-defined]
