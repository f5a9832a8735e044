"""A ZIP of PNG files with an optional dataset.json, the layout in which EDM and StyleGAN keep their datasets."""

import errno
import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.data.archives import zip_members
from cedm_ray.data.classes import ClassLabels, numbered_classes
from cedm_ray.data.encoded import EncodedSource
from cedm_ray.data.images import MIN_RESOLUTION, SUFFIXES, WAY_OUT, BadImageError, checked_resolution, open_header
from cedm_ray.errors import UserError

DATASET_JSON = "dataset.json"
_VERSION = "1"  # to be raised when the same archive becomes other pixels
_CHANNELS = {"L": 1, "RGB": 3}
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, NotImplementedError)


class EdmZip(EncodedSource):
    """The images of an archive, sorted by name, with the labels of its ``dataset.json``.

    PNG files count, and JPEG and WebP files too, in any sub-folder but hidden ones. They are square, of one resolution,
    and all grey (one channel, which is kept) or all RGB; the first sound image says which. ``dataset.json`` holds
    ``{"labels": [[name, number], ...]}``, one for each image, or null; other content of it is not looked at.

    Members are read one by one, from any number of threads, and never extracted to the disk. Names and labels grow with
    the number of images (some 600 bytes for each), nothing else. The fingerprint is made of the checksums that the
    archive holds of its members, so that a copy of it elsewhere has the same one.

    Args:
        path: The archive.
        resolution: Side of the images in pixels, to which they are resized as in a folder; the archive's own if None.
        need_labels: Whether an archive without labels is refused.
        name: Name of the dataset; that of the file without ``.zip`` if None.
        num_threads: Members that are decoded at once.

    Raises:
        UserError: If the archive is damaged, harmful (see ``archives.zip_members``) or holds no image, the resolution
            is out of bounds, or ``dataset.json`` is not as said above.
    """

    def __init__(
        self,
        path: Path,
        resolution: int | None = None,
        *,
        need_labels: bool = False,
        name: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
            files = zip_members(self._archive, path)
        except UserError:
            raise
        except _DAMAGE as error:
            raise UserError(f"{path} is no readable ZIP ({error}); fetch or pack it again") from error
        self._members = {file.filename: file for file in files}
        names = sorted(name for name in self._members if _is_image(name))
        if not names:
            raise UserError(f"{path} holds no image; PNG, JPEG and WebP files are looked for in it")
        self._side, self._mode = self._first_header(names)
        resolution = checked_resolution(self._side if resolution is None else resolution, str(path))
        if resolution > self._side:
            raise UserError(
                f"resolution is {resolution}; the images of {path} have {self._side} pixels: lower --resolution"
            )
        classes = self._classes_in(names)
        if need_labels and classes is None:
            raise UserError(f"{path} holds no labels ({DATASET_JSON} lacks them); leave --folder-labels out")
        super().__init__(
            name or path.stem,
            self._key(names, resolution, classes),
            names,
            resolution,
            channels=_CHANNELS[self._mode],
            classes=classes,
            num_threads=num_threads,
        )

    def _key(self, names: Sequence[str], resolution: int, classes: ClassLabels | None) -> str:
        digest = hashlib.sha256(f"edm_zip {_VERSION} {resolution}\n".encode())
        for name in names:
            member = self._members[name]
            digest.update(f"{name}\0{member.file_size} {member.CRC}\n".encode(errors="surrogateescape"))
        digest.update(b"" if classes is None else classes.labels.tobytes())
        return digest.hexdigest()

    def _where(self, name: str) -> str:
        return f"{name} in {self._path}"

    def _open(self, name: str) -> IO[bytes]:
        where = self._where(name)
        try:
            return self._archive.open(self._members[name])
        except _DAMAGE as error:
            # A disk that fails makes no image bad. EINVAL is damage: a member that would begin before the file does.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise UserError(f"{where} cannot be read ({error.strerror}); try again") from error
            raise BadImageError(f"{where} is damaged ({error}); fetch or pack the archive again") from error

    def _check(self, image: Image.Image, where: str) -> None:
        if image.mode != self._mode or image.size != (self._side, self._side):
            raise BadImageError(
                f"{where} is a {image.mode} image of {image.width}x{image.height} pixels, in an archive of "
                f"{self._mode} images of {self._side}x{self._side}: pack it again, {WAY_OUT}"
            )

    def _first_header(self, names: Sequence[str]) -> tuple[int, str]:
        """Side and mode of the first sound image; if there is none, what is wrong with the first one is raised."""
        first_error = None
        for name in names:
            try:
                return self._header(name)
            except BadImageError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _header(self, name: str) -> tuple[int, str]:
        where = self._where(name)
        with self._open(name) as file, open_header(file, where, MIN_RESOLUTION) as image:
            if image.width != image.height or image.mode not in _CHANNELS:
                raise BadImageError(
                    f"{where} is a {image.mode} image of {image.width}x{image.height} pixels; it must be square, and "
                    "grey (L) or RGB: pack the archive again, or unpack it and give the folder"
                )
            return image.width, image.mode

    def _classes_in(self, names: Sequence[str]) -> ClassLabels | None:
        where = f"{DATASET_JSON} in {self._path}"
        if DATASET_JSON not in self._members:
            return None
        try:
            content = json.loads(self._archive.read(self._members[DATASET_JSON]))
        except (*_DAMAGE, RecursionError) as error:
            raise UserError(f"{where} is no readable JSON ({error}); pack the archive again") from error
        pairs = content.get("labels") if isinstance(content, dict) else None
        return None if pairs is None else numbered_classes(_labels(pairs, names, where), where)


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def _labels(pairs: Any, names: Sequence[str], where: str) -> NDArray[np.int64]:
    """The label of each image, from pairs of a name and a number."""
    try:
        label_of = {name: label for name, label in pairs}
        labels = [label_of[name] for name in names]
    except KeyError as error:
        raise UserError(f"{where} has no label for {error.args[0]}; give one for each image, or none at all") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} does not hold its labels as pairs of a name and a number; correct it") from error
    wrong = [label for label in labels if type(label) is not int or not -(2**63) <= label < 2**63]
    if wrong:
        raise UserError(f"{where} holds label {wrong[0]!r:.80}; labels must be whole numbers: correct it")
    return np.asarray(labels, dtype=np.int64)
