"""Backbones of timm by name, and the published checkpoints that timm's architectures fit but its hub does not hold."""

from pathlib import Path
from typing import Any

import torch

from cedm_ray.errors import UserError, did_you_mean
from cedm_ray.features.backbone_weights import fetching_weights, fill_backbone, read_state
from cedm_ray.features.checkpoints import LOCAL_MODELS, timm_names
from cedm_ray.features.model_backbone import Dtype, ModelBackbone
from cedm_ray.features.pixels import PixelBackbone
from cedm_ray.features.transform import Transform


def check_timm(name: str, weights: Path | None) -> None:
    """Refuse a name that neither timm nor ``LOCAL_MODELS`` has, or that leaves the weights open.

    Args:
        name: A timm name, with or without a pretrained tag, or a name of ``LOCAL_MODELS``.
        weights: File with the weights, or None.

    Raises:
        UserError: If the name is unknown, or stands for a model that has to come from a file.
    """
    import timm

    if name in LOCAL_MODELS:
        if weights is None:
            due = LOCAL_MODELS[name].checkpoint
            raise UserError(f"backbone {name} is on no hub; pass its {due}: --backbone-weights FILE")
        return
    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        others = f"; it must be {PixelBackbone.name}, a model of timm or open_clip:ARCH/TAG"
        hint = did_you_mean(name, [PixelBackbone.name, *LOCAL_MODELS, *known], n=3) or others
        raise UserError(f"backbone {name!r} is unknown{hint}")


def timm_backbone(name: str, weights: Path | None, *, device: torch.device | str, dtype: Dtype) -> ModelBackbone:
    """A timm model without its classifier.

    Args:
        name: A timm name, with a pretrained tag (``vit_base_patch16_224.dino``) for the transform of that tag; or a
            name of ``LOCAL_MODELS``.
        weights: File with the weights; None for timm's own, from its cache or the network.
        device: Where to compute.
        dtype: Arithmetic of the network.

    Raises:
        UserError: If the name is unknown, or the weights cannot be had or do not fit.
    """
    import timm

    check_timm(name, weights)
    local = LOCAL_MODELS.get(name)
    if weights is None:
        with fetching_weights(name):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    else:
        # A file is read before the model is built: what is wrong with it is known sooner.
        state = read_state(weights)
        model = timm.create_model(local.architecture if local else name, pretrained=False, num_classes=0)
        given = timm_names(state, model.state_dict())
        fill_backbone(model, given, classifiers=_classifiers(model), source=f"backbone weights {weights}")
    transform = local.transform if local else _transform(model)
    return ModelBackbone(name, model, _dim(model), transform, device=device, dtype=dtype)


def _dim(model: Any) -> int:
    # Some families (MobileNetV3) have a layer between the pooled features and the classifier.
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def _classifiers(model: Any) -> tuple[str, ...]:
    named = model.default_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _transform(model: Any) -> Transform:
    from timm.data import resolve_model_data_config

    data: dict[str, Any] = resolve_model_data_config(model)
    return Transform(
        size=(data["input_size"][1], data["input_size"][2]),
        interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
        crop_share=float(data["crop_pct"]),
        crop_mode="squash" if data["crop_mode"] == "squash" else "center",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
