"""The record that keeps a score comparable: a value together with the terms on which it was computed."""

from dataclasses import dataclass

from cedm_ray.errors import require


@dataclass(frozen=True)
class Score:
    """One value of one metric and what it depends on besides the images."""

    metric: str
    value: float
    """The mean over the sets where there are several."""
    std: float | None
    """Deviation over sets, subsets or splits, whichever the metric has; None without any."""
    detector: str
    weights_hash: str
    """Digest of the detector's weights."""
    resize: str
    """How images were brought to the detector's size."""
    dtype: str
    """In which the detector computed, for example float32."""
    num_images: int
    """Generated images of one set."""
    num_reference: int
    """Real images."""
    num_sets: int = 1
    """Sets of generated images. No term of comparison: more sets narrow a mean, they do not move it."""


def series_name(metric: str, num_images: int) -> str:
    """Name under which a metric is plotted; the count in it keeps results of different counts apart.

    Returns:
        For example ``fid_50k`` or ``fid_1800``; ``k`` stands for whole thousands only.

    Raises:
        ValueError: If ``num_images`` is below 1.
    """
    require(num_images >= 1, "num_images", num_images, "be at least 1")
    count = f"{num_images // 1000}k" if num_images % 1000 == 0 else str(num_images)
    return f"{metric}_{count}"
