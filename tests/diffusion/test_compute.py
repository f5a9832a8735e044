"""What makes training fast must leave what is computed as it is."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cedm_ray.diffusion.augment import augment
from cedm_ray.diffusion.compute import Compute, ComputeSettings, decide
from cedm_ray.diffusion.ema import ema_beta, update_ema
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.loss import edm_loss_per_pixel, sample_sigma
from cedm_ray.diffusion.order import EpochOrder
from cedm_ray.diffusion.passes import part_size
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.state_io import load_state, save_state
from cedm_ray.diffusion.streams import Purpose, torch_seed
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import TrainState, new_state
from cedm_ray.errors import UserError

CPU = torch.device("cpu")
STEPS, BATCH = 200, 16
SETTINGS = TrainSettings(total_batch=BATCH, lr=2e-3, lr_rampup_kimg=0.5, ema_halflife_kimg=1.0, augment_prob=0.12)


def start(dropout: float = 0.0, clusters: int = 10) -> TrainState:
    torch.manual_seed(0)
    return new_state(build_net(NetSettings(8, (1, 2), 1, (4,), dropout), 8, 1, clusters, True))


@pytest.fixture(scope="module")
def digits() -> ResidentImages:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images * (255 / 16)).to(torch.uint8).reshape(-1, 1, 8, 8)
    return ResidentImages(pixels, torch.from_numpy(labels).long())


def curve(source: ResidentImages, compute: Compute, steps: int = STEPS, state: TrainState | None = None) -> Tensor:
    state = state or start()
    stop = state.nimg + steps * BATCH
    run = train(state, source, settings=SETTINGS, stop_nimg=stop, seed=1, compute=compute)
    return torch.stack([step.loss for step in run])


@pytest.fixture(scope="module")
def plain(digits: ResidentImages) -> Tensor:
    return curve(digits, Compute())


def plain_loop(state: TrainState, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """The training written out: eager, float32, one process, nothing else."""
    order, losses = EpochOrder(len(images), 1), []
    for step in range(steps):
        seen = step * BATCH
        chosen = order.take(seen, BATCH)
        generator = torch.Generator().manual_seed(torch_seed(1, Purpose.STEP, seen, 0))
        y, transforms = augment(images[chosen].float() / 127.5 - 1, SETTINGS.augment_prob, generator)
        sigma = sample_sigma(BATCH, SETTINGS.P_mean, SETTINGS.P_std, generator, "cpu")
        noise = torch.randn(y.shape, generator=generator)
        torch.manual_seed(torch_seed(1, Purpose.DROPOUT, seen, 0))
        state.optimizer.zero_grad()
        loss = edm_loss_per_pixel(state.net, y, sigma, noise, labels[chosen], transforms).sum() / BATCH
        loss.backward()
        seen += BATCH
        state.optimizer.param_groups[0]["lr"] = SETTINGS.lr * min(seen / (SETTINGS.lr_rampup_kimg * 1000), 1.0)
        state.optimizer.step()
        update_ema(state.ema, state.net, ema_beta(BATCH, seen, SETTINGS.ema_halflife_kimg * 1000))
        losses.append(loss.item())
    return losses


def test_in_float32_training_is_the_plain_loop_to_the_bit(digits: ResidentImages) -> None:
    ours, theirs = start(dropout=0.2), start(dropout=0.2)
    losses = curve(digits, Compute(), 25, ours).tolist()
    assert digits.class_index is not None
    assert losses == plain_loop(theirs, digits._images, digits.class_index, 25)
    for mine, other in zip(ours.ema.parameters(), theirs.ema.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_loss_curve_of_bf16_is_float32s(digits: ResidentImages, plain: Tensor) -> None:
    bf16 = curve(digits, Compute("bf16"))
    relative = (bf16 - plain) / plain
    assert 0 < relative.abs().mean() < 0.01  # 2^-8 is 0.004
    assert bf16[-50:].mean() == pytest.approx(float(plain[-50:].mean()), rel=0.01)


def test_in_bf16_weights_moments_and_losses_stay_float32(digits: ResidentImages) -> None:
    state = start()
    losses = curve(digits, Compute("bf16"), 2, state)
    moments = [value for slot in state.optimizer.state.values() for value in slot.values()]
    kept = [losses, *state.net.parameters(), *state.ema.parameters(), *moments]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.parametrize("compute", [Compute(channels_last=True), Compute(device_batch=5)])
def test_memory_layout_and_parts_change_rounding_alone(digits: ResidentImages, plain: Tensor, compute: Compute) -> None:
    torch.testing.assert_close(curve(digits, compute, 30), plain[:30], rtol=1e-4, atol=0)


def test_a_run_may_change_its_memory_layout_half_way(digits: ResidentImages, plain: Tensor, tmp_path: Path) -> None:
    state = start()
    first = curve(digits, Compute(channels_last=True), 10, state)
    save_state(state, tmp_path / "state.safetensors")
    loaded = start()
    load_state(loaded, tmp_path / "state.safetensors")
    rest = curve(digits, Compute(), 10, loaded)
    torch.testing.assert_close(torch.cat([first, rest]), plain[:20], rtol=1e-4, atol=0)
    assert all(parameter.is_contiguous() for parameter in loaded.net.parameters())
    again = start()
    load_state(again, tmp_path / "state.safetensors")
    torch.testing.assert_close(curve(digits, Compute(channels_last=True), 10, again), rest, rtol=1e-4, atol=0)


def test_parts_are_equal_and_no_larger_than_asked_for() -> None:
    assert [part_size(1024, most) for most in (None, 2000, 1024, 600, 300, 1)] == [1024, 1024, 1024, 512, 256, 1]
    assert part_size(7, 3) == 1


# ---- fp16


def test_fp16_is_scaled_and_goes_on_from_a_checkpoint_to_the_bit(digits: ResidentImages, tmp_path: Path) -> None:
    whole, first, second = start(), start(), start()
    losses = curve(digits, Compute("fp16"), 8, whole)
    head = curve(digits, Compute("fp16"), 5, first)
    assert first.scaler is not None
    save_state(first, tmp_path / "state.safetensors")
    load_state(second, tmp_path / "state.safetensors")
    assert second.scaler is not None
    assert second.scaler.get_scale() == first.scaler.get_scale()
    assert torch.equal(torch.cat([head, curve(digits, Compute("fp16"), 3, second)]), losses)
    assert second.scaler.state_dict() == whole.scaler.state_dict()  # type: ignore[union-attr]
    torch.testing.assert_close(losses, curve(digits, Compute(), 8), rtol=0.02, atol=0)


def test_a_step_that_overflows_fp16_is_left_out_and_the_scale_lowered(digits: ResidentImages) -> None:
    state = start()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.detach().clone() for parameter in state.net.parameters()]
    curve(digits, Compute("fp16"), 1, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.net.parameters(), strict=True))
    assert state.scaler.get_scale() == 2.0**39


def test_a_run_that_leaves_fp16_leaves_its_scale_and_cleans_gradients_again(
    digits: ResidentImages, tmp_path: Path
) -> None:
    first = start()
    curve(digits, Compute("fp16"), 2, first)
    save_state(first, tmp_path / "state.safetensors")
    losses, biases = [], []
    for scaled in (True, False):
        state = start()
        load_state(state, tmp_path / "state.safetensors")
        if not scaled:
            state.scaler = None
        last = state.net.model.out_conv
        last.bias.register_hook(lambda grad: torch.full_like(grad, torch.inf))
        losses.append(curve(digits, Compute(), 3, state))
        biases.append(last.bias.detach())
        assert state.scaler is None
    assert torch.equal(*losses) and torch.equal(*biases)
    assert not torch.equal(biases[0], first.net.model.out_conv.bias)


# ---- compilation


class Graphs:
    """A compiler that changes nothing and notes what it was given."""

    def __init__(self) -> None:
        self.shapes: list[set[tuple[int, ...]]] = []

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        self.shapes.append({tuple(value.shape) for value in example if isinstance(value, Tensor)})
        return graph.forward


def test_compiled_training_is_the_same_and_no_graph_holds_the_number_of_clusters(
    digits: ResidentImages, plain: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(curve(digits, Compute(compile=True), 3), plain[:3], rtol=1e-5, atol=0)
    assert graphs.shapes
    assert not any(10 in shape for shapes in graphs.shapes for shape in shapes)
    torch.compiler.reset()


@pytest.mark.slow
def test_torch_compiles_the_training_for_real(digits: ResidentImages, plain: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.testing.assert_close(curve(digits, Compute(compile=True), 30), plain[:30], rtol=1e-4, atol=0)


def broken(error: Exception) -> Callable[[object], Callable[..., Any]]:
    def fail(*_: object) -> None:
        torch.rand(3)  # draws are undone
        raise error

    return lambda _net, **_: fail


def test_where_compiling_fails_training_goes_on_without_and_says_so(
    digits: ResidentImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = curve(digits, Compute(), 3, start(dropout=0.2))
    monkeypatch.setattr(torch, "compile", broken(RuntimeError("no C compiler\nlong story")))
    with pytest.warns(
        RuntimeWarning, match=r"torch.compile failed, and training goes on .* RuntimeError: no C compiler long story$"
    ) as said:
        losses = curve(digits, Compute(compile=True), 3, start(dropout=0.2))
    assert torch.equal(losses, expected)
    assert len(said) == 1


def test_want_of_memory_is_no_failure_of_the_compiler(digits: ResidentImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", broken(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        curve(digits, Compute(compile=True), 1)


# ---- waiting


class Reads(TorchDispatchMode):
    """Notes the operations that would wait for a GPU: values read, and shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(func.name().startswith(f"aten::{name}") for name in self.WAITS):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", [Compute(), Compute("bf16", channels_last=True), Compute(device_batch=8)])
