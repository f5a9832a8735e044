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
from cedm_ray.diffusion.precond import EDMPrecond, load_edm_state_dict, published_name

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


def params(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}


def read(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    net = EDMPrecond(**json.loads(str(arrays["config_json"]))).eval()
    load_edm_state_dict(net, params(arrays))
    return Golden(arrays, net)


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


def test_loading_names_what_does_not_fit() -> None:
    golden = read("edm_uncond_gray")
    weights = params(golden.arrays)
    name = "model.enc.8x8_conv.weight"
    with pytest.raises(ValueError, match=r"missing \['model.enc.8x8_conv.weight'\]"):
        load_edm_state_dict(golden.net, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match=r"unexpected \['model.extra'\]"):
        load_edm_state_dict(golden.net, {**weights, "model.extra": np.zeros(1)})
    with pytest.raises(ValueError, match=r"model.enc.8x8_conv.weight has shape \(2,\)"):
        load_edm_state_dict(golden.net, {**weights, name: np.zeros(2)})
    filters = next(k for k in weights if k.endswith("resample_filter"))
    with pytest.raises(ValueError, match="box filter"):
        load_edm_state_dict(golden.net, {**weights, filters: np.ones((1, 1, 2, 2)) / 3})


def test_a_refused_state_dict_leaves_the_network_unchanged() -> None:
    golden = read("edm_uncond_gray")
    before = {k: v.clone() for k, v in golden.net.state_dict().items()}
    broken = {k: v * 0 for k, v in params(golden.arrays).items() if not k.endswith("resample_filter")}
    with pytest.raises(ValueError, match="shape"):
        load_edm_state_dict(golden.net, {**broken, "model.dec.8x8_aux_conv.bias": np.zeros(3)})
    assert all(torch.equal(v, before[k]) for k, v in golden.net.state_dict().items())
