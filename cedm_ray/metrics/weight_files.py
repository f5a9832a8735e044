"""Weight files of detectors: read without running code, named by their hash, put into a network."""

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

_SUFFIXES = (".safetensors", ".pt", ".pth")
_BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""How torch.save began its files before they became zip archives (1.6); FID's published weights may be that old."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensor_file(path: Path) -> None:
    """Look at the first bytes of a weight file, without reading the tensors.

    Args:
        path: A ``.safetensors``, ``.pt`` or ``.pth`` file.

    Raises:
        UserError: If the file is missing, has another ending, or does not begin as its ending says.
    """
    if not path.is_file():
        raise UserError(f"detector weights {path} do not exist; pass an existing file as --detector-weights")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"detector weights {path} end in '{path.suffix}'; a {', '.join(_SUFFIXES)} file is needed")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                readable = len(list(file.keys())) > 0
        else:
            with path.open("rb") as file:
                readable = zipfile.is_zipfile(path) or file.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP
    except (OSError, SafetensorError) as error:
        raise UserError(f"detector weights {path} cannot be read ({error}); fetch the file again") from error
    if not readable:
        raise UserError(f"detector weights {path} are not a tensor file, or only a part of one; fetch the file again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict; nothing in the file can run code.

    Args:
        path: A ``.safetensors`` file, or a ``.pt`` or ``.pth`` file of tensors alone.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        UserError: If the file cannot be read, or holds anything but tensors.
    """
    check_tensor_file(path)
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch names no common class for what a damaged file can raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"detector weights {path} cannot be read ({reason}); only files of plain tensors are, save a state dict"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"detector weights {path} hold no state dict; save one, bare")
    return dict(content)


def fill(
    network: nn.Module, state: Mapping[str, Tensor], *, optional: tuple[str, ...], source: str, wanted: str
) -> None:
    """Load weights into a network.

    Args:
        network: Network to fill in place.
        state: Tensors by name.
        optional: Tensors that may be missing; their values in the network are then left alone.
        source: Where the weights come from, for the message.
        wanted: What would fit, for the message.

    Raises:
        UserError: If a tensor is missing, left over or of another shape.
    """
    needed = network.state_dict()
    # The counters of batch normalisation play no part in features, and some files leave them out.
    missing = [
        name for name in needed if name not in state and name not in optional and not name.endswith("_batches_tracked")
    ]
    unknown = [name for name in state if name not in needed]
    shapes = [name for name in state if name in needed and state[name].shape != needed[name].shape]
    for what, names in (("lack", missing), ("have unknown", unknown), ("have another shape for", shapes)):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{source} {what} {some}; pass the weights of {wanted}")
    network.load_state_dict(state, strict=False)
