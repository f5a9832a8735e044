from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.report.mosaic import cluster_mosaic

GAP = 2
SIZES = {7: 30, 2: 25, 9: 20, 0: 15, 4: 10, 5: 4, 3: 1}  # clusters 1, 6 and 8 are empty


def coded(sizes: dict[int, int] = SIZES, side: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of one colour each: red is the cluster (plus 100), green and blue are the image's own number."""
    assignments = np.repeat(list(sizes), list(sizes.values())).astype(np.int64)
    assignments = np.random.default_rng(1).permutation(assignments)
    number = np.arange(len(assignments))
    colours = np.stack([assignments + 100, number % 256, number // 256], axis=1).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colours[:, :, None, None], (*colours.shape, side, side))), assignments


def shown(mosaic: Image.Image, cell: int, columns: int) -> list[list[tuple[int, int]]]:
    """(cluster, number) of every cell; counted from the bottom right, as the strip's size is not known here."""
    pixels = np.asarray(mosaic).astype(int)
    height, width, _ = pixels.shape
    left, pitch = width - columns * (cell + GAP), cell + GAP
    found = []
    for y in range(height - GAP - cell // 2, 20, -pitch):
        centres = [pixels[y, left + column * pitch + cell // 2] for column in range(columns)]
        found.append([(r - 100, g + 256 * b) for r, g, b in centres if (r, g, b) != (255, 255, 255)])
    return found[::-1]


def test_rows_are_the_used_clusters_from_the_largest_on() -> None:
    images, assignments = coded()
    rows = shown(cluster_mosaic(images, assignments, num_clusters=10), 64, 12)
    assert [{cluster for cluster, _ in row} for row in rows] == [{cluster} for cluster in SIZES]


def test_cells_are_distinct_members_and_blank_where_there_are_no_more() -> None:
    images, assignments = coded()
    rows = shown(cluster_mosaic(images, assignments, num_clusters=10), 64, 12)
    assert [len(row) for row in rows] == [12, 12, 12, 12, 10, 4, 1]
    for row in rows:
        assert len(set(row)) == len(row)
        assert all(assignments[number] == cluster for cluster, number in row)


@pytest.mark.parametrize(("rows", "due"), [(1, [7]), (2, [7, 3]), (3, [7, 0, 3]), (4, [7, 9, 4, 3])])
def test_with_more_clusters_than_rows_all_sizes_are_represented(rows: int, due: list[int]) -> None:
    images, assignments = coded()
    found = shown(cluster_mosaic(images, assignments, num_clusters=10, rows=rows), 64, 12)
    assert [row[0][0] for row in found] == due


def test_members_depend_on_the_seed_and_not_on_the_other_rows() -> None:
    images, assignments = coded()
    every, few, other = (
        cluster_mosaic(images, assignments, num_clusters=10, **changed)
        for changed in ({}, {"rows": 2}, {"seed": 1})  # type: ignore[arg-type]
    )
    again = cluster_mosaic(images, assignments, num_clusters=10)
    np.testing.assert_array_equal(np.asarray(every), np.asarray(again))
    assert shown(every, 64, 12)[0] == shown(few, 64, 12)[0]
    assert shown(every, 64, 12)[0] != shown(other, 64, 12)[0]


def test_every_member_is_as_likely_as_any_other() -> None:
    images, assignments = coded({0: 10, 1: 5}, side=64)
    drawn: list[int] = []
    for seed in range(200):
        (row,) = shown(cluster_mosaic(images, assignments, num_clusters=2, rows=1, columns=6, seed=seed), 64, 6)
        drawn += [number for _, number in row]
    _, counts = np.unique(drawn, return_counts=True)
    assert counts.sum() == 200 * 6
    assert len(counts) == 10
    # 200 draws of 6 out of 10: binomial with n = 200 and p = 0.6.
    assert np.abs(counts - 120).max() < 4 * np.sqrt(200 * 0.6 * 0.4)


@pytest.mark.parametrize(("side", "cell"), [(8, 56), (16, 64), (28, 56), (32, 64), (64, 64)])
def test_small_images_keep_each_pixel_as_a_square(side: int, cell: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 3, side, side), dtype=np.uint8)
    mosaic = np.asarray(cluster_mosaic(images, np.zeros(1, np.int64), num_clusters=1, columns=1))
    tops, lefts = np.nonzero((mosaic == images[0, :, 0, 0]).all(-1))
    tile = mosaic[tops.min() : tops.min() + cell, lefts.min() : lefts.min() + cell]
    factor = cell // side
    np.testing.assert_array_equal(tile, images[0].transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1))


def test_large_images_are_scaled_down() -> None:
    images, assignments = coded(side=256)
    rows = shown(cluster_mosaic(images, assignments, num_clusters=10), 64, 12)
    assert [len(row) for row in rows] == [12, 12, 12, 12, 10, 4, 1]


def test_grey_images_are_grey() -> None:
    images = np.full((6, 1, 8, 8), 90, np.uint8)
    mosaic = np.asarray(cluster_mosaic(images, np.zeros(6, np.int64), num_clusters=1))
    assert (mosaic == 90).all(-1).sum() >= 6 * 56 * 56
    assert (mosaic == mosaic[..., :1]).all()


@pytest.mark.parametrize(("side", "cell", "clusters"), [(8, 56, 3), (32, 64, 3), (4096, 64, 1)])
def test_every_row_has_its_label_and_no_label_reaches_the_images(side: int, cell: int, clusters: int) -> None:
    images = np.zeros((clusters, 3, side, side), np.uint8)
    images[:, 0] = 255  # pure red, which no text is
    numbers = np.arange(99_999 - clusters, 99_999)  # long indices
    mosaic = np.asarray(cluster_mosaic(images, numbers, num_clusters=99_999))
    red = (mosaic == (255, 0, 0)).all(-1)
    left = np.nonzero(red.any(0))[0].min()
    tops = np.nonzero(red.any(1) & ~np.roll(red.any(1), 1))[0]
    assert len(tops) == clusters
    for top in tops:
        dark = mosaic[top : top + cell, :left].max(-1) < 100
        assert dark.sum() > 50
        assert not dark[:, -GAP:].any()
        text = np.nonzero(dark.any(1))[0]
        assert np.ptp(text) >= 18  # two lines
        assert (text.min() + text.max()) / 2 == pytest.approx(cell / 2, abs=4)


def test_the_label_says_the_index_and_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    texts: list[str] = []
    drawn = ImageDraw.ImageDraw.multiline_text

    def spy(self: Any, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        texts.append(text)
        drawn(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", spy)
    images, assignments = coded({5: 1234, 11: 1}, side=8)
    cluster_mosaic(images, assignments, num_clusters=12)
    assert [text for text in texts if text.startswith("cluster")] == ["cluster 5\n1,234 images", "cluster 11\n1 image"]


class Recording:
    """An array that can only be indexed, and remembers what was read: it stands in for a file of millions."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, n: int) -> None:
        self.shape = (n, 3, 32, 32)
        self.read: list[int] = []

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        self.read += index.tolist()
        return np.zeros((len(index), *self.shape[1:]), np.uint8)


def test_only_the_images_shown_are_read() -> None:
    images = Recording(1_000_000)
    assignments = np.random.default_rng(0).integers(0, 50, 1_000_000)
    cluster_mosaic(images, assignments, num_clusters=50, rows=5, columns=4)  # type: ignore[arg-type]
    assert len(images.read) == len(set(images.read)) == 20
    assert len(set(assignments[images.read])) == 5


def test_images_mapped_from_a_file_look_like_those_in_memory(tmp_path: Path) -> None:
    images, assignments = coded()
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    mosaics = [np.asarray(cluster_mosaic(source, assignments, num_clusters=10)) for source in (images, mapped)]
    np.testing.assert_array_equal(*mosaics)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"columns": -1}, "columns is -1; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"num_clusters": 0}, "num_clusters is 0; it must be at least 1"),
        ({"num_clusters": 9}, r"an assignment is 9; it must lie in \[0, 9\)"),
        ({"assignments": np.full(105, -1)}, r"an assignment is -1; it must lie in \[0, 10\)"),
        ({"assignments": np.zeros(104, np.int64)}, r"int64 of shape \(104,\); integers, \(105,\) is due"),
        ({"assignments": np.zeros(105)}, r"float64 of shape \(105,\); integers"),
        ({"images": np.zeros((105, 3, 8, 8))}, r"float64 of shape .*; uint8, \(N, 1 or 3, H, W\) is due"),
        ({"images": np.zeros((105, 8, 8, 3), np.uint8)}, r"shape \(105, 8, 8, 3\)"),
        ({"images": np.zeros((0, 3, 8, 8), np.uint8)}, r"shape \(0, 3, 8, 8\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], message: str) -> None:
    images, assignments = coded(side=8)
    with pytest.raises(ValueError, match=message):
        cluster_mosaic(**{"images": images, "assignments": assignments, "num_clusters": 10, **changed})
