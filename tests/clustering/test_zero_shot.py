import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from cedm_ray.clustering.zero_shot import class_vectors, zero_shot_assignments


def features(seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 9, size=(*shape[:-1], 1))).astype(np.float32)


def test_class_vectors_agree_with_sklearn() -> None:
    texts = features(0, 6, 5, 16)
    expected = [normalize(normalize(prompts.astype(np.float64)).mean(axis=0, keepdims=True))[0] for prompts in texts]
    np.testing.assert_allclose(class_vectors(texts), expected, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(class_vectors(texts), axis=1), 1, rtol=1e-12)


def test_long_prompts_count_no_more_than_short_ones() -> None:
    texts = np.array([[[3.0, 0.0], [0.0, 0.01]]])
    np.testing.assert_allclose(class_vectors(texts), [[math.sqrt(0.5), math.sqrt(0.5)]], rtol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 8192])
def test_assignments_and_probabilities_agree_with_sklearn_and_scipy(block: int) -> None:
    images, texts = features(1, 40, 16), features(2, 9, 3, 16)
    images.flags.writeable = False
    cosines = cosine_similarity(images.astype(np.float64), class_vectors(texts))
    found = zero_shot_assignments(images, texts, logit_scale=20, block=block)
    np.testing.assert_array_equal(found.assignments, cosines.argmax(axis=1))
    np.testing.assert_allclose(found.max_prob, softmax(20 * cosines, axis=1).max(axis=1), rtol=1e-6)
    assert found.num_clusters == 9 and found.best_head is None and found.head_losses.size == 0


def test_two_classes_at_right_angles_give_a_sigmoid() -> None:
    angle = math.pi / 4 - 0.01
    image = np.array([[math.cos(angle), math.sin(angle)]], np.float64)
    found = zero_shot_assignments(image, np.eye(2)[:, None])  # at the scale of 100
    expected = 1 / (1 + math.exp(-100 * (math.cos(angle) - math.sin(angle))))
    assert found.assignments[0] == 0 and found.max_prob[0] == pytest.approx(expected, rel=1e-6)


def test_a_class_that_no_image_is_like_stays_empty() -> None:
    found = zero_shot_assignments(np.eye(3, dtype=np.float16)[:2], np.eye(3, dtype=np.float16)[:, None])
    np.testing.assert_array_equal(found.assignments, [0, 1])
    assert found.num_clusters == 3 and found.utilization_ratio == pytest.approx(2 / 3)


def test_of_equally_similar_classes_the_first_is_taken() -> None:
    found = zero_shot_assignments(np.ones((2, 2)), np.eye(2)[:, None])
    np.testing.assert_array_equal(found.assignments, [0, 0])
    np.testing.assert_allclose(found.max_prob, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.ones((4, 5))}, r"image_features have shape \(4, 5\); \(N, 3\)"),
        ({"images": np.ones((0, 3))}, r"shape \(0, 3\)"),
        ({"images": np.ones(3)}, r"shape \(3,\)"),
        ({"images": np.array([[1.0, np.nan, 0]])}, "image_features hold NaN"),
        ({"images": np.zeros((1, 3))}, "image_features hold a vector of length 0"),
        ({"texts": np.ones((2, 3))}, r"text_features have shape \(2, 3\); \(C, P, D\)"),
        ({"texts": np.ones((2, 0, 3))}, r"shape \(2, 0, 3\)"),
        ({"texts": np.full((2, 1, 3), np.inf)}, "text_features hold NaN or infinity"),
        (
            {"texts": np.array([[[1.0, 0, 0], [-1, 0, 0]]])},
            "the mean text_features of a class hold a vector of length 0",
        ),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be above 0"),
        ({"block": 0}, "block is 0; it must be at least 1"),
    ],
)
def test_features_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    given = {"images": np.ones((4, 3)), "texts": np.ones((2, 1, 3)), "logit_scale": 100.0, "block": 8} | change
    with pytest.raises(ValueError, match=message):
        zero_shot_assignments(given["images"], given["texts"], logit_scale=given["logit_scale"], block=given["block"])  # type: ignore[arg-type]
