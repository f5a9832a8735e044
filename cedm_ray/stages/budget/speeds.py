"""How fast a training is: as given, as measured by earlier searches, or as published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cedm_ray.config import SearchConfig
from cedm_ray.stages.storage.paths import SPEEDS_FOLDER
from cedm_ray.stages.storage.store import key_of, read_json, write_json

PUBLISHED = {32: 200e6 / 86_400 / 4, 64: 200e6 / (2 * 86_400) / 4}
"""Images that one A100 trains on a second, by the side of the images: 4 of them take about one and two days for 200
million (arXiv 2403.00570). Rough, and of those networks only."""


@dataclass(frozen=True)
class KnownSpeed:
    """How fast one training is, and how that is known."""

    images_per_s: float
    source: str


class Speeds:
    """How fast trainings of these settings were, kept beside the store for the next search's plan.

    Args:
        storage: Folder of the store.
        config: The settings.
        resolution: Side of the images.
    """

    def __init__(self, storage: Path, config: SearchConfig, resolution: int) -> None:
        tree = config.model_dump(mode="json")
        sections = ("diffusion", "compute", "score", "resources")
        inputs = {name: tree[name] for name in sections} | {"resolution": resolution}
        self._file = storage / SPEEDS_FOLDER / f"{key_of(inputs)}.json"
        self._config, self._resolution = config, resolution

    def known(self, *, gpus: bool) -> KnownSpeed | None:
        """Given, measured by an earlier search, or published; None where nothing is known."""
        given = self._config.budget.images_per_s
        if given is not None:
            return KnownSpeed(given, "as given")
        measured = read_json(self._file)
        if measured is not None:
            return KnownSpeed(float(measured["images_per_s"]), "measured by earlier trainings of these settings")
        side = next((side for side in sorted(PUBLISHED) if self._resolution <= side), None)
        if not gpus or side is None or self._resolution < min(PUBLISHED):
            return None
        workers = self._config.resources.num_workers
        return KnownSpeed(PUBLISHED[side] * workers, f"a rough published figure for {workers} A100 GPUs")

    def keep_measured(self, images_per_s: float) -> None:
        """Keep what was measured, scoring included."""
        write_json(self._file, {"images_per_s": images_per_s})
