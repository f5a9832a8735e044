"""Full float32 for detectors, whatever a process has switched on to train faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, and on CUDA no TF32 (10 bits of mantissa), the default of convolutions.

    Args:
        device: Where the network computes.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
        before = conv.fp32_precision, matmul.fp32_precision
        try:
            # torch has an older and a newer switch for products of matrices and wants the two to agree.
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # the newer one alone was moved
            older = "highest"
        try:
            conv.fp32_precision = "ieee"
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(older)
            conv.fp32_precision, matmul.fp32_precision = before
