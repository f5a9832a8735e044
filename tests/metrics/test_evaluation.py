from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from prdc import compute_prdc
from sklearn.metrics import roc_auc_score
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from cedm_ray.errors import UserError
from cedm_ray.metrics.evaluation import EvaluationInputs, evaluate_features, feature_stats
from cedm_ray.metrics.scores import Score
from cedm_ray.metrics.stats import FeatureStats, StatsFacts

DIM = 6
FACTS = StatsFacts("inception", "abc", "bicubic to 9 px", "float16", DIM, 0)


def features(seed: int, count: int = 300, shift: float = 0.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((count, DIM)) + 1 + shift).astype(np.float32)


def scored(seed: int = 2020, **changes: object) -> dict[str, Score]:
    inputs = {"facts": FACTS, "generated": features(0, 200, 0.3), "real": features(1), **changes}
    return {score.metric: score for score in evaluate_features(EvaluationInputs(**inputs), seed=seed)}  # type: ignore[arg-type]


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    s1, s2 = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    root = np.real(scipy.linalg.sqrtm(s1 @ s2))
    apart = a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)
    return float(apart @ apart + np.trace(s1 + s2 - 2 * root))


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    unit = [x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b)]
    best: NDArray[np.float64] = (unit[0] @ unit[1].T).max(1)
    return best


def kernel_distance(real: NDArray[np.float32], generated: NDArray[np.float32], seed: int) -> tuple[float, float]:
    sets = (torch.from_numpy(x).double() for x in (real, generated))
    values = kid_features_to_metric(*sets, kid_subset_size=200, rng_seed=seed, verbose=False)
    return values[KEY_METRIC_KID_MEAN], values[KEY_METRIC_KID_STD]


def test_every_score_is_that_of_the_libraries() -> None:
    generated, real, test = features(0, 200, 0.3), features(1), features(2, 100)
    unconditional, logits = features(3, 150, 0.5), features(4, 200)
    found = scored(test=test, logits=logits, unconditional=feature_stats(unconditional, FACTS))
    assert found["fid"].value == pytest.approx(distance(generated, real), rel=1e-8)
    assert found["ufid"].value == pytest.approx(distance(generated, unconditional), rel=1e-8)
    for name, value in compute_prdc(real, generated, nearest_k=5).items():
        assert found[name].value == value
    near, far = cosines(generated, real), cosines(test, real)
    assert found["mss"].value == pytest.approx(near.mean(), rel=1e-6)
    auroc = roc_auc_score([1] * 200 + [0] * 100, np.concatenate([near, far]).astype(np.float32))
    assert found["similarity_auroc"].value == pytest.approx(auroc, abs=1e-9)
    for seed, scores in ((2020, found), (7, scored(logits=logits, seed=7))):
        sure = isc_features_to_metric(torch.from_numpy(logits), rng_seed=seed)
        for name, expected in (
            ("kid", kernel_distance(real, generated, seed)),
            ("inception_score", (sure[KEY_METRIC_ISC_MEAN], sure[KEY_METRIC_ISC_STD])),
        ):
            assert (scores[name].value, scores[name].std) == pytest.approx(expected, rel=1e-9)
    assert found["kid"].value != scores["kid"].value and found["inception_score"].std != scores["inception_score"].std


def test_what_a_score_was_made_from_goes_with_it() -> None:
    found = scored()
    terms = {(s.detector, s.weights_hash, s.resize, s.dtype, s.num_images, s.num_reference) for s in found.values()}
    assert terms == {("inception", "abc", "bicubic to 9 px", "float16", 200, 300)}
    assert {name for name, score in found.items() if score.std is not None} == {"kid"}
    assert "similarity_auroc" not in found and "ufid" not in found and "inception_score" not in found
    assert "inception_score" in scored(logits=np.zeros((200, 4), np.float32))


def test_features_of_another_detector_do_not_pass_for_fid() -> None:
    other = replace(FACTS, detector="dinov2")
    assert "fdd" in scored(facts=other) and "fid" not in scored(facts=other)


def test_unconditional_samples_scored_with_other_weights_are_refused() -> None:
    stats = feature_stats(features(3), FACTS)
    wrong = FeatureStats(stats.mu, stats.sigma, replace(stats.facts, weights_hash="other"))
    with pytest.raises(UserError, match="unconditional samples were scored on other terms: weights_hash is"):
        scored(unconditional=wrong)


def test_fewer_images_than_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match="5 images are too few for features of 6 dimensions"):
        scored(generated=features(0, 5))
