"""Images of each cluster side by side, which is what a person judges a clustering by."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cedm_ray.errors import require

_CELL = 56  # side of a cell that whole factors come nearest to, in pixels
_MOST = 64  # longer sides are scaled down to this
_GAP = 2
_MARGIN = 6
_FONT_SIZE = 12


def cluster_mosaic(
    images: NDArray[np.uint8],
    assignments: NDArray[np.integer],
    *,
    num_clusters: int,
    rows: int = 20,
    columns: int = 12,
    seed: int = 0,
) -> Image.Image:
    """Random images of clusters, one row per cluster, from the largest cluster to the smallest.

    Rows are used clusters only: all of them, or, if they are more than ``rows``, some spread evenly over the order of
    their sizes, the largest and the smallest among them. Columns are drawn at random, without replacement, so that bad
    members show as often as they are; a cluster with fewer leaves cells blank. What a cluster shows depends on the
    seed and its members alone, not on which other clusters are shown.

    Args:
        images: Shape ``(N, C, H, W)``, uint8, with 1 or 3 channels; may be mapped, as only those shown are read.
        assignments: Cluster of each image, shape ``(N,)``, integers in ``[0, num_clusters)``.
        num_clusters: Clusters that were available, used or not.
        rows: Most clusters to show.
        columns: Most images to show of a cluster.
        seed: Seed of the choice of images, at least 0.

    Returns:
        An RGB image; left of each row stand the cluster's index and its number of images.

    Raises:
        ValueError: If the images are not of that kind, or a value lies outside its bounds.
    """
    _check(images, assignments, num_clusters)
    for name, value, least in (("rows", rows, 1), ("columns", columns, 1), ("seed", seed, 0)):
        require(value >= least, name, value, f"be at least {least}")
    sizes = np.bincount(assignments, minlength=num_clusters)
    shown, used = _spread(sizes, rows), int(np.count_nonzero(sizes))
    tiles = [_members(images, assignments, cluster, columns, seed) for cluster in shown]
    labels = [f"cluster {cluster}\n{sizes[cluster]:,} image{'s' if sizes[cluster] > 1 else ''}" for cluster in shown]
    chosen = "All" if len(shown) == used else f"{len(shown):,} of the"
    return _draw(tiles, labels, f"{chosen} {used:,} used clusters (C = {num_clusters:,}), largest first; random images")


def _check(images: NDArray[np.uint8], assignments: NDArray[np.integer], num_clusters: int) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images are {images.dtype} of shape {images.shape}; uint8, (N, 1 or 3, H, W) is due")
    if assignments.shape != images.shape[:1] or not np.issubdtype(assignments.dtype, np.integer):
        due = f"integers, ({images.shape[0]},) is due"
        raise ValueError(f"assignments are {assignments.dtype} of shape {assignments.shape}; {due}")
    require(num_clusters >= 1, "num_clusters", num_clusters, "be at least 1")
    for value in (int(assignments.min()), int(assignments.max())):
        require(0 <= value < num_clusters, "an assignment", value, f"lie in [0, {num_clusters})")


def _spread(sizes: NDArray[np.integer], rows: int) -> list[int]:
    """Used clusters, at most ``rows`` of them at even steps from the largest to the smallest."""
    ranked = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    steps = np.linspace(0, len(ranked) - 1, min(rows, len(ranked)))
    return [int(cluster) for cluster in ranked[steps.round().astype(np.int64)]]


def _members(
    images: NDArray[np.uint8], assignments: NDArray[np.integer], cluster: int, columns: int, seed: int
) -> list[Image.Image]:
    members = np.flatnonzero(assignments == cluster)
    random = np.random.default_rng((seed, cluster))
    chosen = random.choice(members, min(columns, len(members)), replace=False)
    return [_tile(pixels) for pixels in images[chosen]]


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    """An image of shape (C, H, W) in the size of a cell; a small one keeps its pixels as squares."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
    side = max(image.size)
    if side > _MOST:
        width, height = (max(1, round(length * _MOST / side)) for length in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, round(_CELL / side))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _draw(tiles: list[list[Image.Image]], labels: list[str], header: str) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [ruler.multiline_textbbox((0, 0), text, font=font) for text in (*labels, header)]
    header_width, strip = int(boxes[-1][2]) + 2 * _MARGIN, int(max(box[2] for box in boxes[:-1])) + 2 * _MARGIN
    top = int(boxes[-1][3]) + 2 * _MARGIN
    cell_width, cell_height = tiles[0][0].size
    pitch = max(cell_height, int(max(box[3] for box in boxes[:-1]))) + _GAP  # a flat image still leaves room for text
    width = strip + max(len(row) for row in tiles) * (cell_width + _GAP)
    mosaic = Image.new("RGB", (max(width, header_width), top + len(tiles) * pitch), "white")
    draw = ImageDraw.Draw(mosaic)
    draw.text((_MARGIN, _MARGIN), header, fill="black", font=font)
    for row, (images, label) in enumerate(zip(tiles, labels, strict=True)):
        y = top + row * pitch
        draw.multiline_text((_MARGIN, y + (pitch - _GAP) / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            mosaic.paste(image, (strip + column * (cell_width + _GAP), y))
    return mosaic
