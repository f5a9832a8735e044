from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cedm_ray.report.image_rows import ImageRow, labelled_rows
from cedm_ray.report.samples import Confidence, confidence_picture, read_confidence, read_samples, samples_picture

CELL, GAP = 56, 2


def coded(row: int, count: int, channels: int = 3) -> NDArray[np.uint8]:
    """Images of one colour each: red is the row, green the number."""
    images = np.zeros((count, channels, 8, 8), np.uint8)
    images[:, 0], images[:, 1 % channels] = 100 + row, np.arange(count)[:, None, None]
    return images


def colours(picture: Image.Image) -> list[list[tuple[int, int]]]:
    """(row, number) of every image that is shown, in reading order."""
    pixels = np.asarray(picture).astype(int)
    is_image = (pixels[..., 0] >= 100) & (pixels[..., 0] < 150) & (pixels[..., 2] == 0)
    found: list[list[tuple[int, int]]] = []
    tops = np.flatnonzero(is_image.any(1) & ~np.roll(is_image.any(1), 1))
    for top in tops:
        line = is_image[top + CELL // 2]
        lefts = np.flatnonzero(line & ~np.roll(line, 1))
        found.append([(int(r) - 100, int(g)) for r, g, _ in (pixels[top + CELL // 2, x + CELL // 2] for x in lefts)])
    return found


def test_every_model_is_a_row_and_every_noise_a_column() -> None:
    picture = samples_picture(["unconditional\n20 kimg: 4", "C=5"], [coded(0, 64), coded(1, 64)], metric="fid")
    assert colours(picture) == [[(row, number) for number in range(12)] for row in range(2)]


def test_most_and_least_certain_stand_above_one_another_with_the_unconditional_between() -> None:
    probs = np.linspace(1, 0.9, 5)
    picture = confidence_picture(Confidence(coded(1, 5), probs, coded(2, 5), probs, coded(3, 5)))
    assert colours(picture) == [[(row, number) for number in range(5)] for row in (1, 3, 2)]
    without = confidence_picture(Confidence(coded(1, 5), probs, coded(2, 5), probs))
    assert [row[0][0] for row in colours(without)] == [1, 2]


def test_many_samples_by_confidence_go_on_in_the_next_row() -> None:
    probs = np.linspace(1, 0.9, 20)
    picture = confidence_picture(Confidence(coded(1, 20), probs, coded(2, 20), probs))
    assert [len(row) for row in colours(picture)] == [16, 4, 16, 4]


def test_probabilities_stand_below_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    texts: list[tuple[tuple[float, float], str]] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: texts.append((xy, text)))
    probs = np.array([0.98765, 0.5])
    confidence_picture(Confidence(coded(1, 2), probs, coded(2, 2), probs / 10))
    captions = [(xy, text) for xy, text in texts if text.startswith("0.")]
    assert [text for _, text in captions] == ["0.988", "0.500", "0.099", "0.050"]
    (x0, y0), (x1, y1) = captions[0][0], captions[1][0]
    assert (x1 - x0, y1) == (CELL + GAP, y0)


def test_labels_do_not_reach_the_images() -> None:
    picture = labelled_rows([ImageRow("a label that is rather long", coded(0, 2)), ImageRow("b", coded(1, 1))], "head")
    pixels = np.asarray(picture)
    left = np.flatnonzero(((pixels == (100, 0, 0)).all(-1)).any(0))[0]
    dark = (pixels[:, :left].max(-1) < 100).any(0)
    assert dark.any() and not dark[left - GAP :].any()
    assert colours(picture) == [[(0, 0), (0, 1)], [(1, 0)]]


def test_grey_images_stay_grey() -> None:
    picture = np.asarray(samples_picture(["C=2"], [np.full((3, 1, 8, 8), 70, np.uint8)], metric="fid"))
    assert (picture == 70).all(-1).sum() >= 3 * CELL * CELL


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 8, 8), np.uint8), r"uint8 of shape \(2, 8, 8\); uint8, \(N, 1 or 3, H, W\) is due"),
        (np.zeros((2, 3, 8, 8)), "float64 of shape"),
        (np.zeros((0, 3, 8, 8), np.uint8), r"shape \(0, 3, 8, 8\)"),
    ],
)
def test_what_is_no_pile_of_images_is_refused(images: NDArray[np.uint8], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        ImageRow("", images)
    np.save(tmp_path / "samples.npy", images)
    with pytest.raises(ValueError, match=said):
        read_samples(tmp_path / "samples.npy")


def test_captions_without_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 1 captions for 2 images"):
        ImageRow("", coded(0, 2), ("a",))
    with pytest.raises(ValueError, match="there are 3 probabilities for 2 images"):
        confidence_picture(Confidence(coded(0, 2), np.ones(3), coded(0, 2), np.ones(2)))


def test_confidence_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays = {"high": coded(0, 2), "high_probs": np.array([0.9, 0.8]), "low": coded(1, 2), "low_probs": np.zeros(2)}
    np.savez(tmp_path / "a.npz", **arrays, indices=np.arange(2))
    found = read_confidence(tmp_path / "a.npz")
    assert found.unconditional is None
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), array)


def test_files_that_are_cut_off_or_incomplete_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", high=coded(0, 2))
    with pytest.raises(ValueError, match="it has no high_probs"):
        read_confidence(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="it holds no single array"):
        read_samples(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "b.npy", coded(0, 9))
    for name, read in (("c.npz", read_confidence), ("d.npy", read_samples)):
        for content in (whole[:-40], b"", (tmp_path / "b.npy").read_bytes()[:200], b"\x80\x04K\x01."):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"cut off|pickle|no single array|has no high|reshape|magic|file"):
                read(tmp_path / name)
