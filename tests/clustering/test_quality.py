from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, rankdata
from sklearn.metrics.cluster import contingency_matrix

from cedm_ray.clustering.labels import from_labels
from cedm_ray.clustering.quality import cluster_probs, kl_from_uniform, num_used, utilization_ratio
from cedm_ray.clustering.types import make_clustering


def test_utilization_of_known_assignments() -> None:
    assert utilization_ratio(torch.tensor([0, 0, 3]), 4) == 0.5
    assert utilization_ratio(np.array([2], np.uint16), 3) == pytest.approx(1 / 3)
    assert num_used(np.arange(7), 7) == 7


def test_counts_agree_with_sklearn_and_scipy() -> None:
    assignments = np.random.default_rng(0).choice(50, p=np.arange(50) / 1225, size=300)
    sizes = contingency_matrix(assignments, np.zeros(300))[:, 0]
    probs = cluster_probs(assignments, 60)
    np.testing.assert_allclose(probs[probs > 0], sizes / 300, rtol=1e-15)
    assert num_used(assignments, 60) == int(rankdata(assignments, method="dense").max())
    assert probs.dtype == np.float64 and probs.shape == (60,) and probs.sum() == pytest.approx(1, abs=1e-12)


def test_utilization_does_not_depend_on_order_or_names() -> None:
    rng = np.random.default_rng(1)
    assignments = rng.integers(0, 90, size=100)
    renamed = rng.permutation(90)[rng.permutation(assignments)]
    assert utilization_ratio(assignments, 90) == utilization_ratio(renamed, 90)


@pytest.mark.parametrize(
    ("assignments", "num_clusters", "message"),
    [
        (np.array([0, 4]), 4, r"from 0 to 4; they must lie in \[0, 4\)"),
        (np.array([-1, 2]), 4, r"from -1 to 2"),
        (np.array([], np.int64), 4, "empty"),
        (np.array([0]), 0, "num_clusters is 0; it must be at least 1"),
        (np.array([0.0, 1.0]), 4, "float64"),
        (np.array([[0, 1]]), 4, r"are \(1, 2\) int64"),
    ],
)
def test_bad_assignments_are_refused(assignments: np.ndarray, num_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        utilization_ratio(assignments, num_clusters)


def test_labels_become_a_clustering_without_heads() -> None:
    clustering = from_labels(torch.tensor([1, 1, 0, 3]), 4)
    assert clustering.utilization_ratio == 0.75
    np.testing.assert_array_equal(clustering.cluster_probs, [0.25, 0.5, 0, 0.25])
    assert clustering.best_head is None and clustering.head_losses.size == 0 and (clustering.max_prob == 1).all()
    assert from_labels(np.array([1, 0], np.uint8), 2).assignments.dtype == np.int64


@pytest.mark.parametrize("num_clusters", [1, 2, 17, 400])
def test_the_divergence_from_uniform_agrees_with_scipy(num_clusters: int) -> None:
    counts = np.random.default_rng(num_clusters).integers(0, 5, size=num_clusters) + (np.arange(num_clusters) == 0)
    probs = counts / counts.sum()
    expected = entropy(probs, np.full(num_clusters, 1 / num_clusters))
    assert kl_from_uniform(probs) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert kl_from_uniform(probs.astype(np.float32)) == pytest.approx(expected, abs=1e-6)


def test_the_divergence_is_zero_for_equal_clusters_and_log_c_for_a_single_one() -> None:
    assert 0 <= kl_from_uniform(np.full(7, 1 / 7)) < 1e-15
    assert kl_from_uniform(np.eye(50)[3]) == pytest.approx(np.log(50), rel=1e-15)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ([0.5, 0.6], "sum to 1.1; they must sum to 1"),
        ([1.5, -0.5], r"outside \[0, 1\]"),
        ([0.5, np.nan], r"outside \[0, 1\]"),
        ([[0.5, 0.5]], r"shape \(1, 2\); they must be \(C,\)"),
        ([], r"shape \(0,\)"),
    ],
)
def test_shares_that_are_no_distribution_are_refused(probs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_from_uniform(np.array(probs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_prob": np.ones(3, np.float32)}, "max_prob has 3 values for 4 assignments"),
        ({"max_prob": np.array([1, 1, 0, 1], np.float32)}, r"max_prob holds a value outside \(0, 1\]"),
        ({"max_prob": np.array([1, 1, np.nan, 1], np.float32)}, r"max_prob holds a value outside \(0, 1\]"),
        ({"head_losses": np.ones(2, np.float32)}, "best_head is None, but there are head losses"),
        ({"head_losses": np.ones(2, np.float32), "best_head": 2}, r"best_head is 2; it must lie in \[0, 2\)"),
        ({"best_head": 0}, r"best_head is 0; it must lie in \[0, 0\)"),
    ],
)
def test_a_clustering_that_contradicts_itself_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clustering(np.array([0, 1, 1, 2]), 3, **changed)
