"""A training run in one safetensors file, exact to the bit."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cedm_ray.devices import net_device
from cedm_ray.diffusion.train_state import TrainState
from cedm_ray.weights.whole_file import whole_file

FORMAT = "cedm_ray.diffusion.train_state/1"
AVERAGED_FORMAT = "cedm_ray.diffusion.averaged/1"
_SCALER_FACTS = ("scale", "_growth_tracker")


def save_state(state: TrainState, path: Path) -> None:
    """Write network, moving average, Adam's moments and the image count.

    The file appears whole or not at all: it is written beside its place and moved there.

    Args:
        state: The run.
        path: File to write, by custom ``*.safetensors``; its folder exists.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(state).items()}
    _save(tensors, path, {"format": FORMAT, "nimg": str(state.nimg)})


def save_ema(tensors: dict[str, Tensor], nimg: int, path: Path) -> None:
    """Write averaged weights alone, for :func:`read_ema`; the file appears whole or not at all.

    Args:
        tensors: The weights, by their names in the network.
        nimg: Images seen.
        path: File to write, by custom ``*.safetensors``; its folder exists.
    """
    named = {f"ema.{name}": tensor for name, tensor in tensors.items()}
    _save(named, path, {"format": AVERAGED_FORMAT, "nimg": str(nimg)})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_state(state: TrainState, path: Path) -> None:
    """Put a saved run into a state of the same network; training then continues bit for bit.

    Args:
        state: As from `new_state`; changed in place, and untouched if an error is raised.
        path: File from `save_state`.

    Raises:
        OSError: If it cannot be read.
        SafetensorError: If it is no such file, or is cut off.
        ValueError: If it is no training state, or one of another network.
    """
    with safe_open(path, framework="pt") as file:
        nimg = _nimg(file.metadata(), path, FORMAT)
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    own = {name: tensor for name, tensor in _tensors(state).items() if not name.startswith("scaler.")}
    slots = {f"{kind}.{name}": parameter for name, parameter in state.net.named_parameters()
             for kind in ("adam.exp_avg", "adam.exp_avg_sq")}  # fmt: skip
    steps = {f"adam.step.{name}": torch.zeros(()) for name, _ in state.net.named_parameters()}
    scales = {f"scaler.{name}": torch.zeros(()) for name in _SCALER_FACTS}
    started, scaled = (any(name.startswith(kind) for name in saved) for kind in ("adam.", "scaler."))
    needed = {name: tensor for name, tensor in own.items() if not name.startswith("adam.")}
    needed |= {**slots, **steps} if started else {}
    needed |= scales if scaled else {}
    _check_fit(path, saved, needed)
    scaler = _scaler(saved, net_device(state.net)) if scaled else None

    with torch.no_grad():
        for name, tensor in own.items():
            if not name.startswith("adam."):
                tensor.copy_(saved[name])
    _load_adam(state, saved if started else {})
    state.scaler, state.nimg = scaler, nimg


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"net.{name}": tensor for name, tensor in state.net.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for name, parameter in state.net.named_parameters():
        # Empty before the first step: Adam makes its moments when it needs them.
        for kind, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{kind}.{name}"] = value
    if state.scaler is not None:
        facts = state.scaler.state_dict()
        tensors |= {f"scaler.{name}": torch.tensor(facts[name], dtype=torch.float64) for name in _SCALER_FACTS}
    return tensors


def _scaler(saved: dict[str, Tensor], device: torch.device) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device.type)
    scaler.load_state_dict({**scaler.state_dict(), **{name: saved[f"scaler.{name}"].item() for name in _SCALER_FACTS}})
    return scaler


def _check_fit(path: Path, saved: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    missing = sorted(needed.keys() - saved.keys())
    unexpected = sorted(saved.keys() - needed.keys())
    shapes = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} holds another network's run: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"other shapes {shapes[:5]}; use the settings that it was trained with"
        )


def _load_adam(state: TrainState, saved: dict[str, Tensor]) -> None:
    names = [name for name, _ in state.net.named_parameters()]
    moments = {
        number: {kind: saved[f"adam.{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        for number, name in enumerate(names)
        if saved
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def read_ema(path: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights alone, by their names in the network, and the number of images seen.

    Args:
        path: File that :func:`save_state` or :func:`save_ema` wrote.

    Raises:
        OSError: If it cannot be read.
        SafetensorError: If it is no such file, or is cut off.
        ValueError: If it holds something else.
    """
    with safe_open(path, framework="pt") as file:
        nimg = _nimg(file.metadata(), path, FORMAT, AVERAGED_FORMAT)
        names = [name for name in file.keys() if name.startswith("ema.")]  # noqa: SIM118  not a dict
        return {name.removeprefix("ema."): file.get_tensor(name) for name in names}, nimg


def read_nimg(path: Path) -> int:
    """The number of images that a saved run has seen, after a look at its format and length.

    Args:
        path: File that :func:`save_state` wrote.

    Raises:
        OSError: If it cannot be read.
        SafetensorError: If it is no such file, or is cut off.
        ValueError: If it holds something else.
    """
    with safe_open(path, framework="pt") as file:
        return _nimg(file.metadata(), path, FORMAT)


def _nimg(metadata: dict[str, str] | None, path: Path, *formats: str) -> int:
    """The images seen, by the header of a file of one of these formats."""
    facts = metadata or {}
    if facts.get("format") not in formats:
        raise ValueError(f"{path.name} has format {facts.get('format')!r}; {' or '.join(map(repr, formats))} is due")
    nimg = facts.get("nimg", "")
    if not nimg.isdecimal():
        raise ValueError(f"{path.name} has nimg {nimg!r} in its header; a whole number, at least 0, is due")
    return int(nimg)
