from pathlib import Path

import numpy as np
import pytest
import torch

from cedm_ray.data.digits import digits
from cedm_ray.data.pack import pack
from cedm_ray.data.sources import ArraySource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.lenet import load_lenet
from cedm_ray.stages.inputs import detectors, features
from cedm_ray.stages.inputs.detectors import lenet_spec
from cedm_ray.stages.inputs.features import FeatureParts
from cedm_ray.stages.storage.store import Store

CPU = torch.device("cpu")
NUM_IMAGES = 500


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "images"
    for _ in pack(FirstImages(digits(), NUM_IMAGES), folder):
        pass
    return folder


@pytest.fixture(scope="module")
def store(images: Path) -> Store:
    return Store(images.parent / "store")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 120)


def make(parts: FeatureParts) -> list[int]:
    done: list[int] = []
    for bounds in parts.missing():
        parts.make(bounds, parts.spec.load(CPU), CPU, done.append)
    return done


@pytest.mark.usefixtures("small_parts")
def test_parts_together_are_what_one_pass_gives(images: Path, store: Store) -> None:
    parts = FeatureParts(images, lenet_spec(images, store), store)
    assert parts.bounds() == [(0, 120), (120, 240), (240, 360), (360, 480), (480, 500)]
    assert sum(make(parts)) == NUM_IMAGES
    pixels = torch.from_numpy(np.load(images / "images.npy"))
    assert parts.spec.weights is not None
    whole = load_lenet(parts.spec.weights)(pixels)
    assert np.allclose(parts.features(), whole.numpy(), rtol=0, atol=1e-5)
    sums = FeatureSums(whole.shape[1])
    sums.update(whole)
    mean, cov = sums.mean_cov()
    stats = parts.stats()
    assert torch.allclose(stats.mu, mean, atol=1e-6) and torch.allclose(stats.sigma, cov, atol=1e-5)
    assert (stats.facts.detector, stats.facts.count) == ("lenet", NUM_IMAGES)


@pytest.mark.usefixtures("small_parts")
def test_only_a_missing_or_torn_part_is_made_again(images: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    parts = FeatureParts(images, lenet_spec(images, store), store)
    make(parts)
    before = parts.features()
    torn = parts.path((120, 240)) / "features.npy"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert parts.missing() == [(120, 240)]
    assert sum(make(parts)) == 120 and np.array_equal(parts.features(), before)


def test_of_many_images_only_sums_are_kept_and_they_are_the_same(
    images: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = FeatureParts(images, lenet_spec(images, store), store)
    make(parts)
    kept = parts.stats()
    monkeypatch.setattr(features, "MAX_KEPT", 100)
    monkeypatch.setattr(features, "NUM_SUM_PARTS", 3)
    summed = FeatureParts(images, parts.spec, Store(tmp_path))
    make(summed)
    assert summed.bounds() == [(0, 167), (167, 334), (334, 500)]
    assert not list(tmp_path.rglob("*.npy")) and not summed.kept
    merged = summed.stats()
    assert float((merged.mu - kept.mu).abs().max()) < 1e-6
    assert float((merged.sigma - kept.sigma).abs().max()) < 1e-5
    assert merged.facts == kept.facts


def test_lenet_is_trained_once_and_needs_labels(
    images: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lenet_spec(images, store)
    assert first.weights is not None and first.weights_hash == load_lenet(first.weights).weights_hash
    with monkeypatch.context() as patched:
        patched.setattr(detectors, "train_lenet", lambda *_, **__: pytest.fail("it is trained again"))
        assert lenet_spec(images, store) == first
    nobody = ArraySource("plain", "1", digits().read(0, 20), None, None)
    for _ in pack(nobody, tmp_path / "images"):
        pass
    with pytest.raises(UserError, match="lenet is trained on labels, and these images have none"):
        lenet_spec(tmp_path / "images", store)


class Classifying:
    """A detector whose features are means of rows and whose class scores are means of columns."""

    name, dim, resize, weights_hash, has_classifier = "rows", 8, "none", "-", True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.features_and_logits(images)[0]

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float().mean((1, 3)), images.float().mean((1, 2))


def test_class_scores_are_kept_where_the_detector_has_a_classifier(images: Path, store: Store, tmp_path: Path) -> None:
    parts = FeatureParts(images, lenet_spec(images, store), Store(tmp_path))
    for bounds in parts.missing():
        parts.make(bounds, Classifying(), CPU, lambda _: None)
    pixels = np.load(images / "images.npy").astype(np.float32)
    logits = parts.logits()
    assert logits is not None and np.allclose(logits, pixels.mean((1, 2)), rtol=1e-6)
    assert np.allclose(parts.features(), pixels.mean((1, 3)), rtol=1e-6)
    plain = FeatureParts(images, parts.spec, store)
    make(plain)
    assert plain.logits() is None
