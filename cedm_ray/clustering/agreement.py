"""How far a clustering agrees with labels: a report for people, which the search never looks at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.clustering.quality import Assignments, integer_array, kl_from_uniform, num_used
from cedm_ray.clustering.types import Clustering


def anmi(labels: Assignments, assignments: Assignments) -> float:
    """Mutual information of labels and clusters, adjusted for chance, over the arithmetic mean of their entropies.

    Args:
        labels: Class of each image, shape ``(N,)``, integers from 0.
        assignments: Cluster of each image, shape ``(N,)``, integers from 0.

    Returns:
        The adjusted mutual information: 1 where clusters are classes under other names, about 0 for a random
        grouping, of which half lie below 0.

    Raises:
        ValueError: If the two are not integers of one shape ``(N,)``, are empty, or hold a negative number.

    Source: Vinh, Epps and Bailey, JMLR 11, 2010; called ANMI in arXiv 2403.00570.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(*_pair(labels, assignments), average_method="arithmetic"))


def hungarian_accuracy(labels: Assignments, assignments: Assignments) -> float:
    """Share of the images whose cluster is matched with their class, under the best one-to-one matching.

    Each cluster is matched with at most one class and each class with at most one cluster. So with more clusters than
    classes the images of the clusters left over all count as wrong, and with fewer those of the classes left over: with
    C equal clusters in K equal classes the accuracy is at most ``min(C, K) / max(C, K)``.

    Args:
        labels: Class of each image, shape ``(N,)``, integers from 0.
        assignments: Cluster of each image, shape ``(N,)``, integers from 0.

    Returns:
        The accuracy in ``(0, 1]``.

    Raises:
        ValueError: If the two are not integers of one shape ``(N,)``, are empty, or hold a negative number.

    Source: Kuhn, Naval Research Logistics Quarterly 2, 1955 (the matching).
    """
    from scipy.optimize import linear_sum_assignment

    joint = _joint(*_pair(labels, assignments))
    return float(joint[linear_sum_assignment(joint, maximize=True)].sum() / joint.sum())


@dataclass(frozen=True)
class ClusteringQuality:
    """How a clustering uses its clusters and, where there are labels, how far it agrees with them."""

    num_used: int
    """Clusters that hold at least one image, C_u."""
    utilization_ratio: float
    """Share of the available clusters that are used, r_C in ``(0, 1]``."""
    kl_from_uniform: float
    """Divergence of q(c) from uniform, in nats."""
    anmi: float | None
    """Adjusted mutual information with the labels; None without labels."""
    accuracy: float | None
    """Accuracy under the best one-to-one matching of clusters and classes; None without labels."""

    def metrics(self) -> dict[str, float]:
        """The figures by name, without those that need labels where there are none."""
        values = {
            "num_used": self.num_used,
            "utilization_ratio": self.utilization_ratio,
            "kl_from_uniform": self.kl_from_uniform,
            "anmi": self.anmi,
            "accuracy": self.accuracy,
        }
        return {name: float(value) for name, value in values.items() if value is not None}


def clustering_quality(clustering: Clustering, labels: NDArray[np.integer[Any]] | None) -> ClusteringQuality:
    """Score a clustering.

    Args:
        clustering: The clustering of N images.
        labels: Class of each image, shape ``(N,)``, integers from 0; None where the dataset has no labels.

    Returns:
        The figures.

    Raises:
        ValueError: If the labels are not integers of shape ``(N,)`` or hold a negative number.
    """
    return ClusteringQuality(
        num_used=num_used(clustering.assignments, clustering.num_clusters),
        utilization_ratio=clustering.utilization_ratio,
        kl_from_uniform=kl_from_uniform(clustering.cluster_probs),
        anmi=None if labels is None else anmi(labels, clustering.assignments),
        accuracy=None if labels is None else hungarian_accuracy(labels, clustering.assignments),
    )


def _pair(labels: Assignments, assignments: Assignments) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = _checked(labels, "labels"), _checked(assignments, "assignments")
    if len(first) != len(second):
        raise ValueError(f"there are {len(first)} labels and {len(second)} assignments; each image needs one of each")
    return first, second


def _checked(values: Assignments, name: str) -> NDArray[Any]:
    array = integer_array(values, name)
    if array.min() < 0:
        raise ValueError(f"{name} hold {array.min()}; they must be at least 0: leave out images without a label")
    return array


def _joint(labels: NDArray[Any], assignments: NDArray[Any]) -> NDArray[np.int64]:
    """Images of each class in each cluster, classes and clusters without images left out."""
    classes, rows = np.unique(labels, return_inverse=True)
    clusters, columns = np.unique(assignments, return_inverse=True)
    cells = np.bincount(rows * len(clusters) + columns, minlength=len(classes) * len(clusters))
    return cells.reshape(len(classes), len(clusters))
