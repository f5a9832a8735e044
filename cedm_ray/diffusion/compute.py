"""How the network is computed: precision, memory layout, compilation. What is computed stays the same."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from cedm_ray.errors import UserError, require

Precision = Literal["float32", "bf16", "fp16"]
PrecisionSetting = Literal["auto", "float32", "bf16", "fp16"]


@dataclass(frozen=True)
class ComputeSettings:
    """What may be set about the computation; what is left open is decided by the device."""

    precision: PrecisionSetting = "auto"
    """Products of the training: float32, bf16, or fp16 with loss scaling. Weights, moments, noise levels and loss are
    float32 in any case (auto: bf16 on a GPU that has it, fp16 on an older one, float32 on a CPU)."""
    sample_precision: PrecisionSetting = "auto"
    """Products of the sampler, whose integration is float64 in any case (auto: fp16 on a GPU, float32 on a CPU)."""
    channels_last: bool | None = None
    """Keep channels innermost in memory (when not given: on a GPU)."""
    compile: bool | None = None
    """Compile the network with torch.compile; where that fails, it is said and training goes on without (when not
    given: on a GPU)."""
    device_batch: int | None = None
    """Images that one process computes at once; its part of the batch is split and the gradients added up (when not
    given: its whole part)."""
    images: Literal["auto", "resident", "streamed"] = "auto"
    """Where a training has its images: in the memory of its device, or streamed by Ray Data; the batches are the same
    (auto: resident where they take no more than a quarter of that memory)."""

    def __post_init__(self) -> None:
        batch = self.device_batch
        require(batch is None or batch >= 1, "device_batch", batch, "be at least 1")

    def asked_precisions(self) -> dict[str, str]:
        """What of the computation decides a result: precisions that were asked for, not those that a device has."""
        asked = {"precision": self.precision, "sample_precision": self.sample_precision}
        return {name: value for name, value in asked.items() if value != "auto"}


@dataclass(frozen=True)
class Compute:
    """The settings with everything decided for one device."""

    precision: Precision = "float32"
    sample_precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    device_batch: int | None = None


def decide(settings: ComputeSettings, device: torch.device) -> Compute:
    """Decide what the settings leave open.

    Raises:
        UserError: If the device cannot compute in the precision that is asked for.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    for name in ("precision", "sample_precision"):
        if getattr(settings, name) == "bf16" and not has_bf16:
            flag = f"--compute.{name.replace('_', '-')}"
            gpu = torch.cuda.get_device_name(device)
            raise UserError(f"{name} is bf16, which {gpu} does not compute; take {flag} fp16 or float32")
    best: Precision = "float32" if not on_gpu else "bf16" if has_bf16 else "fp16"
    best_sampling: Precision = "fp16" if on_gpu else "float32"
    return Compute(
        precision=best if settings.precision == "auto" else settings.precision,
        sample_precision=best_sampling if settings.sample_precision == "auto" else settings.sample_precision,
        channels_last=on_gpu if settings.channels_last is None else settings.channels_last,
        compile=on_gpu if settings.compile is None else settings.compile,
        device_batch=settings.device_batch,
    )


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Products of the network within the context are computed in ``precision``."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
