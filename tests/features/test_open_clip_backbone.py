import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone, load_backbone
from cedm_ray.features.open_clip_backbone import _transform, build_open_clip, load_open_clip
from cedm_ray.weights.listing import file_sha256

ARCHITECTURE = "ViT-S-32-alt"
NAME = f"open_clip:{ARCHITECTURE}"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.create_model(ARCHITECTURE, pretrained=None).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def test_features_are_open_clips_projected_ones(model: Any, images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(contiguous(model), path)
    assert check_backbone(NAME, path) == file_sha256(path)
    backbone = load_backbone(NAME, path, device="cpu")
    with torch.inference_mode():
        wanted = model.encode_image(backbone.transform(images), normalize=False)  # type: ignore[attr-defined]
    features = backbone(images)
    assert torch.equal(features, wanted) and features.shape == (2, backbone.dim) == (2, 256)
    assert (features.norm(dim=1) - 1).abs().min() > 0.01  # before they are brought to length 1
    assert backbone.name == NAME and backbone.dtype == "float32"


def test_training_checkpoints_and_missing_scales_are_read(model: Any, images: Tensor, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in model.state_dict().items() if name != "logit_scale"}
    torch.save({"state_dict": state | {"module.vocab_size": torch.tensor(1)}, "epoch": 3}, tmp_path / "w.bin")
    backbone = load_backbone(NAME, tmp_path / "w.bin", device="cpu")
    with torch.inference_mode():
        assert torch.equal(backbone(images), model.encode_image(backbone.transform(images)))  # type: ignore[attr-defined]
    for part, message in (("visual.proj", r"lack visual\.proj"), ("ln_final.bias", r"lack ln_final\.bias")):
        torch.save({name: value for name, value in model.state_dict().items() if name != part}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=message):
            load_backbone(NAME, tmp_path / "w.pt", device="cpu")
    torch.save(model.state_dict() | {"extra": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="have unknown extra"):
        load_backbone(NAME, tmp_path / "w.pt", device="cpu")


def test_tags_of_open_clips_own_weights_are_fetched_and_read_here(
    model: Any, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    asked = []

    def fetch(config: dict[str, Any]) -> str:
        asked.append(config)
        return str(tmp_path / "open_clip_pytorch_model.bin")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("open_clip must not load a file itself")

    config = {"hf_hub": "somewhere/", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCHITECTURE, {"mine": config})
    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", refuse)
    backbone = load_backbone(f"{NAME}/mine", None, device="cpu")
    assert asked == [config] and backbone.transform.mean == (0.5, 0.4, 0.3)  # type: ignore[attr-defined]
    quick = open_clip.create_model(ARCHITECTURE, pretrained=None, force_quick_gelu=True).eval()
    quick.load_state_dict(model.state_dict())
    with torch.inference_mode():
        pixels = backbone.transform(images)  # type: ignore[attr-defined]
        assert torch.equal(backbone(images), quick.encode_image(pixels))
        assert not torch.equal(backbone(images), model.encode_image(pixels))


def test_unknown_names_are_answered_with_close_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(open_clip, "create_model")
    for good in ("open_clip:ViT-bigG-14/laion2b_s39b_b160k", "open_clip:ViT-B-32/openai"):
        assert check_backbone(good, None) == good
    for bad, message in (
        ("open_clip:ViT-B-32/openia", r"did you mean .*open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-bigG14/laion2b_s39b_b160k", r"did you mean open_clip:ViT-bigG-14/laion2b_s39b_b160k"),
        ("open_clip:ViT-B32", "did you mean .*open_clip:ViT-B-32"),
        ("open_clip:hf-hub:someone/model", "unknown"),
        ("open_clip:" + 60 * "?", r"list_pretrained\(\)"),
        ("open_clip:ViT-B-32", r"names no weights; add a tag \(open_clip:ViT-B-32/TAG\) or pass --backbone-weights"),
    ):
        with pytest.raises(UserError, match=message):
            check_backbone(bad, None)
    with pytest.raises(UserError, match=r"gone\.pt do not exist"):
        check_backbone(NAME, tmp_path / "gone.pt")
    with pytest.raises(UserError, match="no model with a text tower"):
        load_open_clip("vit_base_patch16_224.dino", None)


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("no route to host\nand a second line")

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    with pytest.raises(
        UserError, match=r"B-32/openai cannot be fetched \(FileNotFoundError\).*--backbone-weights FILE"
    ):
        load_backbone("open_clip:ViT-B-32/openai", None, device="cpu")


def test_a_text_tower_of_another_library_needs_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(
        UserError, match=r"text tower of open_clip:roberta-ViT-B-32 cannot be fetched \(OSError\); name"
    ):
        build_open_clip("open_clip:roberta-ViT-B-32")
    with pytest.raises(OSError, match="no route"):  # a model that asks no hub for anything
        build_open_clip(NAME)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(32, 32), (200, 300), (131, 90)])
def test_the_transform_agrees_with_open_clips_on_pil_images(
    shape: tuple[int, int], interpolation: str, resize_mode: str
) -> None:
    config = {"size": 64, "interpolation": interpolation, "resize_mode": resize_mode}
    config |= {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    smooth = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    image = nn.functional.interpolate(255 * smooth, shape, mode="bilinear")[0].to(torch.uint8)
    reference = image_transform_v2(PreprocessCfg(**config), is_train=False)
    wanted = reference(Image.fromarray(image.permute(1, 2, 0).numpy()))
    difference = (_transform(config)(image[None])[0] - wanted).abs() * 0.28
    assert difference.quantile(0.99) < 1.1 / 255 and difference.max() < 3.1 / 255


def test_preprocessing_that_pads_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_mode is longest"):
        _transform({"resize_mode": "longest"})


def test_every_pretrained_model_has_a_transform_that_is_known() -> None:
    for architecture, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(architecture, tag)
        assert _transform(config | {"size": 224}).mean == tuple(config["mean"])


def test_vit_big_g_has_the_documented_dimensions_and_transform() -> None:
    tag = open_clip.get_pretrained_cfg("ViT-bigG-14", "laion2b_s39b_b160k")
    with torch.device("meta"):  # 2.5 billion parameters, without their memory
        model = open_clip.create_model("ViT-bigG-14", device="meta", force_preprocess_cfg=tag).eval()
        transform = _transform(model.visual.preprocess_cfg)
        assert model.visual(torch.zeros(2, 3, *transform.size)).shape == (2, 1280)
    assert (transform.size, transform.interpolation, transform.crop_share) == ((224, 224), "bicubic", 1.0)
    assert transform.mean == open_clip.OPENAI_DATASET_MEAN and transform.std == open_clip.OPENAI_DATASET_STD


def test_the_root_logger_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    before = list(logging.getLogger().handlers)
    build_open_clip(NAME)
    assert logging.getLogger().handlers == before and not logging.getLogger().filters
    assert not [record for record in caplog.records if record.name == "root"]
