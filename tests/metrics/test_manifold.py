import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prdc import compute_prdc

from cedm_ray.errors import UserError
from cedm_ray.metrics.manifold import Manifold, manifold_metrics

Array = NDArray[np.float32]


def normal(num: int, dim: int, seed: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal((num, dim)) * scale).astype(np.float32)


def clustered(num: int, dim: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((12, dim)) * 3
    chosen = rng.choice(12, num, p=rng.dirichlet(np.ones(12)))
    return (centres[chosen] + rng.standard_normal((num, dim)) * rng.uniform(0.2, 1, (num, 1))).astype(np.float32)


def on_a_grid(num: int, dim: int, seed: int) -> Array:
    # Squared distances are small integers: exact in every order of summation, with many ties and many copies.
    return np.random.default_rng(seed).integers(0, 6, (num, dim)).astype(np.float32)


def with_copies(num: int, dim: int, seed: int) -> Array:
    features = normal(num, dim, seed)
    features[: num // 4] = normal(num, dim, 0)[: num // 4]  # of seed 0: shared between sets of unlike seeds
    features[-(num // 8) :] = features[: num // 8]  # within the set, less than k each
    return features


def reference(real: Array, fake: Array, k: int) -> Manifold:
    return Manifold(**{name: float(value) for name, value in compute_prdc(real, fake, k).items()})


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("make", [normal, clustered, on_a_grid, with_copies])
@pytest.mark.parametrize(("num_real", "num_fake", "dim"), [(400, 300, 4), (250, 420, 48)])
def test_all_four_are_exactly_those_of_prdc(make, num_real: int, num_fake: int, dim: int, k: int) -> None:  # type: ignore[no-untyped-def]
    real, fake = make(num_real, dim, 1), make(num_fake, dim, 2)
    values = manifold_metrics(real, fake, k, block=128)
    assert values == reference(real, fake, k)
    assert values.density > 0  # sets that share nothing would make the comparison empty


def test_a_point_at_the_radius_is_outside() -> None:
    real = np.array([[0.0], [1.0], [2.0]], dtype=np.float32)  # with k = 1 all radii are 1
    at_the_radius = np.array([[-1.0], [3.0], [13.0]], dtype=np.float32)
    values = manifold_metrics(real, at_the_radius, 1)
    assert (values.precision, values.density, values.coverage) == (0, 0, 0)
    assert manifold_metrics(real, np.nextafter(at_the_radius, np.float32(1)), 1).precision == pytest.approx(2 / 3)


def test_more_than_k_copies_make_balls_that_hold_nothing_whatever_the_rounding() -> None:
    # |x|^2 + |y|^2 - 2xy of copies is noise, on which an open ball of radius 0 would decide at random.
    collapsed = np.repeat(normal(1, 1000, 0, scale=7.3), 20, axis=0)
    assert manifold_metrics(collapsed, collapsed.copy(), 3) == Manifold(0, 0, 0, 0)


@pytest.mark.parametrize("make", [normal, clustered])
def test_identical_sets_share_everything(make) -> None:  # type: ignore[no-untyped-def]
    real = make(300, 16, 0)
    values = manifold_metrics(real, real.copy())
    assert (values.precision, values.recall, values.coverage) == (1, 1, 1)


def test_sets_far_apart_share_nothing() -> None:
    assert manifold_metrics(normal(300, 16, 0), normal(300, 16, 1) + 100) == Manifold(0, 0, 0, 0)


def test_a_dropped_mode_lowers_recall_and_coverage_but_not_precision() -> None:
    near, far = normal(200, 8, 0), normal(200, 8, 1) + 50
    values = manifold_metrics(np.concatenate((near, far)), normal(400, 8, 2))
    assert values.precision > 0.9
    assert 0.4 < values.recall <= 0.5 and 0.4 < values.coverage <= 0.5


@pytest.mark.parametrize("block", [1, 7, 64, 300, 10_000])
def test_the_block_size_changes_nothing(block: int) -> None:
    real, fake = clustered(300, 6, 1), clustered(257, 6, 2)
    assert manifold_metrics(real[:80], fake[:70], 3, block=block) == reference(real[:80], fake[:70], 3)
    if block > 1:
        assert manifold_metrics(real, fake, 3, block=block) == reference(real, fake, 3)


def test_the_order_of_the_images_changes_nothing() -> None:
    real, fake = clustered(300, 6, 1), clustered(257, 6, 2)
    rng = np.random.default_rng(0)
    assert manifold_metrics(real, fake) == manifold_metrics(rng.permutation(real), rng.permutation(fake))


def test_tensors_and_read_only_files_give_the_same(tmp_path: Path) -> None:
    real, fake = clustered(300, 6, 1), clustered(257, 6, 2)
    np.save(tmp_path / "fake.npy", fake)
    mapped = np.load(tmp_path / "fake.npy", mmap_mode="r")
    assert manifold_metrics(torch.from_numpy(real), mapped, block=100) == reference(real, fake, 5)


def test_the_fewest_images_that_have_k_neighbours_are_enough() -> None:
    real, fake = normal(6, 3, 0), normal(6, 3, 1)
    assert manifold_metrics(real, real.copy(), 5).precision == 1
    message = r"^5 generated images are too few for num_neighbors = 5; at least 6 are needed: .*lower num_neighbors$"
    with pytest.raises(UserError, match=message):
        manifold_metrics(real, fake[:5], 5)


@pytest.mark.parametrize(
    ("real", "k", "block", "message"),
    [
        (normal(9, 3, 0), 0, 8, "num_neighbors is 0; it must be at least 1"),
        (normal(9, 3, 0), 1, 0, "block is 0; it must be at least 1"),
        (normal(9, 4, 0), 1, 8, "features have unlike dimensions: real 4, generated 3"),
        (normal(9, 3, 0)[0], 1, 8, r"real has shape \(3,\); \(N, D\) is due"),
        (normal(0, 3, 0), 1, 8, r"real has shape \(0, 3\); \(N, D\) is due"),
        (np.full((9, 3), np.nan, dtype=np.float32), 1, 8, "real holds NaN or infinite values"),
    ],
)
def test_features_that_mean_nothing_are_refused(real: Array, k: int, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manifold_metrics(real, normal(9, 3, 1), k, block=block)


# The high-water mark of the process itself: ru_maxrss would start at that of the process that started it.
MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from cedm_ray.metrics.manifold import manifold_metrics

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

num, block = map(int, sys.argv[1:])
real, fake = (np.random.default_rng(i).standard_normal((num, 8), dtype=np.float32) for i in range(2))
manifold_metrics(real[:1024], fake[:1024], block=512)  # what one block takes
before = peak_kib()
manifold_metrics(real, fake, block=block)
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_memory_grows_with_the_images_and_not_with_their_pairs() -> None:
    def grown_mb(num: int, block: int) -> float:
        command = [sys.executable, "-c", MEASURE, str(num), str(block)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024 / 1e6

    few, many = grown_mb(4000, 512), grown_mb(8000, 512)
    assert few < 20 and many - few < 20, (few, many)  # the pairs would add 48 MB as booleans, 192 MB as float32
    assert grown_mb(3000, 3000) > 100  # all pairs at once, which the measurement must see


@pytest.mark.gpu
def test_a_gpu_gives_the_same_values() -> None:
    real, fake = clustered(3000, 64, 1), clustered(2500, 64, 2)
    assert manifold_metrics(real, fake, device="cuda") == manifold_metrics(real, fake)
