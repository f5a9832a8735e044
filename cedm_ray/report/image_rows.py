"""Rows of images with a label on the left of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CELL = 56  # side of a cell that whole factors come nearest to, in pixels
_MOST = 64  # longer sides are scaled down to this
_GAP = 2
_MARGIN = 6
_FONT_SIZE = 12


@dataclass(frozen=True)
class ImageRow:
    """Images of shape ``(n, C, H, W)``, uint8, with 1 or 3 channels, and what stands beside and below them."""

    label: str
    """One line or several."""
    images: NDArray[np.uint8]
    captions: tuple[str, ...] = ()
    """One below each image, or none at all."""

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.captions and len(self.captions) != len(self.images):
            raise ValueError(f"there are {len(self.captions)} captions for {len(self.images)} images")


def check_images(images: NDArray[np.uint8]) -> None:
    """Refuse what is no set of images, without reading a pixel.

    Raises:
        ValueError: Unless they are uint8, ``(N, 1 or 3, H, W)``, none of these 0.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} of shape {images.shape}; uint8, (N, 1 or 3, H, W) is due")


def labelled_rows(rows: Sequence[ImageRow], header: str) -> Image.Image:
    """Rows of images below one another, with their labels; small images keep their pixels as squares.

    Args:
        rows: At least one; all images are of one size.
        header: One line above them.

    Returns:
        An RGB image.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font=font) for text in (*(row.label for row in rows), header)]
    header_width, strip = int(boxes[-1][2]) + 2 * _MARGIN, int(max(box[2] for box in boxes[:-1])) + 2 * _MARGIN
    top, label_height = int(boxes[-1][3]) + 2 * _MARGIN, int(max(box[3] for box in boxes[:-1]))
    tiles = [[_tile(pixels) for pixels in row.images] for row in rows]
    cell_width, cell_height = tiles[0][0].size
    caption_height = _FONT_SIZE + _GAP if any(row.captions for row in rows) else 0
    pitch = max(cell_height + caption_height, label_height) + _GAP  # a flat image still leaves room for text
    width = strip + max(len(row) for row in tiles) * (cell_width + _GAP)
    picture = Image.new("RGB", (max(width, header_width), top + len(tiles) * pitch), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_MARGIN, _MARGIN), header, fill="black", font=font)
    for number, (row, images) in enumerate(zip(rows, tiles, strict=True)):
        y = top + number * pitch
        draw.multiline_text((_MARGIN, y + (pitch - _GAP) / 2), row.label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture.paste(image, (strip + column * (cell_width + _GAP), y))
        for column, caption in enumerate(row.captions):
            x = strip + column * (cell_width + _GAP) + cell_width / 2
            draw.text((x, y + cell_height), caption, fill="black", font=font, anchor="ma")
    return picture


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    """An image of shape (C, H, W) in the size of a cell; a small one keeps its pixels as squares."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
    side = max(image.size)
    if side > _MOST:
        width, height = (max(1, round(length * _MOST / side)) for length in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, round(_CELL / side))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
