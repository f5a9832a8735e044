import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.gaussian_process.kernels import Matern

from cedm_ray.granularity.curve_model import (
    AMPLITUDES,
    EXPONENTS,
    LENGTHS,
    NOISES,
    TILTS,
    UNLIKELY,
    CurveModel,
    Hypothesis,
    Posterior,
    matern52,
)

Array = NDArray[np.float64]
CLUSTERS = (2, 3, 7, 20, 50, 160)
RUNGS_KIMG = (10, 25, 60, 100)
READ = [(0, 0), (2, 0), (2, 1), (2, 2), (5, 0), (3, 3), (4, 1), (0, 1)]
SCORES = np.array([2.5, 2.3, 1.9, 1.7, 2.6, 1.5, 2.0, 2.2])
HYPOTHESIS = Hypothesis(length=1.6, amplitude=0.3, tilt=0.5, exponent=0.4, noise=0.02)


@cache
def alike(length: float) -> Array:
    return np.asarray(Matern(length, nu=2.5)(np.log(CLUSTERS)[:, None]))


def prior(h: Hypothesis, one: tuple[int, int], other: tuple[int, int]) -> float:
    """Covariance of (candidate, rung) pairs, as the class states it, one pair at a time."""
    (i, r), (j, s) = one, other
    t, w = (math.log(RUNGS_KIMG[rung] / RUNGS_KIMG[-1]) for rung in (r, s))
    fall = 0.4**2 * (math.exp(-h.exponent * t) - 1) * (math.exp(-h.exponent * w) - 1) / h.exponent**2
    drift = math.exp(-abs(t - w) / 1.5)
    level = h.amplitude**2 * alike(h.length)[i, j]
    own = (h.tilt * h.amplitude) ** 2 * alike(1.5 * h.length)[i, j] * (fall + 0.3**2 * drift)
    luck = h.noise**2 * drift if i == j else 0.0
    return 1 + 0.25 * fall + 0.05**2 * drift + level + own + luck


PLACES = [(i, r) for r in range(len(RUNGS_KIMG)) for i in range(len(CLUSTERS))]


def dense(h: Hypothesis, y: Array) -> tuple[Array, Array, float]:
    """Conditional mean and covariance of all places by way of the precision matrix of all, and the evidence."""
    every = PLACES + READ
    joint = np.array([[prior(h, a, b) for b in every] for a in every])
    n = len(PLACES)
    joint[n:, n:] += (h.noise / 3) ** 2 * np.eye(len(READ))
    joint[:n, :n] += 1e-9 * np.eye(n)
    precision = np.linalg.inv(joint)
    covariance = np.linalg.inv(precision[:n, :n])
    mean = y.mean() - covariance @ precision[:n, n:] @ (y - y.mean())
    return mean, covariance, float(stats.multivariate_normal(np.full(len(y), y.mean()), joint[n:, n:]).logpdf(y))


def with_hypotheses(*hypotheses: Hypothesis) -> CurveModel:
    model = CurveModel(CLUSTERS, RUNGS_KIMG)
    model._hypotheses, model._log_prior = list(hypotheses), [0.0] * len(hypotheses)
    return model


def fit(model: CurveModel, y: Array | None = None) -> Posterior:
    return model.fit(*zip(*READ, strict=True), np.log(SCORES) if y is None else y)


def final_deviation(posterior: Posterior) -> Array:
    """Standard deviation of every candidate's end of training, luck of the set of images left out."""
    return np.sqrt(np.diagonal(posterior.joint[:, -1]))


def of_last(covariance: Array) -> Array:
    last = slice(-len(CLUSTERS), None)
    return covariance[last].reshape(len(CLUSTERS), len(RUNGS_KIMG), len(CLUSTERS))


@pytest.mark.parametrize("length", [0.3, 1.0, 2.7])
def test_matern_is_sklearn_s(length: float) -> None:
    x = np.linspace(-3, 4, 15)
    assert matern52(x[:, None] - x[None], length) == pytest.approx(Matern(length, nu=2.5)(x[:, None]), abs=1e-14)


@pytest.mark.parametrize(
    "h", [HYPOTHESIS, Hypothesis(0.8, 0.1, 1.2, -0.7, 0.0075), Hypothesis(3.2, 0.3, 0.15, -0.7, 0.15)]
)
def test_one_hypothesis_gives_the_conditional_of_the_joint_gaussian(h: Hypothesis) -> None:
    found, y = fit(with_hypotheses(h)), np.log(SCORES)
    mean, covariance, _ = dense(h, y)
    shape = len(RUNGS_KIMG), len(CLUSTERS)
    assert found.mean == pytest.approx(mean.reshape(shape), abs=2e-5)
    assert found.joint == pytest.approx(of_last(covariance), abs=1e-6)
    assert found.variance == pytest.approx(np.diag(covariance).reshape(shape) + (h.noise / 3) ** 2, abs=1e-6)
    assert found.final == pytest.approx(mean[-len(CLUSTERS) :], abs=2e-5)
    assert final_deviation(found) ** 2 == pytest.approx(np.diag(covariance)[-len(CLUSTERS) :], abs=1e-6)


