"""The denoiser, sampler and loss against the published implementation's numbers (tests/golden/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cedm_ray.diffusion.heun import heun_sample
from cedm_ray.diffusion.loss import edm_loss_per_pixel
from cedm_ray.diffusion.precond import EDMPrecond

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["edm_cifar_like", "edm_ffhq_like", "edm_uncond_gray"]


@dataclass
class Golden:
    arrays: dict[str, np.ndarray]
    net: EDMPrecond

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.arrays else None


def published_name(name: str, img_resolution: int) -> str:
    """Name under which the published EDM networks store one of our parameters."""
    side = f"{img_resolution}x{img_resolution}"
    for ours, theirs in (
        (".encoder.", ".enc."),
        (".decoder.", ".dec."),
        (".attention.norm.", ".norm2."),
        (".attention.", "."),
        (".first_conv.", f".enc.{side}_conv."),
        (".out_norm.", f".dec.{side}_aux_norm."),
        (".out_conv.", f".dec.{side}_aux_conv."),
    ):
        name = name.replace(ours, theirs)
    return name


def fill(net: EDMPrecond, published: dict[str, Tensor]) -> None:
    """Give the network the published weights, all of them; the filters of its resampling are those of the box."""
    weights = {name: tensor for name, tensor in published.items() if not name.endswith("resample_filter")}
    assert all(torch.all(published[name] == 0.25) for name in published.keys() - weights.keys())
    named = {published_name(name, net.img_resolution): name for name in net.state_dict()}
    assert weights.keys() == named.keys()
    net.load_state_dict({named[name]: tensor for name, tensor in weights.items()})


def read(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    net = EDMPrecond(**json.loads(str(arrays["config_json"]))).eval()
    golden = Golden(arrays, net)
    fill(net, {name.removeprefix("param/"): golden[name] for name in arrays if name.startswith("param/")})
    return golden


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(request.param)


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_denoised_images_match(golden: Golden) -> None:
    ours = golden.net(golden["x"], golden["sigma"], golden.get("class_index"), golden.get("augment_labels"))
    assert ours.dtype == torch.float32
    assert relative(ours, golden["denoised"]) < 1e-5


@torch.no_grad()
def test_denoised_images_match_without_augment_labels(golden: Golden) -> None:
    theirs = golden.get("denoised_no_augment")
    ours = golden.net(golden["x"], golden["sigma"], golden.get("class_index"))
    assert relative(ours, golden["denoised"] if theirs is None else theirs) < 1e-5


@pytest.mark.parametrize("num_steps", [5, 18])
def test_heun_samples_match(golden: Golden, num_steps: int) -> None:
    ours = heun_sample(golden.net, golden["latents"], golden.get("class_index"), num_steps=num_steps)
    assert ours.dtype == torch.float64
    assert relative(ours, golden[f"heun_{num_steps}"]) < 1e-5


def test_loss_and_gradients_match(golden: Golden) -> None:
    net = golden.net
    net.zero_grad()
    loss = edm_loss_per_pixel(
        net, golden["y"], golden["sigma"], golden["noise"], golden.get("class_index"), golden.get("augment_labels")
    )
    assert relative(loss.detach(), golden["loss_per_pixel"]) < 1e-4
    (loss.sum() / len(loss)).backward()
    for name, parameter in net.named_parameters():
        theirs = golden[f"gradnorm/{published_name(name, net.img_resolution)}"]
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(float(theirs), rel=1e-3), name


@pytest.mark.parametrize(
    ("resolution", "channel_mult", "label_dim", "count"),
    [(32, (2, 2, 2), 200, 55_759_619), (64, (1, 2, 2, 2), 400, 61_856_899)],
)
def test_full_networks_have_the_published_parameter_count(
    resolution: int, channel_mult: tuple[int, ...], label_dim: int, count: int
) -> None:
    with torch.device("meta"):
        net = EDMPrecond(resolution, 3, label_dim, 9, channel_mult=channel_mult)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
