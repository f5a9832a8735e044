"""Kernels that are right, wrong and missing; on the CPU, whose bfloat16 is checked against its float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cedm_ray.stages.checkup import gpus as checkup_gpus
from cedm_ray.stages.checkup.gpus import KERNELS, device_finding, faiss_finding, gpu_findings, kernel_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(KERNELS))
def test_a_right_kernel_is_off_by_no_more_than_its_rounding(name: str) -> None:
    assert 0 < kernel_error(name, CPU) < 0.01


def test_a_device_that_answers_rightly_is_well() -> None:
    assert device_finding(CPU).level == "ok"


def replaced(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setitem(KERNELS, "attention", (kernel, KERNELS["attention"][1]))


def test_a_kernel_that_is_wrong_is_told_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return right * 1.1 if q.dtype == torch.bfloat16 else right

    replaced(monkeypatch, wrong)
    finding = device_finding(CPU)
    assert finding.level == "fail" and "wrong at attention by 10.0%" in finding.text and finding.fix


def test_a_kernel_that_gives_no_numbers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda q, k, v: q * float("nan"))
    assert device_finding(CPU).level == "fail"


def test_a_kernel_that_cannot_run_is_told_in_the_first_line_of_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be reported later")
        return q

    replaced(monkeypatch, missing)
    finding = device_finding(CPU)
    assert finding.level == "fail" and "\n" not in finding.text
    assert "fails at attention in bfloat16 (CUDA error: no kernel image is available)" in finding.text


def test_gpus_that_torch_does_not_find_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = gpu_findings(2)
    assert (
        finding.level == "fail" and finding.text.startswith("Ray counts 2 GPUs, torch ") and "finds 0" in finding.text
    )


def test_of_several_gpus_the_bad_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(checkup_gpus, "kernel_error", lambda name, device: 0.5 if device.index == 1 else 0.002)
    monkeypatch.setattr(checkup_gpus, "faiss_device", lambda: "cpu")
    bad, faiss = gpu_findings(3)
    assert bad.level == "fail" and bad.text.startswith("GPU 1 is wrong at matmul by 50.0%")
    assert faiss.name == "faiss" and faiss.level == "warn"
    monkeypatch.setattr(checkup_gpus, "kernel_error", lambda name, device: 0.002)
    well, _ = gpu_findings(3)
    assert well.level == "ok" and well.text.startswith("3 x GPU 0 runs matmul")


def test_faiss_on_the_gpu_is_well() -> None:
    assert faiss_finding("cuda").level == "ok"


@pytest.mark.gpu
def test_the_gpus_of_this_machine_answer() -> None:
    assert [finding.level for finding in gpu_findings(torch.cuda.device_count())] == ["ok", "ok"]
