"""FID on real images with the real weights: some 21,000 passes of Inception-v3, about 40 minutes on two cores.

CEDM_RAY_DATA_DIR names the folder with cifar-10-batches-bin, CEDM_RAY_INCEPTION that with the two weight files, and
CEDM_RAY_CACHE_DIR one where features are kept for the next time.
"""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.inception import InceptionDetector, load_inception
from cedm_ray.metrics.kid import kid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

STATE_DICT, TORCHSCRIPT = "pt_inception-features.pth", "inception-2015-12-05-features.pt"
NUM_IMAGES, NUM_FEW = 5000, 2100  # of each split; few: just above the 2,048 dimensions
BATCH = 25

FeaturesOf = Callable[[str, Tensor], Tensor]


def folder_from(variable: str, *names: str) -> Path:
    folder = Path(os.environ.get(variable, ""))
    if variable not in os.environ or not all((folder / name).exists() for name in names):
        pytest.skip(f"set {variable} to a folder that holds {' and '.join(names)}")
    return folder


@pytest.fixture(scope="module")
def weights() -> Path:
    return folder_from("CEDM_RAY_INCEPTION", STATE_DICT, TORCHSCRIPT)


@pytest.fixture(scope="module")
def detector(weights: Path) -> InceptionDetector:
    return load_inception(weights / STATE_DICT, device="cpu")


def first_images(file: str) -> Tensor:
    path = folder_from("CEDM_RAY_DATA_DIR", "cifar-10-batches-bin") / "cifar-10-batches-bin" / file
    records = np.fromfile(path, np.uint8, count=NUM_IMAGES * 3073).reshape(NUM_IMAGES, 3073)
    return torch.from_numpy(records[:, 1:].reshape(NUM_IMAGES, 3, 32, 32).copy())


@pytest.fixture(scope="module")
def train() -> Tensor:
    return first_images("data_batch_1.bin")


@pytest.fixture(scope="module")
def test() -> Tensor:
    return first_images("test_batch.bin")


@pytest.fixture(scope="module")
def features_of(detector: InceptionDetector, tmp_path_factory: pytest.TempPathFactory) -> FeaturesOf:
    """Features of images under a name, from the cache where they are."""
    chosen = os.environ.get("CEDM_RAY_CACHE_DIR")
    cache = Path(chosen) if chosen else tmp_path_factory.mktemp("features")
    cache.mkdir(parents=True, exist_ok=True)

    def features(name: str, images: Tensor) -> Tensor:
        path = cache / f"{detector.weights_hash[:16]}-{name}.npy"
        if not path.is_file():
            partial = path.with_suffix(".partial.npy")
            np.save(partial, extracted(detector, images, BATCH).numpy())
            partial.replace(path)
        return torch.from_numpy(np.load(path, allow_pickle=False))

    return features


def extracted(detector: InceptionDetector, images: Tensor, batch: int) -> Tensor:
    return torch.cat([detector(block) for block in images.split(batch)])


def fid(real: Tensor, fake: Tensor) -> float:
    stats: list[Tensor] = []
    for features in (real, fake):
        sums = FeatureSums(2048)
        for block in features.split(500):
            sums.update(block)
        stats.extend(sums.mean_cov())
    return frechet_distance(*stats)


def test_train_against_test_gives_the_value_that_torch_fidelity_gives(
    features_of: FeaturesOf, train: Tensor, test: Tensor
) -> None:
    real, fake = features_of("train5000", train), features_of("test5000", test)
    value = fid(real, fake)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(real), fid_features_to_statistics(fake), False)
    print(f"\nFID train/test: {value:.7f}; torch-fidelity: {theirs['frechet_inception_distance']:.7f}")
    assert value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert value == pytest.approx(10.3194, abs=5e-4)


def test_both_weight_files_give_the_same_features(weights: Path, detector: InceptionDetector, test: Tensor) -> None:
    other = load_inception(weights / TORCHSCRIPT, device="cpu")
    assert other.name == detector.name == "inception"
    mine, theirs = extracted(detector, test[:64], 32), extracted(other, test[:64], 32)
    print(f"\nstate dict against TorchScript: {float((mine - theirs).abs().max()):.3g}")
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_batch_size_changes_neither_statistics_nor_fid(
    features_of: FeaturesOf, detector: InceptionDetector, train: Tensor, test: Tensor
) -> None:
    real, rest = features_of("train5000", train), features_of("test5000", test)[200:NUM_FEW]
    values, sums = [], []
    for batch in (32, 50):
        features = extracted(detector, test[:200], batch)
        values.append(fid(real, torch.cat([features, rest])))
        sums.append(FeatureSums(2048))
        sums[-1].update(features)
    print(f"\nFID by batches of 32 and 50: {values[0]:.9f} {values[1]:.9f}")
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for by_32, by_50 in zip(sums[0].tensors()[1:], sums[1].tensors()[1:], strict=True):
        assert float((by_32 - by_50).norm() / by_50.norm()) < 1e-6


def test_fid_and_kid_are_torch_fidelitys_from_the_image_files_on(
    features_of: FeaturesOf, weights: Path, train: Tensor, test: Tensor, tmp_path: Path
) -> None:
    for name, images in (("train", train), ("test", test)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images[:NUM_FEW].permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / name / f"{i:05}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "train"),
        input2=str(tmp_path / "test"),
        fid=True,
        kid=True,
        feature_extractor_weights_path=str(weights / STATE_DICT),
        batch_size=64,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    real, fake = features_of("train5000", train)[:NUM_FEW], features_of("test5000", test)[:NUM_FEW]
    distance, (mean, deviation) = fid(real, fake), kid(real, fake)
    print(f"\nours: FID {distance:.7f}, KID {mean:.9f} +- {deviation:.9f}; torch-fidelity: {theirs}")
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)


def test_more_noise_is_more_fid(features_of: FeaturesOf, train: Tensor, test: Tensor) -> None:
    real, few = features_of("train5000", train), test[:NUM_FEW]
    scores = [fid(real, features_of("test5000", test)[:NUM_FEW])]
    for deviation in (4, 16, 64):
        noise = torch.randn(few.shape, generator=torch.Generator().manual_seed(deviation))
        noisy = (few + deviation * noise).round().clamp(0, 255).to(torch.uint8)
        scores.append(fid(real, features_of(f"test{NUM_FEW}-noise{deviation}", noisy)))
    print("\nFID at noise 0, 4, 16, 64:", " ".join(f"{score:.4f}" for score in scores))
    assert all(more > 1.1 * less for less, more in pairwise(scores))
