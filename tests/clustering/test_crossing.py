import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cedm_ray.clustering import crossing
from cedm_ray.clustering.crossing import STEP, Crossing, grid

Array = NDArray[np.float64]

CUTOFF, LARGEST = 0.96, 5000
# Both sides of the crossing, a repeat, and a reading that fits none of the others.
READINGS = [(100, 1.0), (250, 0.988), (250, 0.976), (600, 0.955), (400, 0.90), (1500, 0.84)]


def told(readings: list[tuple[int, float]], c_start: int = 100, largest: int = LARGEST) -> Crossing:
    fit = Crossing(CUTOFF, largest, Crossing.around(c_start, largest))
    for num_clusters, ratio in readings:
        fit.tell(num_clusters, ratio)
    return fit


def mean_ratio(clusters: Array, c_max: Array, below: Array, above: Array, cutoff: float = CUTOFF) -> Array:
    """The docstring's curve, written anew."""
    slope = np.where(clusters < c_max, below, above)
    return 1 - stats.norm.cdf(stats.norm.ppf(1 - cutoff) + slope * np.log(clusters / c_max))


def log_normal(uniform: Array, values: Array, median: float, spread: float) -> Array:
    """Draws of a log-normal between the ends of the grid of values that stands for it."""
    half = math.log(values[1] / values[0]) / 2
    ends = (np.log(values[[0, -1]] / median) + np.array([-half, half])) / spread
    return median * np.exp(spread * stats.truncnorm.ppf(uniform, *ends))


class Sampled:
    """The posterior by weighing draws from the prior by the likelihood, at every tenth point of the grid."""

    def __init__(self, readings: list[tuple[int, float]], c_start: int, largest: int) -> None:
        uniform = stats.qmc.Sobol(3, seed=0).random_base2(13)
        self.below, self.above = (
            log_normal(uniform[:, i], crossing._SLOPES, crossing._SLOPE_MEDIAN, crossing._SLOPE_SPREAD) for i in (0, 1)
        )
        noise = log_normal(uniform[:, 2], crossing._NOISES, crossing._NOISE_MEDIAN, crossing._NOISE_SPREAD)
        self.log_clusters = grid(largest)[::10]
        prior = stats.t.logpdf(
            self.log_clusters, crossing._PRIOR_DOF, loc=math.log(c_start), scale=crossing._PRIOR_SCALE
        )
        self.log_weights = np.repeat(prior[:, None], len(noise), axis=1)
        for row, c_max in enumerate(np.exp(self.log_clusters)):
            for num_clusters, ratio in readings:
                self.log_weights[row] += self.likelihood(num_clusters, ratio, c_max, noise)
        self.weights = np.exp(self.log_weights - self.log_weights.max())
        self.weights /= self.weights.sum()

    def likelihood(self, num_clusters: int, ratio: float, c_max: float, noise: Array) -> Array:
        r = mean_ratio(np.array(num_clusters), np.array(c_max), self.below, self.above)
        slope = np.where(num_clusters < c_max, self.below, self.above)
        distance = math.log(num_clusters / c_max)
        # The misfit is a share of the slope, in probits; the curve's derivative by ln C takes it to r.
        misfit = crossing._MISFIT * distance * slope * stats.norm.pdf(stats.norm.ppf(1 - r))
        variance = noise**2 * (r * (1 - r) / num_clusters + 1 / (2 * num_clusters) ** 2) + misfit**2
        return stats.t.logpdf(ratio, crossing._READING_DOF, loc=r, scale=np.sqrt(variance))

    def curve(self, num_clusters: float, shares: Array) -> Array:
        c_max = np.exp(self.log_clusters)[:, None]
        ratio = mean_ratio(np.array(num_clusters), c_max, self.below, self.above).ravel()
        order = np.argsort(ratio)
        return np.interp(shares, np.cumsum(self.weights.ravel()[order]), ratio[order])


@pytest.mark.parametrize("readings", [READINGS[:1], READINGS[:2], READINGS, READINGS[3:4], [(12, 1.0), (16, 14 / 16)]])
def test_the_posterior_is_that_of_draws_from_the_prior_weighed_by_the_likelihood(
    readings: list[tuple[int, float]],
) -> None:
    fit, sampled = told(readings), Sampled(readings, 100, LARGEST)
    density, expected = fit.density(), sampled.weights.sum(axis=1)
    mean, expected_mean = density @ fit.log_clusters, expected @ sampled.log_clusters
    assert mean == pytest.approx(expected_mean, abs=0.02)
    assert fit.spread() == pytest.approx(math.sqrt(expected @ (sampled.log_clusters - expected_mean) ** 2), rel=0.04)
    # Each of the sampled points stands for ten of the grid, five of them above it.
    total = np.cumsum(density)[np.minimum(np.arange(len(expected)) * 10 + 5, len(density) - 1)]
    np.testing.assert_allclose(total, np.cumsum(expected), atol=0.02)


