"""One encoded image, PNG, JPEG or WebP, as a square block of pixels."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cedm_ray.errors import UserError, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MIN_RESOLUTION, MAX_RESOLUTION, RESOLUTION_STEP = 8, 256, 4
MAX_PIXELS = 89_000_000  # of one image; just below the size at which Pillow itself warns of decompression bombs
MAX_FILE_BYTES = 256 * 2**20  # of one encoded image; MAX_PIXELS of raw colour are 255 MiB
WAY_OUT = "or leave such images out with --on-bad-image skip"


class BadImageError(UserError):
    """A single image that is damaged, too small or too large, where those beside it may be sound."""


Outcome = NDArray[np.uint8] | BadImageError
"""An image, shape ``(C, R, R)``, or what is wrong with it."""


def all_sound(outcomes: Sequence[Outcome], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The images of a block, shape ``(n, *shape)``.

    Raises:
        BadImageError: That of the first bad image.
    """
    images = np.empty((len(outcomes), *shape), dtype=np.uint8)
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, BadImageError):
            raise outcome
        images[i] = outcome
    return images


def checked_resolution(resolution: int | None, what: str) -> int:
    """The side of the images in pixels, if it is given and within the bounds.

    Raises:
        UserError: If it is missing, or not in [8, 256] and divisible by 4.
    """
    if resolution is None:
        raise UserError(f"{what} needs a resolution; give it with --resolution, for example --resolution 64")
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION or resolution % RESOLUTION_STEP:
        raise UserError(
            f"resolution is {resolution}; it must lie in [{MIN_RESOLUTION}, {MAX_RESOLUTION}] "
            f"and be divisible by {RESOLUTION_STEP}: change --resolution"
        )
    return resolution


def read_encoded(file: IO[bytes], where: str) -> bytes:
    """All bytes of an encoded image.

    Raises:
        BadImageError: If they are more than 256 MiB, or a member of an archive is damaged.
        UserError: If the disk fails.
    """
    try:
        data = file.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadImageError(f"{where} is damaged ({_line(error)}); pack it again, {WAY_OUT}") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read ({_line(error)}); try again, or remove it") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadImageError(f"{where} is too large: it has over {MAX_FILE_BYTES >> 20} MiB; remove it, {WAY_OUT}")
    return data


def open_header(file: IO[bytes], where: str, resolution: int) -> Image.Image:
    """The image with only its header read, its size checked.

    Args:
        file: The encoded image; it must allow seeking.
        where: What the image is called in messages: a path, a member of an archive, a row of a table.
        resolution: Its smaller side must have as many pixels at least.

    Raises:
        BadImageError: If it is no image of the three formats, too small, or too large to decode.
    """
    try:
        image = Image.open(file, formats=("PNG", "JPEG", "WEBP"))
    except MemoryError:
        raise
    except Exception as error:  # a damaged header can raise nearly anything
        # Pillow's own text for an unknown format names an object in memory.
        reason = "its first bytes are of none of them" if isinstance(error, UnidentifiedImageError) else _line(error)
        raise BadImageError(
            f"{where} is no readable PNG, JPEG or WebP image ({reason}); repair or remove it, {WAY_OUT}"
        ) from error
    check_size(image.width, image.height, where, resolution)
    return image


def check_size(width: int, height: int, where: str, resolution: int) -> None:
    """Refuse an image that is smaller than the resolution, or too large to decode.

    Raises:
        BadImageError: With its size and the bound.
    """
    if min(width, height) < resolution:
        raise BadImageError(
            f"{where} is too small: {width}x{height} pixels, and its smaller side must be at least {resolution}; "
            f"choose a smaller --resolution or remove it, {WAY_OUT}"
        )
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"{where} is too large: {width}x{height} is over {MAX_PIXELS} pixels; shrink or remove it, {WAY_OUT}"
        )


def decode(image: Image.Image, where: str, resolution: int, channels: int = 3) -> NDArray[np.uint8]:
    """The pixels of an opened image, shape ``(channels, R, R)``, uint8.

    The image is turned upright (EXIF), made RGB (grey images too; transparency is laid on white; 16-bit grey is cut
    to 8 bits) or, with one channel, grey, cropped to its central square and resized with Pillow's Lanczos filter; of
    an animation the first frame counts. An image that has the resolution already keeps its pixels.

    Raises:
        BadImageError: If its data are cut off or damaged.
    """
    try:
        upright = ImageOps.exif_transpose(image)
        coloured = upright if channels == 1 and upright.mode == "L" else _to_rgb(upright)
        square = _central_square(coloured if channels == 3 else coloured.convert("L"))
    except MemoryError:
        raise
    except Exception as error:  # damaged pixels and damaged EXIF can raise nearly anything
        raise BadImageError(f"{where} is a damaged image ({_line(error)}); repair or remove it, {WAY_OUT}") from error
    pixels = np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS))
    return pixels.reshape(resolution, resolution, channels).transpose(2, 0, 1)


def decode_bytes(data: bytes, where: str, resolution: int) -> NDArray[np.uint8]:
    """The pixels of an encoded colour image: ``open_header`` and ``decode`` in one.

    Raises:
        BadImageError: If either would.
    """
    with open_header(io.BytesIO(data), where, resolution) as image:
        return decode(image, where, resolution)


def _line(error: Exception) -> str:
    return one_line(error) or type(error).__name__


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
