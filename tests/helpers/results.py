"""Results of searches, and what of them two runs of one search share."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

MEASURED = {"images_per_s", "score_s", "device_hours", "energy_kwh", "seconds", "sample_s"}
"""What differs from one run to the next because it is measured with a clock."""
PLACES = {
    "checkpoint_path", "folder", "tracking_uri", "ui_command", "run_id", "page", "export", "mosaics", "confidence",
}  # fmt: skip


def result_of(storage: Path) -> dict[str, Any]:
    """The result of the one search in a storage folder."""
    (file,) = storage.glob("digits-*/result.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def plain(value: Any, root: Path) -> Any:
    """A result without what the clock or the place of the storage, ``root``, decides."""
    if isinstance(value, dict):
        return {key: plain(each, root) for key, each in value.items() if key not in MEASURED | PLACES}
    if isinstance(value, list):
        return [plain(each, root) for each in value]
    return value.replace(str(root), "") if isinstance(value, str) else value


def assert_same_tensors(one: Path, other: Path) -> int:
    """Compare two files of tensors to the bit; returns how many numbers they hold."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.numpy().tobytes() == second[name].numpy().tobytes(), name
    return sum(tensor.numel() for tensor in first.values())
