"""The images of a data set in the store, packed into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import load_packed, pack
from cedm_ray.data.registry import open_source
from cedm_ray.data.sources import ImageSource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError
from cedm_ray.stages.progress import Terminal
from cedm_ray.stages.store import Store


def open_images(config: SearchConfig, *, download: bool = True) -> ImageSource:
    """The images that the settings name.

    Raises:
        UserError: If they are not there, or are no images.
    """
    source = open_source(
        config.dataset,
        data_dir=config.data_dir.expanduser(),
        resolution=config.resolution,
        folder_labels=config.folder_labels,
        image_column=config.image_column,
        on_bad_image=config.on_bad_image,
        download=download,
    )
    return source if config.max_images is None else FirstImages(source, config.max_images)


def pack_images(
    source: ImageSource, store: Store, terminal: Terminal, on_bad_image: Literal["stop", "skip"] = "stop"
) -> Path:
    """The folder with all images in one file; made unless it is there and whole.

    Args:
        source: The images.
        store: Where packed images are kept.
        terminal: Where progress, and what was left out, is shown.
        on_bad_image: What a damaged, too small or too large image does.

    Raises:
        UserError: If an image is bad and bad ones are not skipped, or if too many are.
    """
    path = store.path("images", {"images": source.fingerprint, "on_bad_image": on_bad_image})
    try:
        packed = load_packed(path)
    except UserError:
        with terminal.stage(f"reading {len(source):,} images"):
            for _ in pack(source, path, on_bad_image=on_bad_image):
                pass
        packed = load_packed(path)
    if packed.facts.skipped:
        terminal.line(f"{packed.facts.skipped:,} bad images were left out; they are listed in {path / 'skipped.txt'}")
    return path
