"""Image towers of OpenCLIP as backbones, named ``open_clip:ARCH/TAG``."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cedm_ray.errors import UserError, did_you_mean
from cedm_ray.features.backbone_weights import fetching_weights, fill_backbone, read_state
from cedm_ray.features.model_backbone import Dtype, ModelBackbone
from cedm_ray.features.transform import Transform
from cedm_ray.weights.hub import fetching

OPEN_CLIP = "open_clip:"
_NO_FEATURES = ("logit_scale", "logit_bias")  # the loss's own, not all files have both
_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's files hold as tensors


def split_name(name: str) -> tuple[str, str | None]:
    """Architecture and pretrained tag of ``open_clip:ARCH/TAG``, or of ``open_clip:ARCH``, which has no tag."""
    architecture, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    return architecture, tag or None


def check_open_clip(name: str, weights: Path | None) -> None:
    """Refuse a name that OpenCLIP does not have, or that leaves the weights open.

    Args:
        name: ``open_clip:ARCH/TAG``; the tag may be left out with a weight file, and means OpenAI's preprocessing then.
        weights: File with the weights, or None.

    Raises:
        UserError: If the architecture or the tag is unknown, or there is neither tag nor file.
    """
    import open_clip

    if not name.startswith(OPEN_CLIP):
        raise UserError(f"{name!r} is no model with a text tower; name one as {OPEN_CLIP}ARCH/TAG")
    architecture, tag = split_name(name)
    pretrained = [f"{OPEN_CLIP}{known}/{tag_of}" for known, tag_of in open_clip.list_pretrained()]
    if architecture in open_clip.list_models():
        if tag is None and weights is None:
            raise UserError(f"backbone {name} names no weights; add a tag ({name}/TAG) or pass --backbone-weights FILE")
        if tag is None or name in pretrained:
            return
    known = [*pretrained, *(f"{OPEN_CLIP}{known}" for known in open_clip.list_models())]
    hint = did_you_mean(name, known, n=3) or "; see open_clip.list_pretrained() for the names"
    raise UserError(f"backbone {name!r} is unknown{hint}")


def open_clip_backbone(name: str, weights: Path | None, *, device: torch.device | str, dtype: Dtype) -> ModelBackbone:
    """The image tower of an OpenCLIP model behind that model's own preprocessing.

    The features are the projected ones, those of ``encode_image`` before they are brought to length 1: they lie in
    one space with the text features.

    Args:
        name: As for :func:`check_open_clip`.
        weights: File with the state dict of the whole model; None for OpenCLIP's own, from its cache or the network.
        device: Where to compute.
        dtype: Arithmetic of the network.

    Raises:
        UserError: If the name is unknown, or the weights cannot be had or do not fit.
    """
    import open_clip

    model = load_open_clip(name, weights)
    dim = int(open_clip.get_model_config(split_name(name)[0])["embed_dim"])
    transform = _transform(model.visual.preprocess_cfg)
    return ModelBackbone(name, _ImageTower(model.visual), dim, transform, device=device, dtype=dtype)


def load_open_clip(name: str, weights: Path | None) -> Any:
    """A whole OpenCLIP model, both towers, in evaluation mode on the CPU, in float32.

    Args:
        name: As for :func:`check_open_clip`.
        weights: As for :func:`open_clip_backbone`.

    Raises:
        UserError: As :func:`open_clip_backbone`.
    """
    check_open_clip(name, weights)
    # The file is read here and not by OpenCLIP, so that nothing in it can run code.
    path = weights or _fetched(name)
    state = read_state(path)
    model = build_open_clip(name)
    fill_backbone(model, _current_names(state, model), classifiers=(), source=f"backbone weights {path}")
    return model.eval().requires_grad_(False)


def build_open_clip(name: str) -> Any:
    """An OpenCLIP model with random weights, and the activation and preprocessing that go with the name's tag.

    Raises:
        UserError: If its text tower is of another library, whose settings cannot be fetched.
    """
    import open_clip

    architecture, tag = split_name(name)
    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    borrowed = "hf_model_name" in open_clip.get_model_config(architecture)["text_cfg"]
    with fetching_text(name) if borrowed else nullcontext(), _without_root_log():
        return open_clip.create_model(
            architecture,
            pretrained=None,
            pretrained_text=False,
            force_quick_gelu=bool(config.get("quick_gelu")),  # a tag can need it where the architecture has it not
            force_preprocess_cfg=config,
        )


def fetching_text(name: str) -> AbstractContextManager[None]:
    """:func:`cedm_ray.weights.hub.fetching` for what OpenCLIP leaves on the hub beside the weights."""
    return fetching(f"the settings of the text tower of {name}", "name a model that brings them, as ViT-B-32 does")


class _ImageTower(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor | tuple[Tensor, ...] = self.visual(pixels)
        return features[0] if isinstance(features, tuple) else features  # CoCa gives its tokens beside them


def _fetched(name: str) -> Path:
    import open_clip

    with fetching_weights(name):
        config = open_clip.get_pretrained_cfg(*split_name(name))
        return Path(open_clip.download_pretrained(config))


def _current_names(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Bring a state dict to the model's names; what is of another kind keeps its name."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    named: dict[str, Tensor] = convert_state_dict(model, state)
    if "positional_embedding" in named and not hasattr(model, "positional_embedding"):
        named = convert_to_custom_text_state_dict(named)
    wanted = model.state_dict()
    named = {name: value for name, value in named.items() if name not in (*_NO_FEATURES, *_SIZES)}
    return named | {name: wanted[name] for name in _NO_FEATURES if name in wanted}


def _transform(config: dict[str, Any]) -> Transform:
    if config["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(f"resize_mode is {config['resize_mode']}; it must be shortest or squash")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return Transform(
        size=(height, width),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        crop_share=1.0,
        crop_mode="squash" if config["resize_mode"] == "squash" else "center",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@contextmanager
def _without_root_log() -> Iterator[None]:
    """OpenCLIP logs to the root logger, gives it a handler, and warns of the random weights that are filled later."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def nothing(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)
    root.addFilter(nothing)
    try:
        yield
    finally:
        root.removeFilter(nothing)
        root.removeHandler(handler)
