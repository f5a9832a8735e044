from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from cedm_ray.errors import UserError
from cedm_ray.metrics.detectors import Detector
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.lenet import LeNet, load_lenet, save_lenet, train_lenet

Data = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def data() -> Data:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(bunch.target).long()[order]


@pytest.fixture(scope="module")
def model(data: Data) -> LeNet:
    """Trained without the last 360 images."""
    return train_lenet(data[0][:-360], data[1][:-360], 10, seed=0)


def score(detector: Detector, real: Tensor, fake: Tensor) -> float:
    stats: list[Tensor] = []
    for images in (real, fake):
        sums = FeatureSums(detector.dim)
        for block in images.split(500):
            sums.update(detector(block))
        stats.extend(sums.mean_cov())
    return frechet_distance(*stats)


def test_held_out_digits_are_told_apart(model: LeNet, data: Data) -> None:
    right = model.logits(data[0][-360:]).argmax(1) == data[1][-360:]
    assert right.float().mean() >= 0.97


def test_training_features_are_standardised(model: LeNet, data: Data) -> None:
    features = model(data[0][:-360])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(64), atol=1e-4, rtol=0)


def test_features_do_not_depend_on_the_batch(model: LeNet, data: Data) -> None:
    one_by_one = torch.cat([model(image[None]) for image in data[0][:20]])
    torch.testing.assert_close(one_by_one, model(data[0][:20]), atol=1e-4, rtol=1e-4)


def test_noise_raises_the_score_step_by_step(model: LeNet, data: Data) -> None:
    real, generator = data[0], torch.Generator().manual_seed(0)
    noise = torch.randn(real.shape, generator=generator)
    scores = [
        score(model, real, (real + sd * noise).round().clamp(0, 255).to(torch.uint8)) for sd in (0, 4, 8, 16, 32, 64)
    ]
    assert scores[0] < 1e-9
    assert all(b > 2 * a for a, b in pairwise(scores[1:]))


def test_blur_raises_the_score_step_by_step(model: LeNet, data: Data) -> None:
    real = data[0].float()
    blurred = F.avg_pool2d(real, 3, 1, 1)
    scores = [score(model, data[0], (real + a * (blurred - real)).round().to(torch.uint8)) for a in (0.05, 0.1, 0.3, 1)]
    assert all(b > 2 * a for a, b in pairwise(scores))


def test_a_missing_digit_weighs_more_than_chance(model: LeNet, data: Data) -> None:
    images, labels = data
    generator = torch.Generator().manual_seed(1)
    by_chance = [
        score(model, images, images[torch.randperm(len(images), generator=generator)[:1617]]) for _ in range(5)
    ]
    missing = [score(model, images, images[labels != k]) for k in range(10)]
    assert min(missing) > 5 * max(by_chance)


def test_collapse_to_class_means_scores_far_worse_than_half_of_the_images(model: LeNet, data: Data) -> None:
    images, labels = data
    means = torch.stack([images[labels == k].float().mean(0) for k in range(10)])[labels].round().to(torch.uint8)
    assert score(model, images, means) > 10 * score(model, images[:898], images[898:])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(data: Data) -> None:
    images, labels = data[0][:200], data[1][:200]
    state = torch.get_rng_state()
    hashes = [train_lenet(images, labels, 10, seed=seed, epochs=2).weights_hash for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    assert hashes[0] == hashes[1] != hashes[2]


def test_it_comes_back_from_its_file(model: LeNet, data: Data, tmp_path: Path) -> None:
    save_lenet(model, tmp_path / "lenet.safetensors")
    back = load_lenet(tmp_path / "lenet.safetensors")
    assert back.weights_hash == model.weights_hash
    assert torch.equal(back(data[0][:50]), model(data[0][:50]))
    (tmp_path / "lenet.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="holds no LeNet"):
        load_lenet(tmp_path / "lenet.safetensors")


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 12), (1, 28)])
def test_any_small_resolution_and_channels_work(channels: int, side: int) -> None:
    images = torch.randint(0, 256, (40, channels, side, side), dtype=torch.uint8)
    model = train_lenet(images, torch.arange(40) % 2, 2, epochs=1)
    assert model(images).shape == (40, 64)
    assert model(images).isfinite().all()


def test_wrong_images_and_labels_are_refused(model: LeNet, data: Data) -> None:
    with pytest.raises(ValueError, match="uint8"):
        model(data[0].float())
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        model(data[0].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="are due"):
        train_lenet(data[0], data[1], 9)
