"""Where generated images are written: a grid in one PNG file, or a folder with a PNG each and a table."""

from __future__ import annotations

import csv
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.errors import UserError

TABLE_FILE = "samples.csv"


@dataclass(frozen=True)
class Sample:
    """One generated image, as the table has it."""

    index: int
    file: str
    cluster: int | None
    confidence: float | None


def free_place(out: Path, *, overwrite: bool) -> Path:
    """The absolute path of ``out``, if nothing is in the way there.

    Args:
        out: A PNG file, or a folder.
        overwrite: Whether a PNG file may be replaced; a folder that holds something never is.

    Raises:
        UserError: If something is in the way, or ``out`` names an image file of another kind.
    """
    out = out.expanduser().resolve()
    if is_grid(out):
        if out.is_dir():
            raise UserError(f"out {out} is a folder; give a file or another folder")
        if out.exists() and not overwrite:
            raise UserError(f"out {out} exists; give another file, or --overwrite to replace it")
    elif out.suffix.lower() in Image.registered_extensions():
        raise UserError(f"out {out} ends in {out.suffix}; PNG files are written: end it in .png, or give a folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {out} exists and is not an empty folder; give another one")
    return out


def is_grid(out: Path) -> bool:
    """Whether all images shall stand in one file."""
    return out.suffix.lower() == ".png"


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A place beside ``out`` that becomes it when the block ends without an error: all of the images, or none.

    Yields:
        An empty file or folder to write to.

    Raises:
        UserError: If it cannot be written.
    """
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if is_grid(out):
            scratch.touch()
        else:
            scratch.mkdir()
        yield scratch
        scratch.replace(out)  # an empty folder is replaced too
    except OSError as error:
        raise UserError(f"out {out} cannot be written ({error.strerror}); give another place with --out") from error
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        elif scratch.exists():
            scratch.unlink()


def file_name(index: int) -> str:
    """Name of an image's file."""
    return f"{index:06d}.png"


def write_image(image: NDArray[np.uint8], path: Path) -> None:
    """Write one image ``(1 or 3, H, W)`` uint8 as PNG."""
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(path)


def write_table(samples: Sequence[Sample], folder: Path) -> None:
    """Write what is known of each image, in the order given, with its confidence where there is one."""
    ranked = any(each.confidence is not None for each in samples)
    with (folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "file", "cluster", *(["confidence"] if ranked else [])])
        for each in samples:
            writer.writerow([each.index, each.file, each.cluster, *([f"{each.confidence:.6f}"] if ranked else [])])
