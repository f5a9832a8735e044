"""Weight files of backbones, which training programs write in many forms."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from cedm_ray.errors import UserError
from cedm_ray.weights.files import WeightKind, fill, read_weight_file
from cedm_ray.weights.hub import fetching

BACKBONE = WeightKind("backbone", "--backbone-weights")
# Where training programs keep a model's tensors; the teacher, an average of the student over time, goes before it.
_NESTS = ("state_dict", "model", "teacher", "student")


def fetching_weights(backbone: str) -> AbstractContextManager[None]:
    """:func:`cedm_ray.weights.hub.fetching` for the weights of a backbone."""
    return fetching(f"the weights of backbone {backbone}", f"pass a file with them: {BACKBONE.flag} FILE")


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
    content = read_weight_file(path, BACKBONE)
    while isinstance(content, Mapping) and (nest := next((name for name in _NESTS if name in content), None)):
        content = content[nest]
    named = dict(content) if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    others = [value for value in named.values() if not isinstance(value, Tensor | int | float | str | None)]
    if not tensors or others:
        raise UserError(f"backbone weights {path} hold no state dict; save one, bare or under {' or '.join(_NESTS)}")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def fill_backbone(model: nn.Module, state: Mapping[str, Tensor], *, classifiers: tuple[str, ...], source: str) -> None:
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
    fill(model, given, source=source, wanted="this very model")
