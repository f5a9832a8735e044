"""What makes TEMI fast and must not be noticed: switched matrix products, and the step as a CUDA graph."""

import warnings

import numpy as np
import pytest
import torch

from cedm_ray.clustering import temi_graph, temi_precision
from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_graph import Repeated
from cedm_ray.clustering.temi_precision import fast_matmul
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.temi_threads import torch_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CPU, ON_CUDA = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]


def test_products_on_a_cpu_stay_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 300, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with fast_matmul(CPU, tf32=True):
        fast = a @ b
    assert (fast - exact).abs().max() < 5e-6 * exact.abs().max()
    # What the bound tells apart: bfloat16, which the switch would allow.
    assert (a.bfloat16() @ b.bfloat16() - exact).abs().max() > 1e-3 * exact.abs().max()


def test_a_processor_that_would_round_to_bfloat16_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temi_precision, "_product", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    before = ON_CPU.fp32_precision
    with fast_matmul(CPU, tf32=True):
        assert ON_CPU.fp32_precision == before


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_switches_are_put_back_even_after_an_error(older: str, device: torch.device) -> None:
    first = torch.get_float32_matmul_precision(), ON_CPU.fp32_precision, ON_CUDA.fp32_precision
    try:
        torch.set_float32_matmul_precision(older)
        before = torch.get_float32_matmul_precision(), ON_CPU.fp32_precision, ON_CUDA.fp32_precision
        with pytest.raises(KeyError), fast_matmul(device, tf32=True):
            raise KeyError
        assert (torch.get_float32_matmul_precision(), ON_CPU.fp32_precision, ON_CUDA.fp32_precision) == before
    finally:
        torch.set_float32_matmul_precision(first[0])
        ON_CPU.fp32_precision, ON_CUDA.fp32_precision = first[1:]


@pytest.mark.parametrize(("tf32", "precision"), [(True, "tf32"), (False, "ieee")])
def test_cuda_rounds_to_tf32_only_where_it_may(tf32: bool, precision: str) -> None:
    before = ON_CUDA.fp32_precision
    with fast_matmul(CUDA, tf32=tf32):
        assert ON_CUDA.fp32_precision == precision
    assert ON_CUDA.fp32_precision == before


def test_nothing_stays_switched_between_epochs() -> None:
    random = np.random.default_rng(0)
    features, neighbors = random.normal(size=(60, 5)).astype(np.float32), random.integers(0, 60, (60, 3))
    settings = TemiSettings(num_heads=2, hidden_dim=8, bottleneck_dim=4, batch_size=20, epochs=2, warmup_epochs=1)
    before = ON_CPU.fp32_precision
    trainer = TemiTrainer(features, neighbors, 3, settings, seed=0, device="cpu")
    assert [ON_CPU.fp32_precision for _ in trainer.epochs()] == [before, before]


def test_threads_are_given_back_even_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before


class Counted:
    """A step that counts how often it is run; a graph of it runs it in a replay only."""

    def __init__(self) -> None:
        self.runs = self.captures = self.replays = 0

    def __call__(self) -> None:
        self.runs += 1

    def captured(self, step: object) -> "Counted":
        assert step is self
        self.captures += 1
        return self

    def replay(self) -> None:
        self.runs += 1
        self.replays += 1


def test_on_a_cpu_every_step_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Counted()
    monkeypatch.setattr(temi_graph, "_captured", step.captured)
    repeated = Repeated(step, CPU)
    for _ in range(6):
        repeated()
    assert (step.runs, step.captures) == (6, 0)


def test_each_call_is_one_step_before_at_and_after_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    step, runs = Counted(), []
    monkeypatch.setattr(temi_graph, "_captured", step.captured)
    monkeypatch.setattr(temi_graph, "_on_side_stream", lambda work: work())
    repeated = Repeated(step, CUDA)
    for _ in range(6):
        repeated()
        runs.append((step.runs, step.captures, step.replays))
    assert runs == [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 1, 1), (5, 1, 2), (6, 1, 3)]


def test_where_capturing_fails_one_warning_is_given_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step, attempts = Counted(), []

    def failing(work: object) -> None:
        attempts.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(temi_graph, "_captured", failing)
    monkeypatch.setattr(temi_graph, "_on_side_stream", lambda work: work())
    repeated = Repeated(step, CUDA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            repeated()
    message = (
        "no CUDA graph of the TEMI step (operation not permitted when stream is capturing); training goes on without"
    )
    assert [str(warning.message) for warning in caught] == [message]
    assert step.runs == 8 and len(attempts) == 1


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_learns_with_and_without_a_graph() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(600, 32)).astype(np.float32)
    settings = TemiSettings(
        num_heads=4, hidden_dim=32, bottleneck_dim=16, batch_size=60, warmup_epochs=0, freeze_last_layer_epochs=0
    )
    neighbors, losses = random.integers(0, 600, (600, 5)), {}
    for device, placement in (("cpu", None), ("cuda", None), ("cuda", "streamed"), ("cuda", "bfloat16")):
        trainer = TemiTrainer(features, neighbors, 10, settings, seed=0, device=device, placement=placement)
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            trainer.train(torch.randint(600, (1, 120), generator=generator).to(device))
        trainer.train(torch.arange(120, device=device).view(1, -1))
        losses[device, placement] = trainer._loss_sums.cpu()
    for found in losses.values():
        torch.testing.assert_close(found, losses["cpu", None], rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(losses["cuda", "streamed"], losses["cuda", None], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_captured() -> None:
    random = np.random.default_rng(0)
    features, neighbors = random.normal(size=(600, 32)).astype(np.float32), random.integers(0, 600, (600, 5))
    settings = TemiSettings(num_heads=4, hidden_dim=32, bottleneck_dim=16, batch_size=60, epochs=3, warmup_epochs=1)
    trainer = TemiTrainer(features, neighbors, 10, settings, seed=0, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress = list(trainer.epochs())
    assert trainer._step._graph is not None
    assert progress[-1].loss < progress[0].loss
    assert trainer.head_utilization()[progress[-1].best_head] == trainer.clustering().utilization_ratio