def test_no_step_reads_a_value_back(digits: ResidentImages, compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EDMPrecond, "_check_condition", lambda *_: None)  # it reads values on a CPU only
    state = start()
    steps = train(state, digits, settings=SETTINGS, stop_nimg=BATCH * 4, seed=1, compute=compute)
    next(steps)  # the first step makes what is kept
    with Reads() as reads:
        next(steps)
        next(steps)
    assert reads.found == []
    with reads:
        float(torch.ones(()))
    assert reads.found  # it would have been seen


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits_and_the_loss_curve_is_float32s(digits: ResidentImages) -> None:
    gpu = torch.device("cuda")
    assert digits.class_index is not None
    source = ResidentImages(digits._images.to(gpu), digits.class_index.to(gpu))
    curves = []
    for compute in (Compute(), decide(ComputeSettings(), gpu)):
        state = new_state(start().net.to(gpu))
        steps = train(state, source, settings=SETTINGS, stop_nimg=BATCH * STEPS, seed=1, compute=compute)
        losses = [next(steps).loss]
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses += [step.loss for step in steps]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        curves.append(torch.stack(losses).cpu())
    assert ((curves[1] - curves[0]) / curves[0]).abs().mean() < 0.01


# ---- what the device decides


def test_a_cpu_trains_in_float32_eagerly_unless_told_otherwise() -> None:
    assert decide(ComputeSettings(), CPU) == Compute()
    asked = ComputeSettings("bf16", "bf16", channels_last=True, compile=True, device_batch=4)
    assert decide(asked, CPU) == Compute("bf16", "bf16", channels_last=True, compile=True, device_batch=4)


def test_a_gpu_without_bf16_trains_in_fp16_and_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert decide(ComputeSettings(), gpu) == Compute("fp16", "fp16", channels_last=True, compile=True)
    for name, flag in (("precision", "precision"), ("sample_precision", "sample-precision")):
        said = rf"^{name} is bf16, which Tesla V100 does not compute; take --compute\.{flag} fp16 or float32$"
        with pytest.raises(UserError, match=said):
            decide(ComputeSettings(**{name: "bf16"}), gpu)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert decide(ComputeSettings(), gpu).precision == "bf16"


def test_only_a_precision_that_was_asked_for_decides_a_result() -> None:
    assert ComputeSettings(compile=True, device_batch=4, images="streamed").asked_precisions() == {}
    asked = ComputeSettings(precision="bf16", sample_precision="fp16").asked_precisions()
    assert asked == {"precision": "bf16", "sample_precision": "fp16"}


def test_a_device_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="device_batch is 0"):
        ComputeSettings(device_batch=0)
