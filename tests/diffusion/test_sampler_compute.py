import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from cedm_ray.diffusion.compute import Precision
from cedm_ray.diffusion.heun import heun_sample
from cedm_ray.diffusion.precond import EDMPrecond

MakeNet = Callable[..., EDMPrecond]
Images = Callable[..., Tensor]
Batches = Callable[..., Iterator[Tensor]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Compiles without a compiler: the graphs are found and run as they are."""
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_a_compiled_network_gives_the_same_images_and_is_compiled_once(
    counted: CompileCounter, network: MakeNet, images: Images, batches: Batches
) -> None:
    net, sizes = network(), []
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    plain = images(net, range(11), 4)
    assert set(sizes) == {4, 3}
    compiled = batches(net, range(11), 4, compile=True)
    first = next(compiled)
    graphs = counted.frame_count
    assert graphs > 0
    parts = [first, *compiled]
    assert [len(part) for part in parts] == [4, 4, 3]  # computed as 4: neither a size of 3 nor a variable one
    # Other convolutions round differently: at most the last bit of a pixel may move.
    assert (torch.cat(parts).int() - plain.int()).abs().max() <= 1
    images(net, range(7), 4, compile=True)
    assert counted.frame_count == graphs


def test_after_sampling_compiled_the_network_is_what_it_was(
    counted: CompileCounter, network: MakeNet, images: Images
) -> None:
    net = network().train()
    before = [name for name, _ in net.named_modules()], list(net.state_dict())
    images(net, range(4), 4, compile=True)
    graphs, ops = counted.frame_count, counted.op_count
    assert net.training and before == ([name for name, _ in net.named_modules()], list(net.state_dict()))
    net(torch.zeros(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 3])).sum().backward()
    assert net.model.out_conv.weight.grad is not None
    assert (counted.frame_count, counted.op_count) == (graphs, ops)


def test_fewer_images_than_a_batch_are_not_filled_up_to_one(
    counted: CompileCounter, network: MakeNet, images: Images
) -> None:
    net, sizes = network(), []
    net.model.first_conv.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert len(images(net, range(3), 64, compile=True)) == 3
    assert set(sizes) == {3}


def test_where_compiling_fails_one_warning_says_why_and_the_images_are_the_same(
    monkeypatch: pytest.MonkeyPatch, network: MakeNet, images: Images
) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("no compiler here\nand more")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    net = network()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = images(net, range(11), 4, compile=True)
    assert [each.category for each in told] == [RuntimeWarning]
    reason = str(told[0].message)
    assert reason.startswith("torch.compile failed, and sampling goes on without it, slower: BackendCompilerFailed")
    assert "no compiler here" in reason and "\n" not in reason
    torch._dynamo.reset()
    # The last batch was filled up all the same: the rounding of a larger batch.
    assert (found.int() - images(net, range(11), 4).int()).abs().max() <= 1


def test_too_little_memory_is_no_failure_to_compile(
    monkeypatch: pytest.MonkeyPatch, network: MakeNet, images: Images
) -> None:
    def full(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda net, dynamic: full)
    with pytest.raises(torch.OutOfMemoryError):
        images(network(), range(2), 2, compile=True)


class Recorder(nn.Module):
    """A denoiser of one convolution, which notes what it is given and what it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.seen: list[tuple[torch.dtype, ...]] = []

    def forward(self, x: Tensor, sigma: Tensor, class_index: Tensor | None) -> Tensor:
        out: Tensor = self.conv(x)
        self.seen.append((x.dtype, sigma.dtype, out.dtype))
        return out


@pytest.mark.parametrize(
    "precision, dtype", [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_precision_is_that_of_the_products_and_of_nothing_else(precision: Precision, dtype: torch.dtype) -> None:
    net = Recorder()
    found = heun_sample(net, torch.randn(2, 1, 4, 4), num_steps=3, precision=precision)
    assert found.dtype == torch.float64
    assert net.seen == [(torch.float32, torch.float32, dtype)] * 5


@pytest.mark.parametrize("precision, rounding", [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_moves_images_by_the_rounding_of_its_numbers(
    precision: Precision, rounding: float, network: MakeNet
) -> None:
    net, latents, clusters = network(std=0.1).eval(), torch.randn(8, 1, 8, 8), torch.arange(8) % 5
    plain = heun_sample(net, latents, clusters, 18)
    apart = heun_sample(net, latents, clusters, 18, precision=precision) - plain
    # The network's part of an image is about sigma_data at every level; its errors of 35 calls add up.
    assert 0 < apart.square().mean().sqrt() < 8 * rounding * plain.std()


def test_bf16_goes_through_to_generated_images_and_leaves_them_nearly_the_same(
    network: MakeNet, images: Images
) -> None:
    net = network()
    plain, rounded = images(net, range(6), 4), images(net, range(6), 4, precision="bf16")
    apart = (plain.int() - rounded.int()).abs().float()
    assert 0 < apart.mean() < 1


def test_where_fp16_overflows_it_is_said_and_float32_takes_over(network: MakeNet, images: Images) -> None:
    net = network()
    with torch.no_grad():
        net.model.first_conv.weight.mul_(1e6)  # normalised behind it, but beyond 65,504 before
    plain = images(net, range(10), 4)
    with pytest.warns(RuntimeWarning, match="leave the range of fp16; images are sampled in float32") as told:
        found = images(net, range(10), 4, precision="fp16")
    assert torch.equal(found, plain) and len(told) == 1


def test_where_no_batch_size_is_given_the_batches_are_even(network: MakeNet, images: Images, batches: Batches) -> None:
    net = network()
    parts = list(batches(net, range(70), None, num_steps=1))
    assert [len(part) for part in parts] == [35, 35]
    assert torch.equal(torch.cat(parts), images(net, range(70), 35, num_steps=1))
    assert list(batches(net, range(0), None)) == []


def test_the_next_batch_is_drawn_before_this_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, network: MakeNet, batches: Batches
) -> None:
    from cedm_ray.diffusion import sampler

    drawn: list[int] = []
    original = sampler.initial_noise

    def noted(seed: int, indices: Any, shape: Any, device: Any) -> Tensor:
        drawn.append(indices[0])
        return original(seed, indices, shape, device)

    monkeypatch.setattr(sampler, "initial_noise", noted)
    parts = batches(network(), range(11), 4, num_steps=1)
    seen = [list(drawn) for _ in parts]
    assert seen == [[0, 4], [0, 4, 8], [0, 4, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_real_compiler_gives_the_same_images(precision: Precision, network: MakeNet, images: Images) -> None:
    torch._dynamo.reset()
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compiled = images(net, range(11), 4, compile=True, precision=precision)
    apart = (compiled.int() - images(net, range(11), 4, precision=precision).int()).abs()
    assert apart.max() <= (1 if precision == "float32" else 8) and apart.float().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_no_step_of_the_sampler_waits_for_the_gpu(precision: Precision, network: MakeNet) -> None:
    net = network().cuda().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents, clusters = torch.randn(8, 1, 8, 8).cuda(), (torch.arange(8) % 5).cuda()
    heun_sample(net, latents, clusters, 4, precision=precision)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        heun_sample(net, latents, clusters, 4, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_fp16_gives_nearly_the_images_of_a_processor(compile: bool, network: MakeNet, images: Images) -> None:
    plain = images(network(), range(70), 64)
    net = network().cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = images(net, range(70), None, device="cuda", precision="fp16", compile=compile)
    assert found.is_cuda and (found.cpu().int() - plain.int()).abs().float().mean() < 1
