"""Whether the images and the weights that the settings name are there, or can be fetched when the search starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cedm_ray.config import SearchConfig
from cedm_ray.data.cifar import CIFAR10, CIFAR100, CIFAR_URL
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import PIXELS, check_backbone
from cedm_ray.features.open_clip_backbone import OPEN_CLIP, split_name
from cedm_ray.metrics.dinov2 import check_dinov2
from cedm_ray.metrics.inception import check_inception
from cedm_ray.metrics.inception_weights import CANONICAL_NAME
from cedm_ray.stages.budget.plan import plan_of
from cedm_ray.stages.checkup.disk import ImageSet
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.web import answer_of
from cedm_ray.stages.inputs.images import open_images
from cedm_ray.stages.inputs.preflight import check_inputs
from cedm_ray.stages.storage.paths import absolute

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# Under these names libraries keep weights on the hub; a settings file says no more than that the model is known.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """A weight file that a search needs."""

    present: bool
    """Whether it is on this machine."""
    finding: Finding


def images_finding(config: SearchConfig) -> tuple[ImageSource | None, Finding]:
    """The images of a search, where they are there; nothing is downloaded."""
    try:
        source = open_images(config, download=False)
    except UserError as error:
        layout = _CIFAR.get(config.dataset)
        archives = [] if layout is None else [layout.binary_archive, layout.python_archive]
        present = layout is not None and any(
            (config.data_dir.expanduser() / name).exists()
            for name in (*archives, layout.binary_folder, layout.python_folder)
        )
        if layout is None or present:
            return None, Finding.refused("data", error)
        return None, _download(config.dataset, f"{CIFAR_URL}{layout.binary_archive}", Finding.refused("data", error))
    side = source.resolution
    labels = "without labels" if source.num_classes is None else f"in {source.num_classes} classes"
    return source, Finding("data", "ok", f"{source.name}: {len(source):,} images of {side} x {side} pixels, {labels}")


def _download(dataset: str, url: str, missing: Finding) -> Finding:
    try:
        status = answer_of(url, "HEAD").status
    except OSError as error:
        return Finding("data", "fail", f"{missing.text}, and {url} does not answer ({error})", missing.fix)
    if status != 200:
        return Finding("data", "fail", f"{missing.text}, and {url} answers with status {status}", missing.fix)
    return Finding("data", "ok", f"{dataset} is not there yet; the search will fetch {url}")


def weights_of(config: SearchConfig) -> list[Weights]:
    """The weights of the backbone, of the detectors, and of CLIP where the clusters come from it."""
    found = [_backbone("backbone", config.backbone, absolute(config.backbone_weights), "--backbone-weights")]
    if "inception" in config.score.detectors:
        found.append(_inception(absolute(config.detector_weights)))
    if "dinov2" in config.score.detectors:
        name, file = check_dinov2(None), absolute(config.dinov2_weights)
        if file is None:
            found.append(_on_hub("dinov2", name, f"timm/{name}", "--dinov2-weights"))
        else:
            found.append(_file("dinov2", file, lambda: check_dinov2(file)))
    if config.grouping == "clip":
        found.append(_backbone("clip", config.clip.model, absolute(config.clip.weights), "--clip.weights"))
    return found


def _file(name: str, file: Path, check: Callable[[], str]) -> Weights:
    try:
        identity = check()
    except UserError as error:
        return Weights(False, Finding.refused(name, error))
    return Weights(True, Finding(name, "ok", f"{file}, SHA-256 {identity[:8]}..."))


def _inception(file: Path | None) -> Weights:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / CANONICAL_NAME
    found = _file("inception", file or cached, lambda: check_inception(file))
    if file is not None or cached.is_file() or found.finding.level != "ok":
        return found
    return Weights(False, Finding("inception", "ok", f"{CANONICAL_NAME} is not here yet; its server answers"))


def _backbone(name: str, model: str, file: Path | None, flag: str) -> Weights:
    if model == PIXELS and file is None:
        return Weights(True, Finding(name, "ok", "the pixels themselves, which need no weights"))
    if file is not None:
        return _file(name, file, lambda: check_backbone(model, file))
    try:
        check_backbone(model, None)
    except UserError as error:
        return Weights(False, Finding.refused(name, error))
    repository = _repository(model)
    if repository is None:
        text = f"{model} has no published weights in its library"
        return Weights(False, Finding(name, "fail", text, f"pass a file with them: {flag} FILE"))
    return _on_hub(name, model, repository, flag)


def _repository(model: str) -> str | None:
    """Where a library has the weights of a model on the hub."""
    if model.startswith(OPEN_CLIP):
        import open_clip

        return str(open_clip.get_pretrained_cfg(*split_name(model)).get("hf_hub") or "").rstrip("/") or None
    import timm

    config = timm.get_pretrained_cfg(model)
    return None if config is None or not config.hf_hub_id else str(config.hf_hub_id)


def _on_hub(name: str, model: str, repository: str, flag: str) -> Weights:
    """Weights in the hub's cache on this machine, or on the hub itself."""
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in _WEIGHT_FILES):
        return Weights(True, Finding(name, "ok", f"{model} is in the hub's cache, {constants.HF_HUB_CACHE}"))
    url, fix = f"{constants.ENDPOINT}/{repository}", f"pass a file with them: {flag} FILE"
    missing = f"the weights of {model} are not in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Weights(False, Finding(name, "fail", f"{missing}, and HF_HUB_OFFLINE is set", fix))
    try:
        status = answer_of(url, "HEAD").status
    except OSError as error:
        return Weights(False, Finding(name, "fail", f"{missing}, and {url} does not answer ({error})", fix))
    if status >= 400:
        return Weights(False, Finding(name, "fail", f"{missing}, and {url} answers with status {status}", fix))
    return Weights(False, Finding(name, "ok", f"{model} is not here yet; the search will fetch it from {url}"))


def settings_findings(
    config: SearchConfig, source: ImageSource | None, images: ImageSet | None, *, loaded: bool
) -> list[Finding]:
    """Whether the settings fit the images and one another, and the budget holds one training.

    Args:
        config: The settings.
        source: The images, where they are there.
        images: What is known of them.
        loaded: Whether all weights are there, so that they can be tried.
    """
    found = []
    files = {"assignments": config.assignments, "clip.class_names": config.clip.class_names}
    for name, file in files.items():
        if file is not None and not file.expanduser().is_file():
            found.append(Finding("settings", "fail", f"{name} {file} does not exist", "give the path of a file"))
    try:
        if source is not None and loaded and not found:
            check_inputs(config, source)
            found.append(Finding("settings", "ok", "they fit the images, and the weights fit their networks"))
        if images is not None:
            storage = config.storage_path.expanduser().absolute()
            plan_of(config, storage, images.resolution, has_labels=images.has_labels).check()
    except UserError as error:
        found.append(Finding.refused("settings", error))
    return found
