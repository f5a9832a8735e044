"""Everything that the features of generated and real images say, as comparable scores."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cedm_ray.errors import UserError
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.inception_score import inception_score
from cedm_ray.metrics.kid import kid
from cedm_ray.metrics.manifold import manifold_metrics
from cedm_ray.metrics.scores import Score
from cedm_ray.metrics.similarity import mean_similarity_score, similarity_auroc, top1_similarity
from cedm_ray.metrics.stats import FeatureStats, StatsFacts

KID_SUBSET = 1000
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class EvaluationInputs:
    """Features of one detector, each set of shape ``(N, D)``, float32, and where they come from."""

    facts: StatsFacts
    """Of the detector; ``count`` is of the real images."""
    generated: NDArray[np.float32]
    real: NDArray[np.float32]
    """Of the training images."""
    logits: NDArray[np.float32] | None = None
    """Class scores of the generated images, shape ``(N, K)``."""
    test: NDArray[np.float32] | None = None
    """Of held-out real images."""
    unconditional: FeatureStats | None = None
    """Statistics of the samples of an unconditional model."""


def evaluate_features(
    inputs: EvaluationInputs, *, num_neighbors: int = 5, seed: int = 2020, device: torch.device | str = "cpu"
) -> Iterator[Score]:
    """Score generated images against real ones in the features of one detector.

    Args:
        inputs: The features.
        num_neighbors: Neighbours that set the radii of precision, recall, density and coverage.
        seed: Of the subsets of KID and the splits of the Inception Score.
        device: Where distances are computed.

    Yields:
        One score after another, the quick ones first: the Fréchet distance, KID and the Inception Score; the Fréchet
        distance to the unconditional samples (uFID); MSS and, with held-out images, AUROC; precision, recall, density
        and coverage. A Fréchet distance that has fewer images than feature dimensions is refused when its turn comes.

    Raises:
        UserError: If there are too few images for a score, or the unconditional samples were scored on other terms.

    Source: arXiv 2403.00570, Sec. 4 and its appendix, for the choice of scores.
    """
    facts, generated, real = inputs.facts, inputs.generated, inputs.real
    name = metric_name(facts.detector)
    own = feature_stats(generated, facts)
    yield _score(inputs, name, own.distance(feature_stats(real, facts)))
    subset = min(KID_SUBSET, len(generated), len(real))
    yield _score(inputs, "kid", *kid(real, generated, subset_size=subset, seed=seed))
    if inputs.logits is not None:
        yield _score(inputs, "inception_score", *inception_score(inputs.logits, shuffle_seed=seed))
    if inputs.unconditional is not None:
        yield _score(inputs, f"u{name}", _distance(own, inputs.unconditional))
    nearest = top1_similarity(generated, real, device=device)
    yield _score(inputs, "mss", mean_similarity_score(nearest))
    if inputs.test is not None:
        held_out = top1_similarity(inputs.test, real, device=device)
        yield _score(inputs, "similarity_auroc", similarity_auroc(nearest, held_out))
    shared = manifold_metrics(real, generated, num_neighbors, device=device)
    for metric in ("precision", "recall", "density", "coverage"):
        yield _score(inputs, metric, getattr(shared, metric))


def feature_stats(features: NDArray[np.float32], facts: StatsFacts) -> FeatureStats:
    """Mean and covariance of features ``(N, D)``, which are those of the given detector."""
    sums = FeatureSums(features.shape[1])
    for start in range(0, len(features), _BLOCK):
        sums.update(torch.from_numpy(np.array(features[start : start + _BLOCK])))
    return FeatureStats(*sums.mean_cov(), replace(facts, count=len(features)))


def _distance(own: FeatureStats, unconditional: FeatureStats) -> float:
    try:
        return own.distance(unconditional)
    except ValueError as error:
        raise UserError(f"the unconditional samples were scored on other terms: {error}") from error


def _score(inputs: EvaluationInputs, metric: str, value: float, std: float | None = None) -> Score:
    return score_of(inputs.facts, metric, value, std, num_images=len(inputs.generated), num_reference=len(inputs.real))


def score_of(
    facts: StatsFacts,
    metric: str,
    value: float,
    std: float | None,
    *,
    num_images: int,
    num_reference: int,
    num_sets: int = 1,
) -> Score:
    """A value with the facts of the detector that it was measured with."""
    return Score(
        metric=metric,
        value=value,
        std=std,
        detector=facts.detector,
        weights_hash=facts.weights_hash,
        resize=facts.resize,
        dtype=facts.dtype,
        num_images=num_images,
        num_reference=num_reference,
        num_sets=num_sets,
    )
