"""The images of a data set in the store, packed into one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import FACTS, IMAGES, PackedImages, load_packed, pack
from cedm_ray.data.registry import open_source
from cedm_ray.data.sources import ImageSource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.storage.bucket_entries import fetch_entry, here, keep_entry
from cedm_ray.stages.storage.store import Store, read_json, set_aside, write_json
from cedm_ray.weights.listing import Listing, seal_fits, sealed

FILES = "files.json"
"""Sizes and hashes of the packed files."""


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
    packed = _packed(path)
    if packed is None and fetch_entry(path):
        packed = _packed(path)
    if packed is None:
        with terminal.stage(f"reading {len(source):,} images"):
            for _ in pack(source, path, on_bad_image=on_bad_image):
                pass
        packed = load_packed(path)
        _list_files(path)
    keep_entry(path)
    if packed.facts.skipped:
        terminal.line(f"{packed.facts.skipped:,} bad images were left out; they are listed in {path / 'skipped.txt'}")
    return path


def images_here(folder: Path) -> PackedImages:
    """The packed images in a folder, which are brought to this node first where they are not on it."""
    return load_packed(here(folder / IMAGES).parent)


def _packed(path: Path) -> PackedImages | None:
    """The packed images in a folder; None where packing was never finished.

    All of their bytes are looked at. What is not whole is set aside; a list of the files that is missing is made.
    """
    if not (path / FACTS).is_file():
        return None
    listed = read_json(path / FILES)
    # Else packed by an earlier version, or by a process that was killed before it wrote the list.
    listing = Listing.read(listed) if listed is not None and seal_fits(listed) else None
    try:
        packed = load_packed(path)
        fault = _pixels_fault(packed) if listing is None else listing.fault(path)
    except UserError as error:
        fault = str(error)
    if fault is not None:
        set_aside(path, fault)
        return None
    if listing is None:
        _list_files(path)
    return packed


def _pixels_fault(packed: PackedImages) -> str | None:
    """What is wrong with the pixels of packed images, in words."""
    found = hashlib.sha256(packed.images.data).hexdigest()
    return None if found == packed.facts.pixels_sha256 else f"{IMAGES} has another content than was written"


def _list_files(path: Path) -> None:
    write_json(path / FILES, sealed(Listing.of(path).values()))
