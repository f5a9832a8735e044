import numpy as np
import pytest

from cedm_ray.data.digits import digits
from cedm_ray.data.sources import ArraySource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError


def test_the_first_images_are_those_of_the_source_under_a_key_of_their_own() -> None:
    source = digits()
    first = FirstImages(source, 100)
    assert len(first) == 100 and (first.resolution, first.channels, first.num_classes) == (8, 1, 10)
    np.testing.assert_array_equal(first.read(10, 100), source.read(10, 100))
    labels, all_labels = first.labels(), source.labels()
    assert labels is not None and all_labels is not None
    np.testing.assert_array_equal(labels, all_labels[:100])
    assert first.class_names() == source.class_names() and first.superclasses() is None
    assert first.fingerprint not in (source.fingerprint, FirstImages(source, 99).fingerprint)
    with pytest.raises(IndexError):
        first.read(0, 101)


@pytest.mark.parametrize("count", [0, 1798])
def test_more_images_than_there_are_or_none_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"max_images is {count}; .* it must lie in \[1, 1797\]"):
        FirstImages(digits(), count)


def test_superclasses_are_cut_with_the_labels() -> None:
    labels = np.arange(10)
    source = ArraySource("a", "1", np.zeros((10, 1, 8, 8), np.uint8), labels, 10, superclasses=(labels // 5, 2))
    level = FirstImages(source, 6).superclasses()
    assert level is not None and level[1] == 2
    np.testing.assert_array_equal(level[0], [0, 0, 0, 0, 0, 1])
