"""An exported model, opened to sample from and to tell how sure the clustering is of an image; needs no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from cedm_ray.clustering.clustering_io import CLUSTERING_FILE, HEAD_FILE, load_clustering
from cedm_ray.clustering.head_file import TemiHead, head_probs, load_head
from cedm_ray.diffusion.model_file import FACTS_FILE, load_model, read_model_facts
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import PIXELS, Backbone, check_backbone, load_backbone
from cedm_ray.features.pixels import PixelStats

EXPORT_FOLDER = "export"
PIXEL_STATS_FILE = "pixels.safetensors"


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """What stands in the folder of an exported model."""

    folder: Path
    facts: Mapping[str, Any]
    """The contents of ``model.json``."""
    net: EDMPrecond
    cluster_probs: Tensor | None
    """Distribution of the conditions under which the model was scored, shape ``(C,)``; None without a condition."""
    num_steps: int
    """Steps of the sampler with which it was scored."""
    label_dropout: float
    """Probability with which the condition was left out in training."""


@dataclass(frozen=True, eq=False)
class Confidence:
    """How sure a TEMI head is of the cluster of an image: the largest of its probabilities."""

    head: TemiHead
    backbone: Backbone

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Confidences ``(N,)`` float32 of images ``(N, C, R, R)`` uint8, on the device of the backbone."""
        confidence: NDArray[np.float32] = head_probs(self.head, self.backbone(images).cpu().numpy()).max(axis=1)
        return confidence


def open_exported(run: Path, *, device: torch.device) -> ExportedModel:
    """Open the model that a search exported.

    Args:
        run: The folder of a finished search, or of its export.
        device: Where to sample.

    Raises:
        UserError: If there is no whole model.
    """
    folder = _export_folder(run.expanduser())
    facts = read_model_facts(folder)
    net = load_model(folder, device=device)
    try:
        num_steps, uniform = int(facts["num_steps"]), facts["conditions"] == "uniform"
        label_dropout = float(facts["diffusion"].get("label_dropout", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FACTS_FILE} lacks {error}; give the folder of an exported model") from error
    probs: Tensor | None = None
    if net.label_dim:
        probs = torch.from_numpy(load_clustering(folder / CLUSTERING_FILE).cluster_probs)
        if len(probs) != net.label_dim:
            raise UserError(f"{folder} holds a clustering into {len(probs)} and a model of {net.label_dim} clusters; "
                            "copy the export again")  # fmt: skip
        # As in scoring: an empty cluster was never trained on.
        probs = (probs > 0).double() if uniform else probs
    return ExportedModel(folder, facts, net, probs, num_steps, label_dropout)


def _export_folder(run: Path) -> Path:
    if not run.is_dir():
        raise UserError(
            f"run {run} is no folder; give that of a finished search, <dataset>-<key> in the storage folder"
        )
    for folder in (run / EXPORT_FOLDER, run):
        if (folder / FACTS_FILE).is_file():
            return folder
    raise UserError(f"run {run} holds no exported model; let the search finish, or give the folder of another one")


def open_confidence(model: ExportedModel, weights: Path | None, *, device: torch.device) -> Confidence:
    """The head and the backbone behind a model's clusters.

    Args:
        model: The model.
        weights: File with the backbone's weights; None for the library's own, or where it has none.
        device: Where the backbone computes.

    Raises:
        UserError: If the model was not trained on TEMI clusters, or the weights are not those of the search.
    """
    grouping = model.facts.get("grouping")
    if grouping != "temi":
        raise UserError(f"confidence is that of a TEMI head, but the model's grouping is {grouping}; leave it out")
    head = load_head(model.folder / HEAD_FILE)
    try:
        name, identity = str(model.facts["embedding"]["backbone"]), str(model.facts["embedding"]["weights"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{model.folder / FACTS_FILE} does not name the backbone; copy the export again") from error
    _check_weights(name, identity, weights)
    stats = _pixel_stats(model.folder / PIXEL_STATS_FILE) if name == PIXELS else None
    backbone = load_backbone(name, weights, device=device, pixel_stats=stats)
    if backbone.dim != head.dim:
        raise UserError(f"{model.folder / HEAD_FILE} takes {head.dim} features and backbone {name} gives "
                        f"{backbone.dim}; copy the export again")  # fmt: skip
    return Confidence(head, backbone)


def _check_weights(name: str, identity: str, weights: Path | None) -> None:
    """Refuse weights that are not those with which the images were embedded."""
    if weights is None and identity != name:
        raise UserError(
            f"confidence needs the weights of backbone {name} that the search was given (SHA-256 {identity}); "
            "give their file with --backbone-weights"
        )
    found = check_backbone(name, weights)
    if found != identity:
        due = "their file" if identity != name else f"{name}'s own: leave out --backbone-weights"
        raise UserError(f"backbone weights {weights} (SHA-256 {found}) are not those of the search ({identity}); "
                        f"give {due}")  # fmt: skip


def _pixel_stats(path: Path) -> PixelStats:
    try:
        tensors = load_file(path)
        return PixelStats(tensors["mean"], tensors["std"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not hold pixel statistics ({error}); copy the export again") from error
