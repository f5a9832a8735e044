import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.features import backbones
from cedm_ray.features.backbones import check_backbone, load_backbone
from cedm_ray.features.model_backbone import compute_dtype
from cedm_ray.features.pixels import PixelStats, pixel_stats

NAME = "test_efficientnet"  # timm's own tiny model for tests, 160 pixels


@pytest.fixture(scope="module")
def full_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, pretrained=False).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def saved(state: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def features_by_timm(model: torch.nn.Module, images: Tensor, transform: Any) -> Tensor:
    with torch.inference_mode():
        pooled: Tensor = model.forward_head(model.forward_features(transform(images)), pre_logits=True)  # type: ignore[operator]
    return pooled


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_features_are_timms_pooled_features(
    full_model: torch.nn.Module, images: Tensor, tmp_path: Path, suffix: str
) -> None:
    path = saved(full_model.state_dict(), tmp_path / f"weights{suffix}")
    backbone = load_backbone(NAME, path, device="cpu")
    features = backbone(images)
    assert features.dtype == torch.float32 and features.shape == (3, backbone.dim) and backbone.name == NAME
    torch.testing.assert_close(features, features_by_timm(full_model, images, backbone.transform), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backbone(images[1:2]), features[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nest", [("state_dict",), ("model",), ("model", "state_dict")])
def test_nested_and_prefixed_checkpoints_are_read(
    full_model: torch.nn.Module, images: Tensor, tmp_path: Path, nest: tuple[str, ...]
) -> None:
    state: dict[str, Any] = {f"module.{name}": value for name, value in full_model.state_dict().items()}
    for name in nest:
        state = {name: state, "epoch": 3}
    backbone = load_backbone(NAME, saved(state, tmp_path / "w.pth"), device="cpu")
    torch.testing.assert_close(
        backbone(images), features_by_timm(full_model, images, backbone.transform), rtol=1e-5, atol=1e-6
    )


def test_missing_unknown_and_misshapen_tensors_are_named(full_model: torch.nn.Module, tmp_path: Path) -> None:
    state = full_model.state_dict()
    stem = {name: value for name, value in state.items() if name != "conv_stem.weight"}
    with pytest.raises(UserError, match=r"lack conv_stem\.weight; pass"):
        load_backbone(NAME, saved(stem, tmp_path / "a.pth"), device="cpu")
    with pytest.raises(UserError, match=r"have unknown extra\.weight"):
        load_backbone(NAME, saved(state | {"extra.weight": torch.zeros(1)}, tmp_path / "b.pth"), device="cpu")
    with pytest.raises(UserError, match=r"another shape for conv_stem\.weight"):
        load_backbone(NAME, saved(state | {"conv_stem.weight": torch.zeros(1)}, tmp_path / "c.pth"), device="cpu")
    with pytest.raises(UserError, match=r"and \d+ more"):
        load_backbone(NAME, saved({"fc.weight": torch.zeros(1)}, tmp_path / "d.pth"), device="cpu")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    path = saved({"state_dict": Trap(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth cannot be read"):
        load_backbone(NAME, path, device="cpu")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a tensor file"):
        load_backbone(NAME, tmp_path / "bare.pth", device="cpu")


def test_mistakes_are_found_before_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm, "create_model")
    check_backbone("vit_base_patch16_224.dino", None)
    check_backbone("tf_efficientnet_lite0", None)
    check_backbone("pixels", None)
    with pytest.raises(UserError, match=r"did you mean .*vit_base_patch16_224\.dino"):
        check_backbone("vit_base_patch16_224.dyno", None)
    with pytest.raises(UserError, match="did you mean efficientnet_lite0"):
        check_backbone("efficientnet_light0", None)
    with pytest.raises(UserError, match=r"gone\.pth do not exist"):
        check_backbone(NAME, tmp_path / "gone.pth")
    for name, message in (("w.npz", "end in"), ("w.pth", "not a tensor file"), ("w.safetensors", "cannot be read")):
        (tmp_path / name).write_bytes(b"no tensors here")
        with pytest.raises(UserError, match=message):
            check_backbone(NAME, tmp_path / name)
    with pytest.raises(UserError, match="no weights"):
        check_backbone("pixels", tmp_path / "w.pth")


def test_on_a_gpu_the_network_runs_in_bfloat16_and_the_transform_does_not(
    full_model: torch.nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compute_dtype("cuda:1") == "bfloat16" and compute_dtype(torch.device("cpu")) == "float32"
    path = saved(full_model.state_dict(), tmp_path / "w.pth")
    exact = load_backbone(NAME, path, device="cpu")
    monkeypatch.setattr(backbones, "compute_dtype", lambda device: "bfloat16")
    rounded = load_backbone(NAME, path, device="cpu")
    assert (exact.dtype, rounded.dtype) == ("float32", "bfloat16")
    found, wanted = rounded(images), exact(images)
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * wanted.std().item())
    seen: list[torch.dtype] = []
    rounded._model.conv_stem.register_forward_hook(  # type: ignore[attr-defined]
        lambda layer, inputs, output: seen.extend((inputs[0].dtype, output.dtype, layer.weight.dtype))
    )
    rounded(images)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match=r"cannot be fetched \(OSError\).*--backbone-weights FILE") as caught:
        load_backbone("vit_base_patch16_224.dino", None, device="cpu")
    assert "\n" not in str(caught.value)


def some_images(channels: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 200, (500, channels, 4, 5)) + 20 * np.arange(channels)[:, None, None]).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_centred_and_scaled_as_sklearn_does(channels: int) -> None:
    images = some_images(channels)
    backbone = load_backbone("pixels", None, device="cpu", pixel_stats=pixel_stats(images))
    features = backbone(torch.from_numpy(images)).numpy()
    assert features.shape == (500, backbone.dim) == (500, channels * 20) and features.dtype == np.float32
    centred = StandardScaler(with_std=False).fit_transform(images.reshape(500, -1).astype(np.float64))
    by_channel = centred.reshape(500, channels, 20).transpose(0, 2, 1).reshape(-1, channels)
    wanted = StandardScaler().fit_transform(by_channel).reshape(500, 20, channels).transpose(0, 2, 1).reshape(500, -1)
    np.testing.assert_allclose(features, wanted, atol=1e-5)


def test_a_constant_channel_gives_zeros() -> None:
    images = np.full((9, 1, 2, 2), 7, np.uint8)
    backbone = load_backbone("pixels", None, device="cpu", pixel_stats=pixel_stats(images))
    assert (backbone(torch.from_numpy(images)) == 0).all() and backbone.dtype == "float32"


def test_pixels_of_another_shape_or_without_statistics_are_refused() -> None:
    backbone = load_backbone("pixels", None, device="cpu", pixel_stats=pixel_stats(some_images(3)))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 5\)"):
        backbone(torch.zeros(2, 1, 4, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pixel_stats is None"):
        load_backbone("pixels", None, device="cpu")
    with pytest.raises(ValueError, match="std"):
        PixelStats(np.zeros((1, 2, 2), np.float32), np.zeros((1, 1, 1), np.float32))
