"""How busy the GPU of this process is, as NVIDIA's driver counts it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIGA = 1e9


def gpu_use() -> str:
    """For example ``93 %, 31 of 80 GB``; empty where this process computes on no GPU, or where none answers.

    The counts are the whole GPU's, whoever shares it, over about the last second.
    """
    torch = sys.modules.get("torch")  # a process that has not loaded it computes on nothing
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    return use_of(nvml_gpu(torch.device("cuda", torch.cuda.current_device())))


def use_of(gpu: Any | None) -> str:
    """The same for a handle of NVML."""
    if gpu is None:
        return ""
    try:
        import pynvml

        busy = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    except Exception:  # not all GPUs count (slices of one do not), and no training shall end for a figure
        return ""
    return f"{busy} %, {memory.used / GIGA:.0f} of {memory.total / GIGA:.0f} GB"


def nvml_gpu(device: torch.device) -> Any | None:
    """NVML's handle of a GPU, or None where there is no answer."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()  # for as long as the process lives
        # By its UUID: torch counts only the GPUs that CUDA_VISIBLE_DEVICES leaves, NVML counts all of the machine.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no driver, no such library, a slice of a GPU: what NVML raises for each is its own
        return None
