"""Any local folder of PNG, JPEG or WebP files as square colour images of one resolution."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cedm_ray.data.classes import classes_of_folders
from cedm_ray.data.encoded import EncodedSource
from cedm_ray.data.images import SUFFIXES, checked_resolution
from cedm_ray.errors import UserError

_VERSION = "1"  # to be raised when the same files become other pixels


class FolderSource(EncodedSource):
    """The images of a folder and its sub-folders, sorted by relative path; ``images.decode`` says what becomes of each.

    Hidden files and folders are skipped. Links to files count as long as they stay inside the folder; links to
    folders are not followed.

    Args:
        root: The folder.
        resolution: Side of the images in pixels, 8 to 256 and divisible by 4.
        folder_labels: Whether the first-level sub-folders are classes, numbered in sorted order; else no labels.
        name: Name of the dataset; that of the folder if None.
        num_threads: Files that are decoded at once.

    Raises:
        UserError: If the resolution is missing or out of bounds, the folder holds no image, a link leads out of it, or
            an image that needs a label lies in no sub-folder.
    """

    def __init__(
        self,
        root: Path,
        resolution: int | None,
        *,
        folder_labels: bool = False,
        name: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        resolution = checked_resolution(resolution, "a folder of images")
        self.root = root.resolve()
        paths = sorted(_image_files(self.root), key=os.fsencode)
        if not paths:
            raise UserError(
                f"{root} holds no image; PNG, JPEG and WebP files are looked for in it and in its subfolders"
            )
        classes = classes_of_folders(paths, str(root)) if folder_labels else None
        super().__init__(
            name or self.root.name or "folder",
            self._key(paths, resolution, folder_labels),
            paths,
            resolution,
            classes=classes,
            num_threads=num_threads,
        )

    def _key(self, paths: list[str], resolution: int, folder_labels: bool) -> str:
        # Sizes and times, not contents: reading a million files to name a run would take as long as embedding them.
        digest = hashlib.sha256(f"folder {_VERSION} {resolution}{' labels' if folder_labels else ''}\n".encode())
        for path in paths:
            facts = (self.root / path).stat()
            digest.update(os.fsencode(path))
            digest.update(f"\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _where(self, name: str) -> str:
        return str(self.root / name)

    def _open(self, name: str) -> IO[bytes]:
        path = self.root / name
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); allow it to be read or remove it") from error


def _image_files(root: Path) -> Iterator[str]:
    """Path of every image file below the root, relative to it, in no order."""
    for parent, folders, files in os.walk(root, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = Path(parent) / name
            if path.is_symlink():
                target = Path(os.path.realpath(path))  # Path.resolve() raises an error where a link leads to itself
                if not target.is_relative_to(root):
                    raise UserError(f"{path} leads out of the folder, to {target}; copy that image or remove it")
            if not path.is_file():
                raise UserError(f"{path} is not a readable file; remove it")
            yield path.relative_to(root).as_posix()


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}); allow it to be read or move it away")
