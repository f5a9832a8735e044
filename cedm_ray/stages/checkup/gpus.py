"""Whether GPUs answer: real kernels in torch, compared with the CPU, and a search by faiss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cedm_ray.errors import first_line
from cedm_ray.features.neighbors import faiss_device
from cedm_ray.stages.checkup.finding import Finding

TOLERANCE = 0.02
"""Relative error of a bfloat16 result in the Frobenius norm; its own rounding makes some 0.002."""
REINSTALL = "install the driver and the build of torch that belong together (nvidia-smi shows the driver's CUDA)"


# By name: what is called, and the shapes of what it is given.
KERNELS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "matmul": (torch.matmul, ((256, 256), (256, 256))),
    "convolution": (F.conv2d, ((2, 16, 32, 32), (16, 16, 3, 3))),
    "attention": (F.scaled_dot_product_attention, ((2, 4, 128, 64),) * 3),
}


def kernel_error(name: str, device: torch.device) -> float:
    """Relative error of a kernel in bfloat16 on a device, against float32 on the CPU.

    Args:
        name: One of ``KERNELS``.
        device: Where to run it.
    """
    kernel, shapes = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    expected = kernel(*(each.float() for each in inputs))
    found = kernel(*(each.to(device) for each in inputs)).float().cpu()
    return float((found - expected).norm() / expected.norm())


def device_finding(device: torch.device) -> Finding:
    """Whether a device answers, and rightly."""
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    for name in KERNELS:
        try:
            error = kernel_error(name, device)
        except RuntimeError as problem:
            text = f"{label} fails at {name} in bfloat16 ({first_line(problem)})"
            return Finding("GPUs", "fail", text, REINSTALL)
        if not error <= TOLERANCE:
            text = f"{label} is wrong at {name} by {error:.1%}; bfloat16 explains at most {TOLERANCE:.0%}"
            return Finding("GPUs", "fail", text, "take this GPU out of the cluster, and look at nvidia-smi -q")
    return Finding("GPUs", "ok", f"{label} runs {', '.join(KERNELS)} in bfloat16, as the CPU does in float32")


def gpu_findings(expected: int) -> list[Finding]:
    """What there is to say of the GPUs that this process may use.

    Args:
        expected: How many Ray says that there are, at least 1.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < expected:
        text = f"Ray counts {expected} GPUs, torch {torch.__version__} finds {count}"
        return [Finding("GPUs", "fail", text, REINSTALL)]
    devices = [device_finding(torch.device("cuda", number)) for number in range(expected)]
    bad = [each for each in devices if each.level != "ok"]
    well = Finding("GPUs", "ok", f"{expected} x {devices[0].text}") if expected > 1 else devices[0]
    return [*(bad or [well]), faiss_finding(faiss_device())]


def faiss_finding(device: str) -> Finding:
    """Where faiss searches on a node that has a GPU.

    Args:
        device: What ``faiss_device`` says.
    """
    if device == "cuda":
        return Finding("faiss", "ok", "finds neighbours on the GPU")
    text = "finds none on the GPU and would search on the CPU, which is slower and ends right"
    return Finding("faiss", "warn", text, "install the faiss-gpu of constraints.txt, built for this driver's CUDA")
