from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from cedm_ray.errors import UserError
from cedm_ray.metrics.kid import kid

Array = NDArray[np.float32]


def features(num: int, seed: int, shift: float = 0.0, dim: int = 32) -> Array:
    drawn = np.random.default_rng(seed).standard_normal((num, dim), dtype=np.float32)
    return np.abs(drawn + np.float32(shift))  # not negative, as pooled features are


def reference(real: Array, fake: Array, dtype: torch.dtype, **settings: int) -> tuple[float, float]:
    values = kid_features_to_metric(
        torch.from_numpy(real).to(dtype), torch.from_numpy(fake).to(dtype), verbose=False, **settings
    )
    return values[KEY_METRIC_KID_MEAN], values[KEY_METRIC_KID_STD]


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_value_and_deviation_are_those_of_torch_fidelity_in_float64(shift: float) -> None:
    real, fake = features(1300, 0), features(1100, 1, shift)
    ours = kid(real, fake, subsets=10)
    assert ours == pytest.approx(reference(real, fake, torch.float64, kid_subsets=10), rel=1e-9)
    assert ours[0] == pytest.approx(reference(real, fake, torch.float32, kid_subsets=10)[0], rel=1e-3, abs=1e-5)


def test_defaults_and_seed_are_those_of_torch_fidelity() -> None:
    real, fake = features(1001, 0, dim=2), features(1002, 1, 0.1, dim=2)
    assert kid(real, fake) == pytest.approx(reference(real, fake, torch.float64), rel=1e-9)
    other = kid(real, fake, subsets=5, subset_size=50, seed=7)
    assert other == pytest.approx(
        reference(real, fake, torch.float64, kid_subsets=5, kid_subset_size=50, rng_seed=7), rel=1e-9
    )
    assert other != kid(real, fake, subsets=5, subset_size=50, seed=8)


def test_whole_sets_of_two_give_the_closed_form() -> None:
    # D = 1: k(x, y) = (xy + 1)^3. Within real 1, 2: k = 27; within fake 0, 3: k = 1; across: 1, 64, 1, 343.
    real, fake = np.array([[1], [2]], np.float32), np.array([[0], [3]], np.float32)
    value, deviation = kid(real, fake, subsets=4, subset_size=2)
    assert value == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4, rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_sets_of_one_distribution_are_near_0_and_others_are_not() -> None:
    same, deviation = kid(features(2000, 0), features(2000, 1), subsets=50, subset_size=500)
    assert abs(same) < 3 * deviation
    assert kid(features(2000, 0), features(2000, 1, 0.5), subsets=50, subset_size=500)[0] > 20 * deviation


def test_whole_sets_do_not_depend_on_the_order_of_the_images() -> None:
    real, fake = features(60, 0), features(60, 1, 0.3)
    shuffled = np.random.default_rng(0).permutation(real)
    ours = kid(real, fake, subsets=2, subset_size=60)[0]
    assert kid(shuffled, fake[::-1], subsets=2, subset_size=60)[0] == pytest.approx(ours, rel=1e-9)


def test_tensors_and_read_only_files_give_the_same(tmp_path: Path) -> None:
    real, fake = features(150, 0), features(120, 1)
    np.save(tmp_path / "fake.npy", fake)
    mapped = np.load(tmp_path / "fake.npy", mmap_mode="r")
    assert kid(torch.from_numpy(real), mapped, subset_size=100) == kid(real, fake, subset_size=100)


def test_too_few_images_are_refused_with_the_way_out() -> None:
    message = r"^999 generated images are too few for subset_size = 1000: score more images or lower subset_size to"
    with pytest.raises(UserError, match=message):
        kid(features(1000, 0), features(999, 1))
    with pytest.raises(UserError, match=r"^999 real images are too few"):
        kid(features(999, 0), features(1000, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"subsets": 0}, "subsets is 0; it must be at least 1"), ({"subset_size": 1}, "subset_size is 1; it must be at")],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kid(features(9, 0), features(9, 1), **settings)


def test_unlike_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="features have unlike dimensions: real 32, generated 31"):
        kid(features(9, 0), features(9, 1, dim=31), subset_size=5)
