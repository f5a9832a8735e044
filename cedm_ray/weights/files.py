"""Weight files: read without running code, named by their hash, put into a network."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cedm_ray.errors import UserError, first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar")
_BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How torch.save began its files before they became zip archives (1.6); published weights may be that old."""
_NAMESPACE = "argparse.Namespace"  # a training's arguments: plain values, but an object
_STRIP = (
    "save its tensors alone: import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
    "torch.save(torch.load(FILE, map_location='cpu')[KEY], NEW_FILE), with KEY teacher, state_dict or model"
)


@dataclass(frozen=True)
class WeightKind:
    """Whose weights a file holds, for messages."""

    name: str
    """For example ``backbone``."""
    flag: str
    """How another file is passed, for example ``--backbone-weights``."""


def check_weight_file(path: Path, kind: WeightKind) -> None:
    """Look at the first bytes of a weight file, without reading the tensors.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save``: ``.pt``, ``.pth``, ``.bin`` or ``.tar``.
        kind: Whose weights they are.

    Raises:
        UserError: If the file is missing, has another ending, or does not begin as its ending says.
    """
    what = f"{kind.name} weights {path}"
    if not path.is_file():
        raise UserError(f"{what} do not exist; pass an existing file as {kind.flag}")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{what} end in '{path.suffix}'; a {', '.join(SUFFIXES)} file is needed")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                readable = len(list(file.keys())) > 0
        else:
            with path.open("rb") as opened:
                readable = zipfile.is_zipfile(path) or opened.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what} cannot be read ({error}); fetch the file again") from error
    if not readable:
        raise UserError(
            f"{what} are not a tensor file, or only a part of one; fetch the file again, or save the state dict with "
            "torch.save or safetensors"
        )


def read_weight_file(path: Path, kind: WeightKind) -> Any:
    """What a weight file holds; nothing in it can run code.

    Args:
        path: As for :func:`check_weight_file`.
        kind: Whose weights they are.

    Returns:
        Tensors, on the CPU, and plain values, in whatever dictionaries and lists the file has.

    Raises:
        UserError: If the file cannot be read, or holds objects.
    """
    check_weight_file(path, kind)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class for what a damaged file can raise
        objects = _objects(path)
        reason = first_line(error).partition(". ")[0]
        if objects:
            reason = f"they hold {', '.join(objects)}, not plain tensors alone"
        advice = _STRIP if objects == [_NAMESPACE] else "get a file of plain tensors, a state dict, from its maker"
        raise UserError(f"{kind.name} weights {path} cannot be read ({reason}); {advice}") from error


def _objects(path: Path) -> list[str]:
    """Names of what a file holds beside tensors and plain values."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, or none of torch.save
        return []


def fill(
    network: nn.Module, state: Mapping[str, Tensor], *, source: str, wanted: str, optional: tuple[str, ...] = ()
) -> None:
    """Load weights into a network.

    Args:
        network: Network to fill in place.
        state: Tensors by name.
        source: Where the weights come from, for the message.
        wanted: What would fit, for the message.
        optional: Tensors that may be missing; their values in the network are then left alone.

    Raises:
        UserError: If a tensor is missing, left over or of another shape.
    """
    needed = network.state_dict()
    # The counters of batch normalisation play no part in features, and some files leave them out.
    missing = [name for name in needed if name not in (*state, *optional) and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in needed]
    shapes = [name for name in state if name in needed and state[name].shape != needed[name].shape]
    for what, names in (("lack", missing), ("have unknown", unknown), ("have another shape for", shapes)):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{source} {what} {some}; pass the weights of {wanted}")
    network.load_state_dict(state, strict=False)
