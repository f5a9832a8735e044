"""The toy dataset: 1,797 handwritten digits of 8x8 pixels, which need no download."""

import numpy as np

from cedm_ray.data.class_names import DIGITS
from cedm_ray.data.sources import ArraySource


def digits() -> ArraySource:
    """Scikit-learn's handwritten digits, 1,797 grey images of 8x8 pixels in 10 classes, in the library's order.

    The grey levels 0 to 16 become ``round(v * 255 / 16)``.
    """
    from sklearn.datasets import load_digits  # takes a second, which a process that needs no digits can spare

    bunch = load_digits()
    images = np.rint(np.asarray(bunch.images) * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = np.asarray(bunch.target).astype(np.int64)
    return ArraySource("digits", "1", images, labels, 10, class_names=DIGITS)
