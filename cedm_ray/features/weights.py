"""Weight files of backbones: read without running code, named by their hash."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cedm_ray.errors import UserError

# Where training programs keep a model's tensors; the teacher, an average of the student over time, goes before it.
_NESTS = ("state_dict", "model", "teacher", "student")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".tar")
_NAMESPACE = "argparse.Namespace"  # a training's arguments: plain values, but an object
_STRIP = (
    "save its tensors alone: import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
    "torch.save(torch.load(FILE, map_location='cpu')[KEY], NEW_FILE), with KEY teacher, state_dict or model"
)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, by which results are tied to the weights behind them.

    Args:
        path: Any file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(path: Path) -> None:
    """Look at the first bytes of a weight file, without reading the tensors.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save``: ``.pt``, ``.pth``, ``.bin`` or ``.tar``.

    Raises:
        UserError: If the file is missing, has another ending, or does not begin as its ending says.
    """
    if not path.is_file():
        raise UserError(f"backbone weights {path} do not exist; pass an existing file as --backbone-weights")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"backbone weights {path} end in '{path.suffix}'; a {', '.join(_SUFFIXES)} file is needed")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                readable = len(list(file.keys())) > 0
        else:
            readable = zipfile.is_zipfile(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"backbone weights {path} cannot be read ({error}); fetch the file again") from error
    if not readable:
        raise UserError(
            f"backbone weights {path} are not a tensor file; save the state dict with torch.save or safetensors"
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict; nothing in the file can run code.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save`` that holds tensors and plain values alone; in the latter
            the state dict may lie under ``state_dict``, ``model``, ``teacher`` or ``student``, beside other things,
            and its names may begin with ``module.``.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        UserError: If the file cannot be read, or holds objects or no state dict.
    """
    check_weights(path)
    content = _loaded(path)
    while isinstance(content, Mapping) and (nest := next((name for name in _NESTS if name in content), None)):
        content = content[nest]
    named = dict(content) if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    others = [value for value in named.values() if not isinstance(value, Tensor | int | float | str | None)]
    if not tensors or others:
        raise UserError(f"backbone weights {path} hold no state dict; save one, bare or under {' or '.join(_NESTS)}")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _loaded(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common class for what a damaged file can raise
        objects = _objects(path)
        reason = f"they hold {', '.join(objects)}, not plain tensors alone" if objects else _first_sentence(error)
        advice = _STRIP if objects == [_NAMESPACE] else "get a file of plain tensors, a state dict, from its maker"
        raise UserError(f"backbone weights {path} cannot be read ({reason}); {advice}") from error


def _objects(path: Path) -> list[str]:
    """Names of what a file holds beside tensors and plain values."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, or none of torch.save
        return []


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].partition(". ")[0] if lines else type(error).__name__


def fill(model: nn.Module, state: Mapping[str, Tensor], *, classifiers: tuple[str, ...], source: str) -> None:
    """Load weights into a model without a classifier.

    Args:
        model: Model to fill in place.
        state: Tensors by name.
        classifiers: Names of the model family's classifier layers, whose tensors are passed over.
        source: Where the weights come from, for the message.

    Raises:
        UserError: If a tensor is missing, left over or of another shape.
    """
    needed = model.state_dict()
    given = {
        name: value
        for name, value in state.items()
        if name in needed or not any(name.startswith(f"{classifier}.") for classifier in classifiers)
    }
    # The counters of batch normalisation play no part in features, and some files leave them out.
    missing = [name for name in needed if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in needed]
    shapes = [name for name in given if name in needed and given[name].shape != needed[name].shape]
    for what, names in (("lack", missing), ("have unknown", unexpected), ("have another shape for", shapes)):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{source} {what} {some}; pass the weights of this very model")
    model.load_state_dict(given, strict=False)
