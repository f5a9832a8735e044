import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.transforms import v2

from cedm_ray.errors import UserError
from cedm_ray.features.backbone_weights import fill_backbone, read_state
from cedm_ray.features.backbones import check_backbone, load_backbone
from cedm_ray.features.checkpoints import LOCAL_MODELS, timm_names
from cedm_ray.features.timm_backbone import _dim, _transform

NAME = "vit_tiny_patch16_224"
State = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, pretrained=False, num_classes=0).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def head(prefix: str) -> State:
    return {f"{prefix}mlp.0.weight": torch.zeros(4, 4), f"{prefix}last_layer.weight_g": torch.zeros(4, 1)}


def dino(state: State) -> State:
    return state


def dino_training(state: State) -> State:
    wrong = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "student": under("module.backbone.", wrong) | head("module.head."),
        "teacher": under("backbone.", state) | head("head."),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 100,
        "fp16_scaler": None,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def dino_student(state: State) -> State:
    return {"student": under("module.backbone.", state) | head("module.head."), "epoch": 7}


def ibot(state: State) -> State:
    return {"state_dict": state | {"masked_embed": torch.zeros(1, 192)}}


def ibot_training(state: State) -> State:
    masked = {"masked_embed": torch.zeros(1, 192)}
    return {"teacher": under("backbone.", state | masked) | head("head."), "epoch": 80}


def moco_v3(state: State) -> State:
    wrong = {name: torch.zeros_like(value) for name, value in state.items()}
    projector = {"head.0.weight": torch.zeros(4, 4), "head.1.running_mean": torch.zeros(4)}
    tensors = under("module.base_encoder.", state | projector) | under("module.momentum_encoder.", wrong | projector)
    tensors["module.predictor.0.weight"] = torch.zeros(4, 4)
    return {"epoch": 300, "arch": "vit_base", "state_dict": tensors, "optimizer": {"state": {}}}


@pytest.mark.parametrize("published", [dino, dino_training, dino_student, ibot, ibot_training, moco_v3])
def test_published_forms_load_to_the_same_features(
    model: nn.Module, images: Tensor, tmp_path: Path, published: Any
) -> None:
    torch.save(published(model.state_dict()), tmp_path / "w.pth.tar")
    backbone = load_backbone(NAME, tmp_path / "w.pth.tar", device="cpu")
    with torch.inference_mode():
        wanted = model(backbone.transform(images))  # type: ignore[attr-defined]
    assert torch.equal(backbone(images), wanted) and backbone.dim == 192


