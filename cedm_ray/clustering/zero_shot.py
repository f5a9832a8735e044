"""Groups by text: each image goes to the class whose description is most like it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.clustering.types import Clustering, make_clustering
from cedm_ray.errors import require


def class_vectors(text_features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """One vector per class from the features of its prompts: the mean of their directions.

    Args:
        text_features: Features of P prompts for each of C classes, shape ``(C, P, D)``, finite.

    Returns:
        Vectors of length 1, shape ``(C, D)``, float64.

    Raises:
        ValueError: If the shape is another, a value is not finite, or a prompt or the mean of a class has length 0.

    Source: arXiv 2103.00020, Sec. 3.1.4 (ensembling over the embedding space).
    """
    if text_features.ndim != 3 or 0 in text_features.shape:
        raise ValueError(f"text_features have shape {text_features.shape}; (C, P, D) is due")
    prompts = _units(text_features, "text_features")
    return _units(prompts.mean(axis=1), "the mean text_features of a class")


def zero_shot_assignments(
    image_features: NDArray[np.floating[Any]],
    text_features: NDArray[np.floating[Any]],
    *,
    logit_scale: float = 100.0,
    block: int = 8192,
) -> Clustering:
    """Assign each image to the class whose vector has the largest cosine with it, the first of equal ones.

    Args:
        image_features: Shape ``(N, D)``, finite; may be read-only, and need not have length 1.
        text_features: Features of P prompts for each of C classes by the same model, shape ``(C, P, D)``.
        logit_scale: What cosines are multiplied with before the softmax that gives ``max_prob``; the inverse of the
            temperature that the model was trained with, 100 for CLIP.
        block: Images at a time.

    Returns:
        The clustering into C classes, without head losses; ``max_prob`` is the softmax over the scaled cosines.

    Raises:
        ValueError: If the shapes do not match, a feature is not finite or has length 0, or a setting is not positive.

    Source: arXiv 2103.00020, Sec. 3.1.2.
    """
    require(0 < logit_scale < float("inf"), "logit_scale", logit_scale, "be above 0 and finite")
    require(block >= 1, "block", block, "be at least 1")
    classes = class_vectors(text_features)
    if image_features.ndim != 2 or len(image_features) == 0 or image_features.shape[1] != classes.shape[1]:
        raise ValueError(f"image_features have shape {image_features.shape}; (N, {classes.shape[1]}) is due")
    assignments = np.empty(len(image_features), np.int64)
    max_prob = np.empty(len(image_features), np.float32)
    for start in range(0, len(image_features), block):
        part = slice(start, start + block)
        cosines = _units(image_features[part], "image_features") @ classes.T
        assignments[part] = cosines.argmax(axis=1)
        below_best = cosines - cosines.max(axis=1, keepdims=True)
        max_prob[part] = 1 / np.exp(logit_scale * below_best).sum(axis=1)
    return make_clustering(assignments, len(classes), max_prob=max_prob)


def _units(features: NDArray[np.floating[Any]], name: str) -> NDArray[np.float64]:
    """The vectors of the last axis at length 1, in float64: at a scale of 100 the roundings of float32 would show."""
    values = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"{name} hold NaN or infinity; look at the model and its weights")
    if not norms.all():
        raise ValueError(f"{name} hold a vector of length 0, which has no direction; look at the model and its inputs")
    units: NDArray[np.float64] = values / norms
    return units
