"""Groups that were given, not learned: the classes of a labelled dataset."""

from cedm_ray.clustering.quality import Assignments, as_array
from cedm_ray.clustering.types import Clustering, make_clustering


def from_labels(labels: Assignments, num_classes: int) -> Clustering:
    """Take labels as the clusters.

    Args:
        labels: Class of each image, shape ``(N,)``, integers in ``[0, num_classes)``.
        num_classes: Number of classes, C.

    Returns:
        A clustering without head losses, whose ``max_prob`` is 1.

    Raises:
        ValueError: If there is no label or a label lies outside ``[0, num_classes)``.
    """
    return make_clustering(as_array(labels), num_classes)
