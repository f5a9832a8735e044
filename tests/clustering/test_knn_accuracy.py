from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from cedm_ray.clustering import knn_accuracy as module
from cedm_ray.clustering.knn_accuracy import knn_accuracy


def features_and_labels(num_images: int, num_classes: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, size=num_images)
    return 0.6 * rng.standard_normal((num_classes, 8))[labels] + rng.standard_normal((num_images, 8)), labels


def nearest_others(features: NDArray[np.float64], k: int) -> NDArray[np.int32]:
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1)[:, :k].astype(np.int32)


@pytest.mark.parametrize("k", [1, 5, 21])
def test_two_classes_and_odd_k_agree_with_sklearn_leaving_one_out(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)  # several blocks, the last one incomplete
    features, labels = features_and_labels(150, 2, seed=k)  # two classes and an odd k: no ties
    right = 0
    for image in range(150):
        others = np.arange(150) != image
        classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(features[others], labels[others])
        right += int(classifier.predict(features[image : image + 1])[0] == labels[image])
    assert 0.5 < right / 150 < 1
    assert knn_accuracy(nearest_others(features, 25), labels, k) == right / 150


def test_many_classes_with_ties_agree_with_counting_one_by_one() -> None:
    features, labels = features_and_labels(500, 12, seed=3)
    neighbors = nearest_others(features, 30)
    # Counter lists equal counts in the order in which they were first met.
    guesses = [Counter(labels[row[:20]].tolist()).most_common(1)[0][0] for row in neighbors]
    assert knn_accuracy(neighbors, labels) == np.mean(np.array(guesses) == labels)


def test_of_equally_frequent_labels_the_nearest_is_taken() -> None:
    labels = np.array([5, 7, 7, 5, 9])
    neighbors = np.array([[3, 1, 2, 4], [0, 3, 2, 4], [0, 1, 3, 4], [1, 0, 2, 4], [1, 0, 3, 2]], np.int32)
    # Image 0 meets 5 7 7 9, image 1 5 5 7 9, image 2 5 7 5 9, image 3 7 5 7 9, image 4 7 5 5 7.
    assert knn_accuracy(neighbors, labels, k=4) == 0
    assert knn_accuracy(neighbors, labels, k=2) == pytest.approx(1 / 5)  # image 0: 5 before 7
    assert knn_accuracy(neighbors, labels.astype(np.uint8), k=2) == pytest.approx(1 / 5)


def test_one_vote_is_one_neighbour() -> None:
    labels = np.array([0, 0, 1])
    assert knn_accuracy(np.array([[1, 2], [0, 2], [1, 0]]), labels, k=1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("neighbors", "labels", "k", "message"),
    [
        ([[1], [0]], [0, 1], 2, r"k is 2; it must lie in \[1, 1\]"),
        ([[1], [0]], [0, 1], 0, "k is 0"),
        ([[1], [2]], [0, 1], 1, r"reach from 1 to 2; they must lie in \[0, 2\)"),
        ([[-1], [0]], [0, 1], 1, "reach from -1"),
        ([[1], [1]], [0, 1], 1, "image 1 is among its own neighbors"),
        ([[1], [0], [0]], [0, 1], 1, r"neighbors are \(3, 1\) int64; \(2, K\)"),
        ([[1.0], [0.0]], [0, 1], 1, "float64"),
        ([[1], [0]], [0.0, 1.0], 1, r"labels are \(2,\) float64"),
        ([[1], [0]], [[0, 1]], 1, r"labels are \(1, 2\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(neighbors: object, labels: object, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_accuracy(np.array(neighbors), np.array(labels), k)
