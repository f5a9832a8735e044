"""What can be found wrong before any work starts."""

from __future__ import annotations

import numpy as np
import torch

from cedm_ray.clustering.assignments_file import read_assignments
from cedm_ray.config import SearchConfig
from cedm_ray.data.sources import ImageSource
from cedm_ray.diffusion.settings import build_net
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone, load_backbone
from cedm_ray.features.pixels import PixelStats
from cedm_ray.features.zero_shot_text import read_class_names
from cedm_ray.metrics.dinov2 import DINOV2_DIM
from cedm_ray.metrics.inception import InceptionDetector
from cedm_ray.metrics.lenet import FEATURE_DIM
from cedm_ray.stages.inputs.detectors import try_detectors
from cedm_ray.stages.storage.paths import absolute


def check_inputs(config: SearchConfig, source: ImageSource) -> None:
    """Refuse settings that cannot work with these images; models are loaded once, to see that their weights fit.

    Args:
        config: The settings of the search.
        source: The images.

    Raises:
        UserError: With the value, the bound and the way out.
    """
    num_images = len(source)
    _check_grouping(config, source)
    _check_scores(config, source)
    if config.num_neighbors >= num_images:
        raise UserError(f"num_neighbors is {config.num_neighbors}; it must be below {num_images}, the number of images")
    bound = config.bound
    given = [("c_start", bound.c_start), ("c_max", bound.c_max), *(("lower_clusters", c) for c in bound.lower_clusters)]
    for name, value in given:
        if value is not None and value > num_images:
            raise UserError(f"bound.{name} is {value}; it must be at most the number of images ({num_images})")
    try:
        with torch.device("meta"):
            build_net(config.diffusion, source.resolution, source.channels, label_dim=2, augment=True)
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from error


def _check_grouping(config: SearchConfig, source: ImageSource) -> None:
    """Refuse a grouping that these images do not have."""
    if config.grouping == "labels" and source.num_classes is None:
        raise UserError(
            "grouping is labels, and these images have none; name another grouping, or give --folder-labels "
            "where sub-folders are the classes"
        )
    if config.grouping == "superclasses" and source.superclasses() is None:
        raise UserError(
            f"grouping is superclasses, which cifar100 has and {source.name} has not; name another grouping"
        )
    if config.assignments is not None:
        read_assignments(config.assignments.expanduser(), num_images=len(source))
    if config.grouping == "clip":
        clip_class_names(config, source.class_names())
        weights = absolute(config.clip.weights)
        try:
            check_backbone(config.clip.model, weights)
            load_backbone(config.clip.model, weights, device="cpu")
        except UserError as error:
            raise UserError(f"clip: {str(error).replace('--backbone-weights', '--clip.weights')}") from error


def clip_class_names(config: SearchConfig, own: tuple[str, ...] | None) -> tuple[str, ...]:
    """The class names that images are compared with: from a file, or the data set's own.

    Raises:
        UserError: If there are none.
    """
    if config.clip.class_names is not None:
        return read_class_names(config.clip.class_names.expanduser())
    if own is None:
        raise UserError("grouping clip needs class names, and these images have none; give --clip.class-names FILE")
    return own


def _check_scores(config: SearchConfig, source: ImageSource) -> None:
    """Refuse detectors that do not fit the images, and too few images for a covariance of full rank."""
    shape = (source.channels, source.resolution, source.resolution)
    any_stats = PixelStats(np.zeros(shape, np.float32), np.ones((source.channels, 1, 1), np.float32))
    weights = absolute(config.backbone_weights)
    backbone = load_backbone(config.backbone, weights, device="cpu", pixel_stats=any_stats)
    if "lenet" in config.score.detectors and source.num_classes is None:
        raise UserError(
            "score.detector is lenet, which is trained on labels, and these images have none; "
            "give --score.detector backbone"
        )
    dims = {
        "inception": InceptionDetector.dim,
        "dinov2": DINOV2_DIM,
        "lenet": FEATURE_DIM,
        "backbone": backbone.dim,
    }
    detector = max(config.score.detectors, key=lambda name: dims[name])
    for name, value in (
        ("score.num_images", config.score.num_images),
        ("final.num_images", config.final.num_images),
        ("the number of images", len(source)),
    ):
        if value < dims[detector]:
            raise UserError(
                f"{name} is {value}; it must be at least {dims[detector]}, the dimensions of the features of detector "
                f"{detector}, for a covariance of full rank"
            )
    try_detectors(config.score.detectors, config.detector_weights, config.dinov2_weights)
