"""Features of class names, for zero-shot pseudo-labels: what an OpenCLIP text tower makes of prompts with them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cedm_ray.errors import UserError
from cedm_ray.features.open_clip_backbone import fetching_text, load_open_clip, split_name

PROMPTS = (
    "a photo of a {}",
    "a blurry photo of a {}",
    "a photo of many {}",
    "a photo of the large {}",
    "a photo of the small {}",
)
_BATCH = 256


@torch.no_grad()
def class_text_features(
    model_name: str,
    weights: Path | None,
    class_names: Sequence[str],
    prompts: Sequence[str] = PROMPTS,
    *,
    device: torch.device | str,
) -> NDArray[np.float32]:
    """Text features of each class name in each prompt, in one space with the same model's image features.

    Args:
        model_name: ``open_clip:ARCH/TAG``; :func:`cedm_ray.features.backbones.load_backbone` gives its image features.
        weights: File with the state dict of the whole model; None for OpenCLIP's own, from its cache or the network.
        class_names: C names.
        prompts: P prompts, each with one ``{}`` for the name.
        device: Where to compute, in float32.

    Returns:
        Features at length 1, shape ``(C, P, D)``, float32.

    Raises:
        UserError: If the model is unknown or has no text tower, or its weights cannot be had or do not fit.
        ValueError: If there is no name or no prompt, or a prompt does not hold one ``{}``.
    """
    import open_clip

    if not class_names or not prompts:
        raise ValueError(f"there are {len(class_names)} class names and {len(prompts)} prompts; one of each is due")
    if wrong := [prompt for prompt in prompts if prompt.count("{}") != 1]:
        raise ValueError(f"prompt is {wrong[0]!r}; it must hold one {{}} for the class name")
    model = load_open_clip(model_name, weights).to(device)
    with fetching_text(model_name):  # most models have their vocabulary in the package, a few on the hub
        tokenizer = open_clip.get_tokenizer(split_name(model_name)[0])
    tokens = tokenizer([prompt.replace("{}", name) for name in class_names for prompt in prompts])
    features = [model.encode_text(part.to(device), normalize=True).cpu() for part in tokens.split(_BATCH)]
    values: NDArray[np.float32] = torch.cat(features).to(torch.float32).numpy()
    return values.reshape(len(class_names), len(prompts), -1)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names from a text file, one a line.

    Args:
        path: UTF-8 text; space around a name is dropped.

    Returns:
        The names, in the order of the file.

    Raises:
        UserError: If the file is missing, empty or not UTF-8, or a line is blank or repeats another.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"class names {path} cannot be read ({error.strerror}); pass a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"class names {path} are not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if not names:
        raise UserError(f"class names {path} hold no line; write one name a line")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"class names {path} have a blank line {number}; write one name a line")
        if name in first:
            raise UserError(f"class names {path} have {name!r} in lines {first[name]} and {number}; leave one out")
        first[name] = number
    return tuple(names)
