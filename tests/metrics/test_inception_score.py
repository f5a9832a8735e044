from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from cedm_ray.errors import UserError
from cedm_ray.metrics.inception_score import inception_score


def logits(num: int, classes: int, scale: float = 2.0) -> NDArray[np.float32]:
    return (np.random.default_rng(0).standard_normal((num, classes)) * scale).astype(np.float32)


def one_hot(num: int, classes: int, certainty: float = 1000.0) -> NDArray[np.float32]:
    return np.tile(np.eye(classes, dtype=np.float32) * np.float32(certainty), (num // classes, 1))


@pytest.mark.parametrize(("num", "splits", "seed"), [(1000, 10, 2020), (503, 10, 2020), (77, 4, 3), (5, 5, 0)])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_value_and_deviation_are_those_of_torch_fidelity(num: int, splits: int, seed: int, scale: float) -> None:
    x = logits(num, 40, scale)
    expected = isc_features_to_metric(torch.from_numpy(x), splits=splits, rng_seed=seed)
    ours = inception_score(x, splits=splits, shuffle_seed=seed)
    assert ours == pytest.approx((expected[KEY_METRIC_ISC_MEAN], expected[KEY_METRIC_ISC_STD]), rel=1e-9, abs=1e-12)


def test_the_defaults_are_those_of_torch_fidelity() -> None:
    x = logits(300, 12)
    assert inception_score(x)[0] == pytest.approx(
        isc_features_to_metric(torch.from_numpy(x))[KEY_METRIC_ISC_MEAN], rel=1e-9
    )


def test_uniform_predictions_give_1() -> None:
    assert inception_score(np.full((50, 7), 3.5, np.float32)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_sure_predictions_spread_evenly_give_the_number_of_classes(classes: int) -> None:
    assert inception_score(one_hot(2 * classes, classes), splits=1) == pytest.approx((classes, 0), rel=1e-12)


def test_sure_predictions_of_one_class_give_1_although_the_others_never_occur() -> None:
    always_first = np.repeat(one_hot(5, 5)[:1], 20, axis=0)
    assert inception_score(always_first, splits=2) == pytest.approx((1, 0), abs=1e-12)


def test_one_split_does_not_depend_on_the_order_of_the_images() -> None:
    x = logits(200, 9)
    shuffled = np.random.default_rng(1).permutation(x)
    assert inception_score(shuffled, splits=1)[0] == pytest.approx(inception_score(x, splits=1)[0], rel=1e-12)


def test_tensors_and_read_only_files_give_the_same(tmp_path: Path) -> None:
    x = logits(200, 9)
    np.save(tmp_path / "logits.npy", x)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    assert inception_score(mapped) == inception_score(x) == inception_score(torch.from_numpy(x))


def test_too_few_images_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"^9 images are too few for 10 splits: score more images or lower splits$"):
        inception_score(logits(9, 4))


@pytest.mark.parametrize(
    ("x", "splits", "message"),
    [
        (logits(9, 4), 0, "splits is 0; it must be at least 1"),
        (logits(9, 4)[0], 1, r"logits have shape \(4,\); \(N, K\) is due"),
        (np.full((9, 4), np.inf, np.float32), 1, "logits hold NaN or infinite values"),
    ],
)
def test_logits_that_mean_nothing_are_refused(x: NDArray[np.float32], splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(x, splits=splits)
