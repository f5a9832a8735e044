import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cedm_ray.clustering.agreement import anmi, clustering_quality, hungarian_accuracy
from cedm_ray.clustering.types import make_clustering

Ints = NDArray[np.int64]


def noisy_grouping(num_images: int, num_classes: int, num_clusters: int, seed: int = 0) -> tuple[Ints, Ints]:
    """Labels, and a grouping that agrees with them for six in ten images."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) * num_classes // num_images
    per_class = max(1, num_clusters // num_classes)
    agreeing = (labels * per_class + rng.integers(0, per_class, num_images)) % num_clusters
    return labels, np.where(rng.random(num_images) < 0.6, agreeing, rng.integers(0, num_clusters, num_images))


@pytest.mark.parametrize("num_clusters", [10, 100, 1000])
def test_labels_and_assignments_may_change_places(num_clusters: int) -> None:
    labels, assignments = noisy_grouping(50_000, 100, num_clusters)
    for score in (anmi, hungarian_accuracy):
        assert score(assignments, labels) == pytest.approx(score(labels, assignments), abs=1e-12)


def entropy_of(values: list[object]) -> float:
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


def mutual_information(first: list[int], second: list[int]) -> float:
    return entropy_of(list(first)) + entropy_of(list(second)) - entropy_of(list(zip(first, second, strict=True)))


@pytest.mark.parametrize("assignments", [[0, 0, 1, 1, 2, 2, 2], [0, 1, 0, 1, 1, 1, 1], [3, 2, 2, 1, 1, 0, 3]])
def test_chance_is_the_mean_over_every_order_of_the_images(assignments: list[int]) -> None:
    labels = [0, 0, 0, 1, 1, 1, 2]
    orders = list(itertools.permutations(labels))
    by_chance = sum(mutual_information(list(order), assignments) for order in orders) / len(orders)
    most = (entropy_of(list(labels)) + entropy_of(list(assignments))) / 2
    expected = (mutual_information(labels, assignments) - by_chance) / (most - by_chance)
    assert anmi(np.array(labels), np.array(assignments)) == pytest.approx(expected, abs=1e-12)


def test_names_do_not_matter_and_chance_scores_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 12, size=5000)
    assert anmi(labels, (rng.permutation(12) + 40)[labels]) == pytest.approx(1, abs=1e-12)
    assert abs(anmi(labels, rng.integers(0, 12, size=5000))) < 0.01
    assert hungarian_accuracy(labels, (rng.permutation(12) + 40)[labels]) == 1


@pytest.mark.parametrize("num_clusters", [3, 5, 7])
def test_the_accuracy_is_that_of_the_best_of_all_matchings(num_clusters: int) -> None:
    labels, assignments = noisy_grouping(60, 5, num_clusters, seed=num_clusters)
    spare = max(num_clusters, 5)  # classes beyond the fifth do not exist: a cluster matched with one counts as wrong
    best = max(np.mean(np.array(names)[assignments] == labels) for names in itertools.permutations(range(spare)))
    assert hungarian_accuracy(labels, assignments) == pytest.approx(best, rel=1e-15)


def test_a_cluster_counts_for_one_class_and_a_class_for_one_cluster() -> None:
    images = np.arange(1200)
    assert hungarian_accuracy(images % 4, images % 12) == pytest.approx(4 / 12)
    assert hungarian_accuracy(images % 12, images % 4) == pytest.approx(4 / 12)
    assert hungarian_accuracy(images % 12, np.zeros_like(images)) == pytest.approx(1 / 12)


def test_tensors_and_small_integers_score_as_arrays_do() -> None:
    labels, assignments = noisy_grouping(300, 5, 9)
    for score in (anmi, hungarian_accuracy):
        assert score(torch.from_numpy(labels), assignments.astype(np.uint16)) == score(labels, assignments)


def test_a_clustering_is_described_with_labels_and_without() -> None:
    labels, assignments = noisy_grouping(400, 4, 8)
    clustering = make_clustering(np.where(assignments == 7, 6, assignments), 8)
    bare = clustering_quality(clustering, None)
    assert bare.anmi is None and bare.accuracy is None
    assert set(bare.metrics()) == {"num_used", "utilization_ratio", "kl_from_uniform"}
    full = clustering_quality(clustering, labels)
    assert full.metrics() == bare.metrics() | {
        "anmi": anmi(labels, clustering.assignments),
        "accuracy": hungarian_accuracy(labels, clustering.assignments),
    }
    assert full.num_used == 7 and full.utilization_ratio == 7 / 8 and 0 < full.kl_from_uniform < math.log(8)
    assert all(type(value) is float for value in full.metrics().values())


@pytest.mark.parametrize(
    ("labels", "assignments", "message"),
    [
        ([0, 1], [0, 1, 1], "there are 2 labels and 3 assignments"),
        ([0, -1], [0, 1], "labels hold -1; they must be at least 0"),
        ([0, 1], [-3, 1], "assignments hold -3"),
        ([0.0, 1.0], [0, 1], r"labels are \(2,\) float64"),
        ([[0, 1]], [0, 1], r"labels are \(1, 2\) int64; they must be \(N,\)"),
        ([], [], "labels are"),
        ([0, 1], np.empty(0, np.int64), "assignments are empty"),
    ],
)
def test_labels_and_assignments_that_do_not_fit_are_refused(labels: object, assignments: object, message: str) -> None:
    for score in (anmi, hungarian_accuracy):
        with pytest.raises(ValueError, match=message):
            score(np.array(labels), np.array(assignments))
    if len(np.shape(assignments)) == 1 and np.size(assignments) and np.min(assignments) >= 0:
        with pytest.raises(ValueError, match=message):
            clustering_quality(make_clustering(np.array(assignments), 3), np.array(labels))
