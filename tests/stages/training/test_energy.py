import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import torch
import torch.distributed as dist

from cedm_ray.stages.training import energy
from cedm_ray.stages.training.energy import Meter

UUIDS = [UUID(int=1), UUID(int=2)]  # as torch counts them
GPU = torch.device("cuda", 1)


class NVMLError(Exception):
    pass


class StandIn(SimpleNamespace):
    """NVML of a machine of three GPUs, whose counters, in millijoules, only go on when they are told to."""

    def __init__(self) -> None:
        super().__init__(millijoules={"GPU-other": 5, f"GPU-{UUIDS[0]}": 7, f"GPU-{UUIDS[1]}": 9}, refused="", ready=0)

    def _answer(self, name: str) -> None:
        if name == self.refused:
            raise NVMLError(name)
        assert self.ready or name == "init"

    def nvmlInit(self) -> None:
        self._answer("init")
        self.ready += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        self._answer("handle")
        if uuid not in self.millijoules:
            raise NVMLError(uuid)
        return SimpleNamespace(name=uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        self._answer("energy")
        return int(self.millijoules[handle.name])

    def use(self, millijoules: float) -> None:
        self.millijoules[f"GPU-{UUIDS[1]}"] += millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUIDS[torch.device(device).index])
    )
    return stand_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(energy.time, "monotonic", lambda: now.s)
    return now


def test_a_worker_counts_its_hours_and_what_its_gpu_used_since_the_start(nvml: StandIn, clock: SimpleNamespace) -> None:
    meter = Meter(GPU, num_workers=2)
    nvml.use(1e12)
    meter.start()
    clock.s += 1800
    nvml.use(7.2e9)  # 2 kWh
    assert meter.read() == {"device": "cuda", "device_hours": 1.0, "energy_kwh": 2.0}
    nvml.use(3.6e9)
    assert meter.read()["energy_kwh"] == 3.0


def test_workers_that_share_a_gpu_count_it_once_between_them(nvml: StandIn, clock: SimpleNamespace) -> None:
    meters = [Meter(GPU, gpu_share=share) for share in (0.5, 0.25, 0.25)]
    clock.s += 3600
    nvml.use(3.6e9)
    costs = [meter.read() for meter in meters]
    assert sum(cost["energy_kwh"] for cost in costs) == 1.0 and sum(cost["device_hours"] for cost in costs) == 1.0


def test_a_worker_of_several_gpus_counts_the_hours_of_all_and_the_energy_of_its_own(
    nvml: StandIn, clock: SimpleNamespace
) -> None:
    meter = Meter(GPU, gpu_share=2.0)
    clock.s += 3600
    nvml.use(3.6e9)
    assert meter.read() == {"device": "cuda", "device_hours": 2.0, "energy_kwh": 1.0}


def test_a_worker_without_a_gpu_is_one_device_and_nvml_is_not_asked(nvml: StandIn, clock: SimpleNamespace) -> None:
    meter = Meter(torch.device("cpu"), num_workers=3, gpu_share=0.0)
    clock.s += 3600
    assert meter.read() == {"device": "cpu", "device_hours": 3.0} and not nvml.ready


@pytest.mark.parametrize("refused", ["init", "handle", "energy"])
def test_where_nvml_refuses_the_energy_is_not_known(nvml: StandIn, refused: str) -> None:
    nvml.refused = refused
    assert set(Meter(GPU).read()) == {"device", "device_hours"}


def test_a_gpu_that_nvml_does_not_know_or_that_stops_answering_has_no_energy(nvml: StandIn) -> None:
    late, early = Meter(GPU), Meter(GPU)
    assert "energy_kwh" in late.read()
    nvml.refused = "energy"
    early.start()
    assert "energy_kwh" not in late.read()
    nvml.refused = ""
    assert "energy_kwh" not in early.read() and "energy_kwh" in late.read()
    nvml.use(-1)
    assert "energy_kwh" not in late.read()
    del nvml.millijoules[f"GPU-{UUIDS[1]}"]
    assert "energy_kwh" not in Meter(GPU).read() and "energy_kwh" in Meter(torch.device("cuda", 0)).read()


def test_without_the_library_the_energy_is_not_known(nvml: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert set(Meter(GPU).read()) == {"device", "device_hours"}


def over_all_workers(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = ((1.5, None, None), (0.25, 0.25, None))[rank]
    found = [energy._over_all_workers(kwh, torch.device("cpu")) for kwh in mine]
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_energy_is_the_sum_over_workers_and_not_known_where_one_does_not_know(tmp_path: Path) -> None:
    # Run as scripts: a spawned process could not import a test module that lies outside every package.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    running = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=env) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[1.75, None, None]] * 2


def test_the_library_has_the_functions_that_are_asked_for() -> None:
    import pynvml

    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        assert callable(getattr(pynvml, name))


if __name__ == "__main__":
    over_all_workers(int(sys.argv[1]), Path(sys.argv[2]))
