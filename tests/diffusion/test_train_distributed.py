import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from cedm_ray.diffusion.augment import Filters
from cedm_ray.diffusion.compute import Compute
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.order import EpochOrder
from cedm_ray.diffusion.passes import Passes
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.train import _backward, _draw, train
from cedm_ray.diffusion.train_state import TrainState, new_state
from cedm_ray.diffusion.unet import NO_CONDITION

WORLD = 2
SETTINGS = TrainSettings(total_batch=8, lr=2e-3, lr_rampup_kimg=0.0, augment_prob=0.3, label_dropout=0.4)


def start(dropout: float = 0.2) -> TrainState:
    torch.manual_seed(0)
    return new_state(build_net(NetSettings(8, (1, 2), 1, (4,), dropout), 8, 1, 3, augment=True))


def data() -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(20) % 3


def backward(state: TrainState, images: Tensor, clusters: Tensor, rank: int) -> None:
    draw = _draw(state, images, clusters, SETTINGS, Filters.of(8, 8), 0, rank)
    _backward(Passes(state.net, Compute(), len(images), SETTINGS.sigma_data), state, draw, 0, rank)


def gradients(state: TrainState) -> dict[str, Tensor]:
    return {f"grad.{name}": p.grad.clone() for name, p in state.net.named_parameters() if p.grad is not None}


def variant(rank: int, compute: Compute) -> Tensor:
    """Averaged weights after some steps without dropout, in one row."""
    state = start(dropout=0.0)
    run = train(state, ResidentImages(*data()), settings=SETTINGS, stop_nimg=40, seed=0, compute=compute,
                rank=rank, world_size=WORLD)  # fmt: skip
    for _ in run:
        pass
    return torch.cat([parameter.flatten() for parameter in state.ema.parameters()])


def variants(rank: int) -> dict[str, Tensor]:
    """The same training computed in several ways."""
    found = {"plain": variant(rank, Compute()), "parts": variant(rank, Compute(device_batch=2))}
    found["channels_last"] = variant(rank, Compute(channels_last=True))
    compiler = torch.compile
    try:
        torch.compile = partial(compiler, backend="aot_eager")
        found["compiled"] = variant(rank, Compute(compile=True))
        found["compiled parts"] = variant(rank, Compute(compile=True, device_batch=2))
        if rank == 0:  # of the other process the compiler works
            torch.compile = lambda _, **__: fail
        found["compiled by one"] = variant(rank, Compute(compile=True))
    finally:
        torch.compile = compiler
    return found


def fail(*_: object) -> None:
    raise RuntimeError("no compiler here")


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        state = start()
        images, clusters = data()

        def go(stop_nimg: int) -> list[float]:
            steps = train(state, ResidentImages(images, clusters), settings=SETTINGS, stop_nimg=stop_nimg, seed=0,
                          rank=rank, world_size=WORLD)  # fmt: skip
            return [float(step.loss) for step in steps]

        losses = go(8)
        first = gradients(state)
        losses += go(24)  # a second call wraps the same network again
        save_file(variants(rank), folder / f"variants-{rank}.safetensors")
        save_file(
            {**first, **state.net.state_dict(), **{f"ema.{k}": v.clone() for k, v in state.ema.state_dict().items()},
             "losses": torch.tensor(losses)},
            folder / f"{rank}.safetensors",
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have trained."""
    folder = tmp_path_factory.mktemp("processes")
    # Run as scripts: a spawned process could not import a test module that lies outside every package.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    commands = [[sys.executable, __file__, str(rank), str(folder)] for rank in range(WORLD)]
    workers = [subprocess.Popen(command, env=env) for command in commands]
    try:
        assert [process.wait(timeout=240) for process in workers] == [0] * WORLD
    finally:
        for process in workers:
            process.kill()
    return folder


def test_two_processes_stay_identical_and_average_their_gradients(made: Path) -> None:
    zero, one = (load_file(made / f"{rank}.safetensors") for rank in range(WORLD))
    assert not torch.equal(zero.pop("losses"), one.pop("losses"))  # each has its own half of the batch
    assert all(torch.equal(zero[name], one[name]) for name in zero)

    # Each process's own gradient, computed alone: its half of the same batch, its own random numbers.
    images, clusters = data()
    alone = []
    for rank in range(WORLD):
        state = start()
        half = EpochOrder(20, 0).take(rank * 4, 4)
        backward(state, images[half], clusters[half], rank)
        alone.append(gradients(state))
    for name, gradient in alone[0].items():
        mean = (gradient + alone[1][name]) / 2
        torch.testing.assert_close(zero[name], mean, atol=1e-6 * float(mean.abs().max()) + 1e-7, rtol=1e-4)


@pytest.mark.parametrize("way", ["parts", "channels_last", "compiled", "compiled parts", "compiled by one"])
def test_gradients_are_averaged_however_they_are_computed(made: Path, way: str) -> None:
    zero, one = (load_file(made / f"variants-{rank}.safetensors") for rank in range(WORLD))
    torch.testing.assert_close(zero[way], one[way], rtol=1e-5, atol=1e-6)
    # Adam's first steps turn a rounding of a gradient near 0 into a step of lr, so a few weights may differ by some.
    moved = (zero["plain"] - torch.cat([p.flatten() for p in start(0.0).ema.parameters()])).norm()
    assert (zero[way] - zero["plain"]).norm() < 0.03 * moved


def test_each_process_draws_its_own_images_to_go_without_a_condition() -> None:
    images, clusters = data()
    seen: list[Tensor] = []
    for rank in range(WORLD):
        state = start()
        state.net.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
        backward(state, images, clusters, rank)
    zero, one = (given == NO_CONDITION for given in seen)
    assert zero.any() and one.any() and not torch.equal(zero, one)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
