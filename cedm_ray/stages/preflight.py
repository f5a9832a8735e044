"""What can be found wrong before any work starts."""

from __future__ import annotations

import numpy as np
import torch

from cedm_ray.config import SearchConfig
from cedm_ray.data.sources import ImageSource
from cedm_ray.diffusion.settings import build_net
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import load_backbone
from cedm_ray.features.pixels import PixelStats
from cedm_ray.metrics.lenet import FEATURE_DIM


def check_inputs(config: SearchConfig, source: ImageSource) -> None:
    """Refuse settings that cannot work with these images; the backbone is loaded once, to see that its weights fit.

    Args:
        config: The settings of the search.
        source: The images.

    Raises:
        UserError: With the value, the bound and the way out.
    """
    num_images = len(source)
    shape = (source.channels, source.resolution, source.resolution)
    any_stats = PixelStats(np.zeros(shape, np.float32), np.ones((source.channels, 1, 1), np.float32))
    backbone = load_backbone(config.backbone, config.backbone_weights, device="cpu", pixel_stats=any_stats)
    lenet = config.score.detector == "lenet"
    dim = FEATURE_DIM if lenet else backbone.dim
    if lenet and source.num_classes is None:
        raise UserError(
            "score.detector is lenet, which is trained on labels, and these images have none; "
            "give --score.detector backbone"
        )
    for name, value, least in (
        ("score.num_images", config.score.num_images, dim),
        ("final.num_images", config.final.num_images, dim),
        ("the number of images", num_images, dim),
    ):
        if value < least:
            raise UserError(
                f"{name} is {value}; it must be at least {least}, the dimensions of the detector's features, "
                f"for a covariance of full rank"
            )
    if config.num_neighbors >= num_images:
        raise UserError(f"num_neighbors is {config.num_neighbors}; it must be below {num_images}, the number of images")
    if config.bound.c_start > num_images:
        raise UserError(
            f"bound.c_start is {config.bound.c_start}; it must be at most the number of images ({num_images})"
        )
    try:
        with torch.device("meta"):
            build_net(config.diffusion, source.resolution, source.channels, label_dim=2, augment=True)
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from error
