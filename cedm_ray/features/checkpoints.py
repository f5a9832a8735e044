"""Published checkpoints of DINO, iBOT, MoCo v3 and DINOv2 in the names that timm's vision transformers use."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cedm_ray.features.transform import Transform

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# What a training keeps around the backbone, by the prefix of the backbone's own tensors.
_AROUND: dict[str, tuple[str, ...]] = {
    "base_encoder.": ("momentum_encoder.", "predictor."),  # MoCo v3
    "backbone.": ("head.",),  # DINO and iBOT
}
_MASKS = ("mask_token", "masked_embed")  # stand in for masked patches in training; no image needs them


@dataclass(frozen=True)
class LocalModel:
    """A published model that fits an architecture of timm, but has no name there."""

    architecture: str
    """timm's name of the architecture."""
    transform: Transform
    """The transform of the model's own evaluation."""
    checkpoint: str
    """The file that its authors publish."""


def _resize_256(interpolation: str) -> Transform:
    return Transform((224, 224), interpolation, 224 / 256, "center", _IMAGENET_MEAN, _IMAGENET_STD)


LOCAL_MODELS = {
    # arXiv 2104.02057; its linear evaluation resizes with torchvision's default, bilinear.
    "moco_v3_vit_base_patch16": LocalModel(
        "vit_base_patch16_224", _resize_256("bilinear"), "MoCo v3 checkpoint vit-b-300ep.pth.tar"
    ),
    # arXiv 2111.07832; its nearest-neighbour evaluation resizes bicubically.
    "ibot_vit_large_patch16": LocalModel(
        "vit_large_patch16_224", _resize_256("bicubic"), "iBOT ViT-L/16 checkpoint checkpoint_teacher.pth"
    ),
}


def timm_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published checkpoint; what no rule explains keeps its name.

    Known are the backbones inside training checkpoints of MoCo v3 (``base_encoder.``), DINO and iBOT
    (``backbone.``), whose heads, predictor and momentum encoder are left out, and DINOv2's own names.

    Args:
        state: Tensors by name, as read from the file.
        wanted: The state dict of the timm model.

    Returns:
        Tensors by timm's names, as far as the rules go.
    """
    named = _dinov2(_backbone_alone(state), wanted)
    return {name: value for name, value in named.items() if name in wanted or name not in _MASKS}


def _backbone_alone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix, around in _AROUND.items():
        if any(name.startswith(prefix) for name in state):
            kept = {name: value for name, value in state.items() if not name.startswith(around)}
            return {name.removeprefix(prefix): value for name, value in kept.items()}
    return dict(state)


def _dinov2(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 names the layers of SwiGLU w12 and w3, and adds a position to the class token, which timm does not."""
    named = {}
    for name, value in state.items():
        other = re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", name))
        named[other if other in wanted else name] = value
    if "reg_token" in wanted and {"register_tokens", "cls_token", "pos_embed"} <= named.keys():
        positions = named["pos_embed"]
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"], named["pos_embed"] = named["cls_token"] + positions[:, :1], positions[:, 1:]
    return named