def test_hypotheses_are_averaged_by_their_evidence() -> None:
    hypotheses = [HYPOTHESIS, Hypothesis(0.8, 0.3, 0.5, 0.4, 0.06), Hypothesis(3.2, 0.3, 1.2, -0.7, 0.1)]
    y = np.log(SCORES)
    parts = [dense(h, y) for h in hypotheses]
    weights = np.exp([evidence - max(each[2] for each in parts) for *_, evidence in parts])
    weights /= weights.sum()
    assert sorted(weights)[1] > 0.05  # else nothing is averaged
    mean = sum(w * m for w, (m, _, _) in zip(weights, parts, strict=True))
    second = sum(w * (c + np.outer(m, m)) for w, (m, c, _) in zip(weights, parts, strict=True))
    covariance = second - np.outer(mean, mean)
    found = fit(with_hypotheses(*hypotheses))
    noise = sum(w * (h.noise / 3) ** 2 for w, h in zip(weights, hypotheses, strict=True))
    assert found.mean.ravel() == pytest.approx(mean, abs=2e-5)
    assert found.joint == pytest.approx(of_last(covariance), abs=2e-6)
    assert found.variance.ravel() == pytest.approx(np.diag(covariance) + noise, abs=2e-6)


def test_the_whole_set_of_hypotheses_is_averaged_but_for_those_that_hardly_count() -> None:
    model = CurveModel(CLUSTERS, RUNGS_KIMG, retrain_spread=0.02)
    count = len(LENGTHS) * len(AMPLITUDES) * len(TILTS) * len(EXPONENTS) * len(NOISES)
    assert len(set(model._hypotheses)) == len(model._hypotheses) == count
    weights = []
    for h in model._hypotheses:
        *_, evidence = dense(h, np.log(SCORES))
        weights.append(evidence - 0.5 * (math.log(h.noise / 0.02) / 0.7) ** 2)
    weights = np.exp(np.array(weights) - max(weights))
    weights /= weights.sum()
    counted = [i for i, weight in enumerate(weights) if weight > UNLIKELY]
    mean = np.average([dense(model._hypotheses[i], np.log(SCORES))[0] for i in counted], 0, weights[counted])
    assert 3 < len(counted) < count
    assert fit(model).mean.ravel() == pytest.approx(mean, abs=5e-5)


def test_a_factor_on_all_scores_moves_the_mean_and_nothing_else() -> None:
    model = CurveModel(CLUSTERS, RUNGS_KIMG)
    one, other = fit(model), fit(model, np.log(70 * SCORES))
    assert other.mean - one.mean == pytest.approx(np.full_like(one.mean, math.log(70)), abs=1e-9)
    assert other.variance == pytest.approx(one.variance, rel=1e-6)
    assert other.joint == pytest.approx(one.joint, rel=1e-6, abs=1e-12)
    gains = [[p.gain(i, r) for i in range(len(CLUSTERS)) for r in range(len(RUNGS_KIMG))] for p in (one, other)]
    assert gains[1] == pytest.approx(gains[0], rel=1e-6, abs=1e-9)


def test_a_factor_on_all_images_changes_nothing() -> None:
    one = fit(CurveModel(CLUSTERS, RUNGS_KIMG))
    other = fit(CurveModel(CLUSTERS, [1000 * kimg for kimg in RUNGS_KIMG]))
    assert other.mean == pytest.approx(one.mean, rel=1e-9) and other.joint == pytest.approx(one.joint, abs=1e-9)


def test_the_order_of_the_readings_does_not_matter() -> None:
    model, order = CurveModel(CLUSTERS, RUNGS_KIMG), np.random.default_rng(0).permutation(len(READ))
    shuffled = model.fit(*zip(*(READ[i] for i in order), strict=True), np.log(SCORES)[order])
    assert shuffled.mean == pytest.approx(fit(model).mean, abs=1e-9)
    assert shuffled.joint == pytest.approx(fit(model).joint, abs=1e-9)


def test_covariances_are_ones_and_a_reading_narrows_them() -> None:
    model = CurveModel(CLUSTERS, RUNGS_KIMG)
    few, many = model.fit(*zip(*READ[:1], strict=True), [0.9]), fit(model)
    for posterior in (few, many):
        final = posterior.joint[:, -1]
        assert final == pytest.approx(final.T, abs=1e-12) and np.linalg.eigvalsh(final).min() > -1e-12
        assert np.all(posterior.variance > 0)
    assert np.all(final_deviation(many) < final_deviation(few))
    assert final_deviation(many)[3] == min(final_deviation(many))  # the one that was read at the end of its training


def crossing(u: Array, t: Array) -> Array:
    """ln(score): the best C is 20, but early 7 looks better."""
    return 0.7 + 0.06 * (u - math.log(20)) ** 2 + (0.5 + 0.06 * (u - u.mean())) * (np.exp(-0.4 * t) - 1)


