"""What a part of a training cost: the hours of its devices, and the energy that NVIDIA's GPUs count themselves."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from cedm_ray.stages.cluster.gpu_use import nvml_gpu

JOULES_PER_KWH = 3.6e6


class Meter:
    """Counts what the workers of one training take, from one ``start`` to the next ``read``.

    Ray gives each worker a GPU, a share of one, or none. A worker counts its share of the wall-clock hours, and the
    same share of the energy of the GPU that it computes on: however many workers share a GPU, of one training or of
    several, none of its energy is counted twice, and what nobody asked for is counted by nobody. A worker without a
    GPU counts as one device, and its energy is not known.

    Args:
        device: On which this process computes.
        num_workers: Processes of the training, of which this is one.
        gpu_share: GPUs that each of them asked for.
    """

    def __init__(self, device: torch.device, num_workers: int = 1, gpu_share: float = 1.0) -> None:
        self._device, self._num_workers = device, num_workers
        self._share = gpu_share if device.type == "cuda" else 1.0
        self._gpu = nvml_gpu(device)
        self.start()

    def start(self) -> None:
        """Count from here on."""
        self._started_s, self._started_joules = time.monotonic(), self._joules()

    def read(self) -> dict[str, Any]:
        """What was taken since the start, over all workers, each of which must call this.

        Returns:
            ``device`` (cuda or cpu), ``device_hours`` (wall-clock hours times the workers and the GPUs of each) and,
            where every worker's GPU counts its energy, ``energy_kwh``.
        """
        hours = (time.monotonic() - self._started_s) / 3600
        cost: dict[str, Any] = {
            "device": self._device.type,
            "device_hours": hours * self._num_workers * self._share,
        }
        energy = _over_all_workers(self._kwh(), self._device)
        return cost if energy is None else {**cost, "energy_kwh": energy}

    def _kwh(self) -> float | None:
        """This worker's share of its GPU's energy since the start."""
        now = self._joules()
        if now is None or self._started_joules is None or now < self._started_joules:  # the driver was loaded anew
            return None
        # Of several GPUs only the first computes, and only its counter is read.
        return (now - self._started_joules) * min(self._share, 1.0) / JOULES_PER_KWH

    def _joules(self) -> float | None:
        """What the GPU has used since its driver was loaded."""
        if self._gpu is None:
            return None
        try:
            import pynvml

            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1000
        except Exception:  # not all GPUs count, and no training shall end for a figure
            return None


def _over_all_workers(kwh: float | None, device: torch.device) -> float | None:
    """The sum over all processes; None in all of them where one does not know its own."""
    if not dist.is_initialized():
        return kwh
    total = torch.tensor([kwh or 0.0, float(kwh is None)], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    energy, unknown = total.tolist()
    return None if unknown else energy
