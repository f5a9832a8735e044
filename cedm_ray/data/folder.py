"""Any folder of PNG, JPEG or WebP files as square colour images of one resolution."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cedm_ray.data.sources import check_range
from cedm_ray.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MIN_RESOLUTION, MAX_RESOLUTION, RESOLUTION_STEP = 8, 256, 4
MAX_PIXELS = 89_000_000  # of one file; just below the size at which Pillow itself warns of decompression bombs
_VERSION = "1"  # to be raised when the same files become other pixels


class FolderSource:
    """The images of a folder and its subfolders, sorted by relative path, without labels.

    Each image is turned upright (EXIF), made RGB (grey images too; transparency is laid on white; 16-bit grey is
    cut to 8 bits), cropped to its central square and resized with Pillow's Lanczos filter; of an animation the first
    frame counts. Hidden files and folders are skipped. Links to files count as long as they stay inside the
    folder; links to folders are not followed.

    Args:
        root: The folder.
        resolution: Side of the images in pixels, 8 to 256 and divisible by 4.
        num_threads: Files that are decoded at once.

    Raises:
        UserError: If the resolution is missing or out of bounds, the folder holds no image, or a link leads out of it.
    """

    channels = 3
    num_classes: int | None = None

    def __init__(self, root: Path, resolution: int | None, *, num_threads: int | None = None) -> None:
        self.resolution = _checked_resolution(resolution)
        self.root = root.resolve()
        self.name = self.root.name or "folder"
        self._num_threads = num_threads or min(8, os.cpu_count() or 1)
        self._paths = sorted(_image_files(self.root), key=lambda path: os.fsencode(path.relative_to(self.root)))
        if not self._paths:
            raise UserError(
                f"{root} holds no image; PNG, JPEG and WebP files are looked for in it and in its subfolders"
            )
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        # Sizes and times, not contents: reading a million files to name a run would take as long as embedding them.
        digest = hashlib.sha256(f"folder {_VERSION} {self.resolution}\n".encode())
        for path in self._paths:
            facts = path.stat()
            digest.update(os.fsencode(path.relative_to(self.root)))
            digest.update(f"\0{facts.st_size} {facts.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def labels(self) -> NDArray[np.int64] | None:
        return None

    def check(self) -> None:
        """Read the header of every file, so that a wrong one is found before hours are spent.

        Raises:
            UserError: Naming the first file that is no image, too small for the resolution, or too large to decode.
        """
        with ThreadPoolExecutor(self._num_threads) as pool:
            for _ in pool.map(self._check_header, self._paths):
                pass

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        check_range(start, stop, len(self))
        images = np.empty((stop - start, 3, self.resolution, self.resolution), dtype=np.uint8)
        with ThreadPoolExecutor(self._num_threads) as pool:
            for i, image in enumerate(pool.map(self._decode, self._paths[start:stop])):
                images[i] = image.transpose(2, 0, 1)
        return images

    def _check_header(self, path: Path) -> None:
        with _open(path, self.resolution):
            pass

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        with _open(path, self.resolution) as image:
            try:
                upright = ImageOps.exif_transpose(image)
                square = _central_square(_to_rgb(upright))
            except Exception as error:  # damaged pixels and damaged EXIF can raise nearly anything
                raise UserError(f"{path} is a damaged image ({error}); repair or remove it") from error
        return np.asarray(square.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS))


def _checked_resolution(resolution: int | None) -> int:
    if resolution is None:
        raise UserError("a folder of images needs a resolution; give it with --resolution, for example --resolution 64")
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or resolution % RESOLUTION_STEP:
        raise UserError(
            f"resolution is {resolution}; it must lie in [{MIN_RESOLUTION}, {MAX_RESOLUTION}] "
            f"and be divisible by {RESOLUTION_STEP}: change --resolution"
        )
    return resolution


def _image_files(root: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(root, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(parent) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(f"{path} leads out of the folder, to {path.resolve()}; copy that image or remove it")
            if not path.is_file():
                raise UserError(f"{path} is not a readable file; remove it")
            yield path


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}); allow it to be read or move it away")


def _open(path: Path, resolution: int) -> Image.Image:
    """The image with only its header read, its size checked."""
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} is no readable PNG, JPEG or WebP image ({error}); repair or remove it") from error
    width, height = image.size
    if min(width, height) < resolution:
        image.close()
        raise UserError(
            f"{path} is too small: {width}x{height} pixels, and its smaller side must be at least {resolution}; "
            "choose a smaller --resolution or remove it"
        )
    if width * height > MAX_PIXELS:
        image.close()
        raise UserError(f"{path} is too large: {width}x{height} is over {MAX_PIXELS} pixels; shrink or remove it")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