def test_readings_without_noise_at_every_place_are_met_and_the_best_c_is_found() -> None:
    u, t = np.log(np.array(CLUSTERS)), np.log(np.array(RUNGS_KIMG) / RUNGS_KIMG[-1])
    curves = crossing(u[None], t[:, None])
    rungs, candidates = np.indices(curves.shape).reshape(2, -1)
    found = CurveModel(CLUSTERS, RUNGS_KIMG, retrain_spread=1e-3).fit(candidates, rungs, curves.ravel())
    assert curves[0].argmin() == 2 and curves[-1].argmin() == 3
    assert found.mean == pytest.approx(curves, abs=5e-4) and found.final.argmin() == 3
    assert np.all(final_deviation(found) < 1e-3)


def test_early_readings_and_two_ends_tell_the_best_of_curves_that_cross() -> None:
    u, t = np.log(np.array(CLUSTERS)), np.log(np.array(RUNGS_KIMG) / RUNGS_KIMG[-1])
    curves = crossing(u[None], t[:, None])
    read = [(i, r) for i in range(len(CLUSTERS)) for r in (0, 1)] + [(i, r) for i in (1, 4) for r in (2, 3)]
    found = CurveModel(CLUSTERS, RUNGS_KIMG, retrain_spread=1e-3).fit(
        *zip(*read, strict=True), [float(curves[r, i]) for i, r in read]
    )
    assert found.final.argmin() == 3
    assert np.all(np.abs(found.final - curves[-1]) < 3 * final_deviation(found) + 1e-3)


def test_a_noisy_reading_is_not_passed_through() -> None:
    y = np.log(SCORES)
    y[2] += 0.3
    posterior = fit(CurveModel(CLUSTERS, RUNGS_KIMG, retrain_spread=0.1), y)
    assert abs(posterior.mean[1, 2] - y[2]) > 0.02


def lowest_after(posterior: Posterior, candidate: int, rung: int) -> Callable[[float], float]:
    """The lowest expected end after a reading that is so many of its deviations above what was expected."""
    final, there = posterior.final, posterior.joint[:, rung, candidate]
    return lambda z: float((final + there * z / math.sqrt(posterior.variance[rung, candidate])).min())


@pytest.mark.parametrize("model", [CurveModel(CLUSTERS, RUNGS_KIMG), with_hypotheses(HYPOTHESIS)])
def test_the_gain_is_what_draws_of_the_reading_give_on_average(model: CurveModel) -> None:
    posterior = fit(model)
    z = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)  # stratified: as good as some millions of plain draws
    compared = 0
    for candidate in range(len(CLUSTERS)):
        for rung in range(len(RUNGS_KIMG)):
            lowest = np.mean([lowest_after(posterior, candidate, rung)(each) for each in z])
            wanted = float(posterior.final.min() - lowest)
            found = posterior.gain(candidate, rung)
            assert found >= 0 and found == pytest.approx(wanted, rel=0.02, abs=2e-6)
            compared += wanted > 1e-4
    assert compared > 8


def test_the_gain_is_what_fitting_again_with_the_drawn_reading_gives() -> None:
    model = with_hypotheses(HYPOTHESIS)
    posterior = fit(model)
    gains = {(i, r): posterior.gain(i, r) for i, r in PLACES}
    for candidate, rung in sorted(gains, key=lambda place: -gains[place])[:3]:
        lowest = []
        for z in stats.norm.ppf((np.arange(200) + 0.5) / 200):
            value = posterior.mean[rung, candidate] + z * math.sqrt(posterior.variance[rung, candidate])
            read = [*READ, (candidate, rung)]
            lowest.append(model.fit(*zip(*read, strict=True), [*np.log(SCORES), value]).final.min())
        assert gains[candidate, rung] == pytest.approx(posterior.final.min() - np.mean(lowest), rel=0.02)


def test_draws_have_the_mean_and_covariance_of_the_posterior() -> None:
    posterior, rng = fit(CurveModel(CLUSTERS, RUNGS_KIMG)), np.random.default_rng(0)
    drawn = np.array([posterior.draw(rng) for _ in range(20_000)])
    deviation = final_deviation(posterior)
    assert np.all(np.abs(drawn.mean(0) - posterior.final) < 4 * deviation / math.sqrt(20_000))
    correlation = posterior.joint[:, -1] / np.outer(deviation, deviation)
    assert np.cov(drawn.T) / np.outer(deviation, deviation) == pytest.approx(correlation, abs=0.05)
    again = posterior.draw(np.random.default_rng(7))
    assert again == pytest.approx(posterior.draw(np.random.default_rng(7)), abs=0)


def test_one_candidate_and_one_rung_are_enough() -> None:
    found = CurveModel([5], [100]).fit([0], [0], [0.4])
    assert found.mean.shape == (1, 1) and found.final[0] == pytest.approx(0.4) and found.gain(0, 0) == 0


def test_no_reading_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no reading"):
        CurveModel(CLUSTERS, RUNGS_KIMG).fit([], [], [])


def test_hundreds_of_candidates_fit_into_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    CurveModel(range(2, 302), (10, 20, 40, 80)).fit([0, 40, 200], [0, 0, 1], [1.0, 0.9, 0.8])
    assert tracemalloc.get_traced_memory()[1] < 200e6  # a covariance of all places for each hypothesis takes 1.6 GB
    tracemalloc.stop()
