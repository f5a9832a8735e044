import pytest
import torch

from cedm_ray.metrics.detectors import FunctionDetector, features_and_logits, metric_name


@pytest.mark.parametrize(
    ("detector", "metric"),
    [
        ("inception", "fid"),
        ("dinov2", "fdd"),
        ("lenet", "fd_lenet"),
        ("Inception", "fd_inception"),
        ("inception_v4", "fd_inception_v4"),
        ("vit_base_patch16_224.dino", "fd_vit_base_patch16_224_dino"),
        ("open clip/ViT-B", "fd_open_clip_vit_b"),
        ("fid", "fd_fid"),
    ],
)
def test_only_the_published_detectors_give_the_published_names(detector: str, metric: str) -> None:
    assert metric_name(detector) == metric


@pytest.mark.parametrize("name", ["", "--", "模型"])
def test_a_name_without_letters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must hold a letter"):
        metric_name(name)


def test_a_function_becomes_a_detector() -> None:
    detector = FunctionDetector("mean", 3, lambda x: x.double().mean((2, 3)), resize="none", weights_hash="0")
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    features = detector(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0], torch.tensor([7.5, 23.5, 39.5]))


def test_wrong_images_and_wrong_features_are_refused() -> None:
    detector = FunctionDetector("flat", 5, lambda x: x.flatten(1).float(), resize="none", weights_hash="0")
    with pytest.raises(ValueError, match="uint8"):
        detector(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"flat gave features \(2, 64\); \(2, 5\) is due"):
        detector(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_a_detector_without_dimensions_or_with_a_name_that_makes_no_metric_is_refused() -> None:
    for name, dim, said in (("flat", 0, "dim is 0; it must be at least 1"), ("--", 5, "must hold a letter")):
        with pytest.raises(ValueError, match=said):
            FunctionDetector(name, dim, lambda x: x, resize="none", weights_hash="0")


def test_class_scores_come_with_the_features_where_the_detector_has_them() -> None:
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    plain = FunctionDetector("flat", 4, lambda x: x.flatten(1).float(), resize="none", weights_hash="0")
    features, logits = features_and_logits(plain, images)
    assert features.shape == (2, 4) and logits is None

    class Classifier(FunctionDetector):
        def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self(images) + 1, torch.full((2, 10), 7.0)

    found = Classifier("flat", 4, lambda x: x.flatten(1).float(), resize="none", weights_hash="0")
    features, logits = features_and_logits(found, images)
    assert torch.equal(features, torch.ones(2, 4))
    assert logits is not None and torch.equal(logits, torch.full((2, 10), 7.0))