def test_the_band_of_the_curve_is_that_of_draws_from_the_prior_weighed_by_the_likelihood() -> None:
    fit, sampled = told(READINGS), Sampled(READINGS, 100, LARGEST)
    clusters, shares = np.array([60.0, 150, 300, 450, 800, 2500]), np.array([0.025, 0.5, 0.975])
    expected = np.stack([sampled.curve(c, shares) for c in clusters], axis=1)
    np.testing.assert_allclose(1 - fit.curve(clusters, shares), 1 - expected, rtol=0.08, atol=0.002)


def test_the_prior_is_students_t_around_the_start() -> None:
    fit = told([], c_start=300)
    expected = stats.t.pdf(fit.log_clusters, crossing._PRIOR_DOF, loc=math.log(300), scale=crossing._PRIOR_SCALE)
    np.testing.assert_allclose(fit.density(), expected / expected.sum(), rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_density_sums_to_one_on_a_grid_that_reaches_past_both_ends(count: int) -> None:
    fit = told(READINGS[:count])
    assert fit.density().sum() == pytest.approx(1) and (fit.density() >= 0).all()
    assert fit.density().shape == fit.log_clusters.shape
    assert fit.log_clusters[0] < math.log(2) - 1 and fit.log_clusters[-1] > math.log(LARGEST) + 1
    np.testing.assert_allclose(np.diff(fit.log_clusters), STEP)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_readings_does_not_matter(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(READINGS))
    np.testing.assert_allclose(told([READINGS[i] for i in order]).density(), told(READINGS).density(), atol=1e-12)


def test_asking_between_readings_changes_nothing() -> None:
    fit = Crossing(CUTOFF, LARGEST, Crossing.around(100, LARGEST))
    for num_clusters, ratio in READINGS:
        fit.tell(num_clusters, ratio)
        fit.density()
    np.testing.assert_array_equal(fit.density(), told(READINGS).density())


@pytest.mark.parametrize("c_max", [40, 300, 2500])
@pytest.mark.parametrize("slopes", [(0.5, 0.5), (1.0, 0.5), (0.6, 1.8), (3.0, 3.0)])
def test_many_readings_without_noise_settle_on_the_crossing(c_max: int, slopes: tuple[float, float]) -> None:
    clusters = np.round(c_max * np.geomspace(0.6, 1.6, 40))
    ratios = mean_ratio(clusters, np.array(c_max), *map(np.array, slopes))
    fit = told([(int(c), float(r)) for c, r in zip(clusters, ratios, strict=True)])
    lower, median, upper = np.exp(fit.quantiles(np.array([0.025, 0.5, 0.975])))
    assert median == pytest.approx(c_max, rel=0.05) and lower <= c_max <= upper
    assert fit.spread() < 0.12 < 0.2 * told([]).spread()


def test_more_readings_tell_more() -> None:
    c_max = np.array(500)
    clusters = [300, 700, 350, 650, 400, 600]
    readings = [(c, float(mean_ratio(np.array(c), c_max, np.array(1.0), np.array(1.0)))) for c in clusters]
    spreads = [told(readings[:count]).spread() for count in (0, 2, 4, 6)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.25 * spreads[0]


def test_one_unlucky_reading_among_many_does_not_decide() -> None:
    clusters = [200, 230, 260, 290, 320, 350, 380, 420]
    one = np.array(1.0)
    readings = [(c, float(mean_ratio(np.array(c), np.array(300), one, one))) for c in clusters]
    before, after = (np.exp(told(told_).quantiles(np.array([0.5]))[0]) for told_ in (readings, [*readings, (250, 0.7)]))
    assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize(
    ("low", "high", "steps"), [(-math.inf, math.inf, 0.1), (math.log(2), math.log(400), 1), (4.0, 4.1, 1)]
)
def test_quantiles_of_the_prior_are_those_of_students_t_between_the_bounds(
    low: float, high: float, steps: float
) -> None:
    fit, shares = told([]), np.array([0.025, 0.2, 0.5, 0.8, 0.975])
    prior = stats.t(crossing._PRIOR_DOF, loc=math.log(100), scale=crossing._PRIOR_SCALE)
    ends = [fit.log_clusters[0] - STEP / 2, fit.log_clusters[-1] + STEP / 2]
    below, above = prior.cdf(max(low, ends[0])), prior.cdf(min(high, ends[1]))
    expected = prior.ppf(below + shares * (above - below))
    np.testing.assert_allclose(fit.quantiles(shares, low, high), expected, rtol=0, atol=steps * STEP)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_quantiles_rise_with_the_share_and_stay_within_the_bounds(count: int) -> None:
    fit = told(READINGS[:count])
    free = fit.quantiles(np.array([0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0]))
    assert (np.diff(free) > 0).all()
    low, high = fit.quantiles(np.array([0.3, 0.6]))
    within = fit.quantiles(np.array([0.0, 0.1, 0.5, 0.9, 1.0]), low, high)
    assert (np.diff(within) > 0).all() and low <= within[0] and within[-1] <= high
    assert within[2] == pytest.approx(fit.quantiles(np.array([0.45]))[0], abs=STEP)


@pytest.mark.parametrize("place", [math.log(2), math.log(100), math.log(100) + STEP / 2, math.log(LARGEST)])
def test_bounds_that_are_equal_leave_one_place(place: float) -> None:
    np.testing.assert_allclose(told(READINGS).quantiles(np.array([0.2, 0.8]), place, place), place)


@pytest.mark.parametrize("spread", [0.0337, 0.1, 0.25, 0.6])
def test_a_shifted_prior_keeps_the_mean_and_adds_the_spread_in_quadrature(spread: float) -> None:
    # Without a reading that fits badly, far from the ends, where nothing is cut off.
    fit = told([(250, 0.985), (300, 0.978), (500, 0.95), (600, 0.94), (400, 0.965)], largest=10**6)
    other = Crossing(CUTOFF, 10**6, fit.shifted(spread))
    assert other.density() @ other.log_clusters == pytest.approx(fit.density() @ fit.log_clusters, abs=1e-3)
    assert other.spread() == pytest.approx(math.hypot(fit.spread(), spread), rel=0.01)


def test_a_spread_below_the_step_of_the_grid_shifts_nothing() -> None:
    fit = told(READINGS)
    np.testing.assert_allclose(Crossing(CUTOFF, LARGEST, fit.shifted(1e-4)).density(), fit.density(), atol=1e-9)


def test_a_prior_that_is_changed_later_counts_as_if_it_had_been_given_first() -> None:
    prior = told([(300, 0.98)]).shifted(0.2)
    late, early = told(READINGS), Crossing(CUTOFF, LARGEST, prior)
    before = late.density()
    late.expect(prior)
    assert not np.allclose(late.density(), before, atol=1e-4)
    for num_clusters, ratio in READINGS:
        early.tell(num_clusters, ratio)
    np.testing.assert_array_equal(late.density(), early.density())


def test_a_prior_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prior has shape \(3,\); it must be \(\d+,\)"):
        Crossing(CUTOFF, LARGEST, np.zeros(3))


@pytest.mark.parametrize("cutoff", [0.8, 0.96])
@pytest.mark.parametrize("count", [0, 3, 6])
def test_the_band_of_the_curve_is_ordered_and_falls_through_the_cutoff(cutoff: float, count: int) -> None:
    fit = Crossing(cutoff, LARGEST, Crossing.around(100, LARGEST))
    for num_clusters, ratio in READINGS[:count]:
        fit.tell(num_clusters, ratio)
    clusters = np.geomspace(2, LARGEST, 25)
    band = fit.curve(clusters, np.array([0.025, 0.5, 0.975]))
    assert band.shape == (3, 25) and (band >= 0).all() and (band <= 1).all()
    assert (np.diff(band, axis=0) >= 0).all() and (np.diff(band, axis=1) <= 1e-9).all()
    # Where the mean of r_C lies above the cutoff with a probability, C_max lies above C with the same.
    shares = np.array([0.1, 0.5, 0.9])
    crossings = np.exp(fit.quantiles(shares))
    for share, c_max in zip(shares, crossings, strict=True):
        assert fit.curve(np.array([c_max]), np.array([share]))[0, 0] == pytest.approx(cutoff, abs=0.002)
