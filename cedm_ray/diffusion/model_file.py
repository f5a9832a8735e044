"""A trained model in a folder: what it is in JSON, its averaged weights in safetensors."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.errors import UserError
from cedm_ray.weights.files import fill

FACTS_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
FORMAT = "cedm_ray.diffusion.model/1"


def read_model_facts(folder: Path) -> dict[str, Any]:
    """What a model is, as the search wrote it down.

    Args:
        folder: The folder of an exported model.

    Returns:
        The contents of ``model.json``.

    Raises:
        UserError: If the file is missing, damaged, or not such a file.
    """
    path = folder / FACTS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
    except (OSError, ValueError, RecursionError) as error:
        raise _no_model(path, error) from error
    return facts


def load_model(folder: Path, *, device: torch.device | str = "cpu") -> EDMPrecond:
    """The denoiser of an exported model, ready to sample from.

    Args:
        folder: The folder of the exported model.
        device: Where the network shall lie.

    Returns:
        The network in eval mode, without gradients.

    Raises:
        UserError: If a file is missing or damaged, or the weights are not those of the model that is described.
    """
    facts = read_model_facts(folder)
    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model weights {path} cannot be read ({_line(error)}); copy the export again") from error
    try:
        with torch.device("meta"):  # weights are not drawn, only to be overwritten
            net = _net(facts, most_blocks=len(state))
        described, held = (sum(each.numel() for each in of.values()) for of in (net.state_dict(), state))
        if described > 2 * held:  # before memory is taken for it; what is missing otherwise is told by its name
            raise ValueError(f"it has {described:,} numbers, and {WEIGHTS_FILE} {held:,}")
        net = net.to_empty(device=device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _no_model(folder / FACTS_FILE, error) from error
    fill(net, state, source=f"model weights {path}", wanted=f"the model that {FACTS_FILE} describes")
    return net.eval().requires_grad_(False)


def _net(facts: Mapping[str, Any], *, most_blocks: int) -> EDMPrecond:
    given = facts["diffusion"]
    if given["num_blocks"] * len(given["channel_mult"]) > most_blocks:
        raise ValueError(f"it has {given['num_blocks']} blocks at each of {len(given['channel_mult'])} resolutions")
    settings = {field.name: given[field.name] for field in fields(NetSettings)}
    # JSON knows no tuples.
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return build_net(
        NetSettings(**plain),
        facts["img_resolution"],
        facts["img_channels"],
        facts["label_dim"],
        augment=given["augment_prob"] > 0,
        sigma_data=given["sigma_data"],
    )


def _no_model(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not describe a model ({_line(error)}); give the folder of an exported model")


def _line(error: Exception) -> str:
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:200]
