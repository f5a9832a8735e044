from typing import Any

import numpy as np
import pytest

from cedm_ray.data.classes import ClassLabels
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
