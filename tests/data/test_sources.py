from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cedm_ray.data.classes import ClassLabels
from cedm_ray.data.digits import digits
from cedm_ray.data.sources import ArraySource

IMAGES, LABELS = np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, r"images are float32 of shape \(4, 1, 8, 8\); they must be uint8"),
        ({"images": IMAGES[:, 0]}, r"images are uint8 of shape \(4, 8, 8\); they must be uint8, \(N, C, R, R\)"),
        ({"images": IMAGES[:, :, :4]}, r"shape \(4, 1, 4, 8\)"),
        ({"labels": None}, "labels and num_classes must be given together"),
        ({"num_classes": None}, "labels and num_classes must be given together"),
        ({"labels": LABELS[:3]}, r"labels are int64 of shape \(3,\); they must be int64, \(4,\)"),
        ({"labels": LABELS.astype(np.int32)}, "labels are int32"),
        ({"labels": LABELS + 1}, r"labels span 1 to 2; they must lie in \[0, 2\)"),
        ({"labels": LABELS - 1}, "labels span -1 to 0"),
        ({"superclasses": (LABELS, 1)}, r"labels span 0 to 1; they must lie in \[0, 1\)"),
        ({"class_names": ("cat",)}, "there are 1 class names; 2 are due"),
    ],
)
def test_images_labels_and_names_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    given = {"images": IMAGES, "labels": LABELS, "num_classes": 2, **changed}
    with pytest.raises(ValueError, match=message):
        ArraySource("a", "1", **given)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_a_block_that_is_not_wholly_there_is_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=f"images {start} to {stop} were asked for; the source holds 0 to 4"):
        ArraySource("a", "1", IMAGES, None, None).read(start, stop)


def test_there_is_one_name_for_each_class() -> None:
    with pytest.raises(ValueError, match="there are 3 class names; 2 are due"):
        ClassLabels(LABELS, 2, ("a", "b", "c"))


def test_digits_keep_their_grey_levels_and_order() -> None:
    source, theirs = digits(), load_digits()
    images = source.read(0, len(source))
    assert images.shape == (1797, 1, 8, 8)
    assert np.abs(images[:, 0] * (16 / 255) - theirs.images).max() <= 0.5 * 16 / 255 + 1e-12
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_array_equal(source.labels(), theirs.target)


def test_blocks_join_to_the_whole() -> None:
    source = digits()
    blocks = [source.read(i, min(i + 500, 1797)) for i in range(0, 1797, 500)]
    np.testing.assert_array_equal(np.concatenate(blocks), source.read(0, 1797))


def test_the_fingerprint_follows_pixels_labels_and_version() -> None:
    images, labels = np.zeros((4, 1, 8, 8), dtype=np.uint8), np.zeros(4, dtype=np.int64)
    other_images, other_labels = images.copy(), labels.copy()
    other_images[3, 0, 7, 7], other_labels[3] = 1, 1
    sources = [
        ArraySource("a", "1", images, labels, 2),
        ArraySource("a", "1", other_images, labels, 2),
        ArraySource("a", "1", images, other_labels, 2),
        ArraySource("a", "2", images, labels, 2),
        ArraySource("a", "1", images, None, None),
    ]
    assert len({source.fingerprint for source in sources}) == 5
    assert ArraySource("a", "1", images.copy(), labels, 2).fingerprint == sources[0].fingerprint


def test_what_is_read_can_be_changed_without_harm() -> None:
    source = digits()
    source.read(0, 1)[:] = 7
    np.testing.assert_array_equal(source.read(0, 1), digits().read(0, 1))
