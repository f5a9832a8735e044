"""Images side by side, for people to look at."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.errors import require
from cedm_ray.report.image_rows import check_images


def sample_grid(images: NDArray[np.uint8], columns: int, *, min_tile: int = 48, gap: int = 2) -> Image.Image:
    """Images side by side in rows, small ones enlarged by a whole factor so that each pixel stays a square.

    Args:
        images: Shape ``(N, C, H, W)``, uint8, with 1 or 3 channels.
        columns: Images in a row; the last row may be shorter.
        min_tile: Least width and height of an image in the grid, in pixels.
        gap: White pixels between images and around them.

    Returns:
        An RGB image.

    Raises:
        ValueError: If the images are not of that kind or ``columns`` is below 1.
    """
    check_images(images)
    require(columns >= 1, "columns", columns, "be at least 1")
    factor = max(1, math.ceil(min_tile / min(images.shape[2:])))
    tiles = images.repeat(factor, axis=2).repeat(factor, axis=3).repeat(3 // images.shape[1], axis=1)
    height, width = tiles.shape[2:]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    grid = np.full((gap + rows * (height + gap), gap + columns * (width + gap), 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    return Image.fromarray(grid)