def test_what_no_rule_explains_is_an_error(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    for change, message in (
        ({"projector.weight": torch.zeros(2)}, r"have unknown projector\.weight; pass"),
        ({"backbone.pos_embed": torch.zeros(1, 50, 192)}, r"have another shape for pos_embed; pass"),
    ):
        torch.save({"teacher": under("backbone.", state) | head("head.") | change}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=message):
            load_backbone(NAME, tmp_path / "w.pth", device="cpu")
    torch.save({"state_dict": under("module.momentum_encoder.", state)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="lack cls_token"):
        load_backbone(NAME, tmp_path / "w.pth", device="cpu")


def official_dinov2(model: nn.Module) -> dict[str, Tensor]:
    """Random tensors by DINOv2's own names and shapes."""
    generator = torch.Generator().manual_seed(1)
    wanted = model.state_dict()
    state = {name: torch.randn(value.shape, generator=generator) for name, value in wanted.items()}
    dim = state["cls_token"].shape[-1]
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.randn(1, state["pos_embed"].shape[1] + 1, dim, generator=generator)
    if state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]:  # SwiGLU
        renamed = (name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.") for name in state)
        state = dict(zip(renamed, state.values(), strict=True))
    return state | {"mask_token": torch.randn(1, dim, generator=generator)}


@pytest.mark.parametrize("name", ["small_patch14_dinov2", "small_patch14_reg4_dinov2", "giant_patch14_dinov2"])
def test_dinov2s_own_names_become_timms_as_timm_does_it(name: str) -> None:
    sizes = {"depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0, "mlp_ratio": 4}
    model = timm.create_model(f"vit_{name}", pretrained=False, **sizes)
    state = official_dinov2(model)
    assert ("blocks.0.mlp.w12.weight" in state) == ("giant" in name)
    named = timm_names(state, model.state_dict())
    wanted = checkpoint_filter_fn(dict(state), model)
    assert named.keys() == wanted.keys() == model.state_dict().keys()
    assert all(torch.equal(named[key], wanted[key]) for key in wanted)
    fill_backbone(model, named, classifiers=("head",), source="w.pth")
    with pytest.raises(UserError, match="another shape for pos_embed"):
        small = state | {"pos_embed": state["pos_embed"][:, :50]}
        fill_backbone(model, timm_names(small, model.state_dict()), classifiers=("head",), source="w.pth")


def test_a_trainings_arguments_beside_the_tensors_are_refused_with_the_way_out(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "full.pth"
    torch.save(dino_training(model.state_dict()) | {"args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match=r"hold argparse\.Namespace.*save its tensors alone") as caught:
        load_backbone(NAME, path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    advice = message.partition("alone: ")[2].partition(", with KEY")[0].replace("[KEY]", "['teacher']")
    new = tmp_path / "new.pth"
    assert "weights_only=False" not in advice
    try:
        exec(advice, {"FILE": path, "NEW_FILE": new})  # the advice is code, and it works
    finally:
        torch.serialization.clear_safe_globals()
    assert torch.isfinite(load_backbone(NAME, new, device="cpu")(images)).all()


def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    with pytest.raises(UserError, match=r"w\.pt cannot be read .*TorchScript.*get a file of plain tensors"):
        read_state(path)


def test_plain_values_beside_tensors_are_passed_over_and_lists_are_not(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "epoch": 3, "arch": "vit", "scaler": None, "lr": 0.1}
    torch.save(state, tmp_path / "a.bin")
    assert list(read_state(tmp_path / "a.bin")) == ["w"]
    for number, content in enumerate([{"w": torch.ones(2), "more": [torch.ones(1)]}, {"epoch": 3}, [torch.ones(1)]]):
        torch.save(content, tmp_path / f"{number}.bin")
        with pytest.raises(UserError, match="hold no state dict"):
            read_state(tmp_path / f"{number}.bin")
    save_file({"state_dict": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="hold no state dict"):
        read_state(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", LOCAL_MODELS)
def test_models_that_are_on_no_hub_need_their_file(name: str, tmp_path: Path) -> None:
    for refuse in (check_backbone, lambda name, file: load_backbone(name, file, device="cpu")):
        with pytest.raises(UserError, match=rf"{name} is on no hub; pass its .*: --backbone-weights FILE"):
            refuse(name, None)
    with pytest.raises(UserError, match=rf"did you mean .*{name}"):
        check_backbone(name[:-1], None)
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    assert len(check_backbone(name, tmp_path / "w.safetensors")) == 64


@pytest.mark.parametrize(
    ("name", "interpolation", "dim"),
    [
        ("moco_v3_vit_base_patch16", v2.InterpolationMode.BILINEAR, 768),
        ("ibot_vit_large_patch16", v2.InterpolationMode.BICUBIC, 1024),
    ],
)
def test_local_models_transform_as_their_authors_evaluate(
    name: str, interpolation: v2.InterpolationMode, dim: int
) -> None:
    image = torch.randint(0, 256, (3, 90, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = v2.Compose(
        [v2.Resize(256, interpolation), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    wanted = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
    found = LOCAL_MODELS[name].transform(image[None])[0] * std + mean
    assert (found - wanted).abs().max() < 3.01 / 255 and (found - wanted).abs().quantile(0.99) < 1.01 / 255
    with torch.device("meta"):
        assert timm.create_model(LOCAL_MODELS[name].architecture, num_classes=0).num_features == dim


def test_a_local_model_is_built_with_its_own_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, original=timm.create_model, **kwargs: original(
        *args, **kwargs, depth=1
    ))  # fmt: skip
    model = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    torch.save(moco_v3(model.state_dict()), tmp_path / "vit-b.pth.tar")
    backbone = load_backbone("moco_v3_vit_base_patch16", tmp_path / "vit-b.pth.tar", device="cpu")
    images = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    with torch.inference_mode():
        wanted = model(LOCAL_MODELS[backbone.name].transform(images))
    assert torch.equal(backbone(images), wanted)
    assert backbone.resize == "bilinear, antialiased, to 224 px / 0.875, center crop"


@pytest.mark.parametrize(
    ("name", "dim", "size", "crop_share"),
    [("vit_base_patch16_224.dino", 768, 224, 0.9), ("vit_giant_patch14_dinov2.lvd142m", 1536, 518, 1.0)],
)
def test_timms_models_have_the_documented_dimensions_and_transforms(
    name: str, dim: int, size: int, crop_share: float
) -> None:
    with torch.device("meta"):  # up to 1.1 billion parameters, without their memory
        model = timm.create_model(name, num_classes=0).eval()
        assert model(torch.zeros(2, 3, size, size)).shape == (2, dim) and _dim(model) == dim
    transform = _transform(model)
    assert (transform.size, transform.interpolation, transform.crop_share) == ((size, size), "bicubic", crop_share)
    assert transform.mean == (0.485, 0.456, 0.406) and transform.std == (0.229, 0.224, 0.225)
