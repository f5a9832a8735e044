"""Weight files of detectors: state dicts, and nothing beside them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.weights.files import WeightKind, read_weight_file


def read_tensors(path: Path, kind: WeightKind) -> dict[str, Tensor]:
    """Read a bare state dict; nothing in the file can run code.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save`` that holds tensors alone.
        kind: Whose weights they are.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        UserError: If the file cannot be read, or holds anything but tensors.
    """
    content = read_weight_file(path, kind)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{kind.name} weights {path} hold no state dict; save one, bare")
    return dict(content)
