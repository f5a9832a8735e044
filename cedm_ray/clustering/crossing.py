"""Where a decreasing curve that is read with noise crosses a cutoff: a probit fit, with all of its uncertainty."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STEP = 0.01  # of the grid over ln C: one per cent in C
_BEYOND = 1.5  # in ln C past both ends of the grid: a crossing outside can be told from one inside
_PRIOR_SCALE, _PRIOR_DOF = 1.2, 3  # Student's t about ln c_start: within a factor of 3.3 either way, or far off
_SLOPES = np.geomspace(0.2, 6.0, 14)
_SLOPE_MEDIAN, _SLOPE_SPREAD = 0.8, 0.7  # log-normal
_NOISES = np.geomspace(0.12, 3.0, 8)
_NOISE_MEDIAN, _NOISE_SPREAD = 0.6, 0.7  # log-normal; 1 is measured for one head, 0.3 to 0.4 for the mean of eight
_MISFIT = 0.3
_READING_DOF = 5


class Crossing:
    """The posterior distribution of C_max, the C at which the mean of r_C crosses the cutoff.

    Around the crossing the share of unused clusters is modelled as a probit in the logarithm of C, with one slope on
    each side, since real curves bend there::

        1 - r(C) = Phi(Phi^-1(1 - cutoff) + b (ln C - ln C_max)),   b = b_below where C < C_max, else b_above

    A reading of r_C scatters about it by Student's t with 5 degrees of freedom, so that one unlucky training does not
    decide, and with the variance ``s^2 (r (1 - r) / C + 1 / (2 C)^2) + misfit^2``: that of C clusters which are used or
    not, half a cluster for counting in whole ones, and a misfit of the straight line that grows with the distance from
    C_max (30 % of the slope). C_max, both slopes and s are unknown, and are integrated over on a grid.

    Args:
        cutoff: Value of r_C at the crossing, in ``(0, 1)``.
        max_clusters: Largest C that can be tried.
        prior: Log density of ln C_max at :attr:`log_clusters`, up to a constant; see :meth:`around`.

    Source: probit analysis with an unknown threshold as in Finney, "Probit Analysis" (1971), ch. 3-4; the posterior on
    a grid, from which the next trial is placed, as in Kontsevich and Tyler, Vision Research 39 (1999).
    """

    def __init__(self, cutoff: float, max_clusters: int, prior: Array) -> None:
        from scipy.special import ndtri

        self.log_clusters = grid(max_clusters)
        if prior.shape != self.log_clusters.shape:
            raise ValueError(f"prior has shape {prior.shape}; it must be {self.log_clusters.shape}")
        self._at_cutoff = float(ndtri(1 - cutoff))
        self._prior = prior
        self._density: Array | None = None  # known until something is told
        shape = (len(self.log_clusters), len(_NOISES), len(_SLOPES))
        slope_prior = _log_normal(_SLOPES, _SLOPE_MEDIAN, _SLOPE_SPREAD)
        # The slope on one side and that on the other see different readings: given C_max and s they are independent.
        self._below = np.broadcast_to(slope_prior, shape).copy()
        self._above = self._below.copy()

    @staticmethod
    def around(c_start: int, max_clusters: int) -> Array:
        """The prior where nothing is known but a place to start: wide, with heavy tails, around ``c_start``."""
        distance = (grid(max_clusters) - math.log(c_start)) / _PRIOR_SCALE
        density: Array = -(_PRIOR_DOF + 1) / 2 * np.log1p(distance**2 / _PRIOR_DOF)
        return density

    def shifted(self, spread: float) -> Array:
        """A prior for another curve, whose ln C_max differs from this one's by a normal of that standard deviation."""
        reach = math.ceil(4 * spread / STEP)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * STEP / spread) ** 2)
        blurred = np.convolve(self.density(), kernel / kernel.sum(), mode="full")
        density: Array = np.log(blurred[reach : reach + len(self.log_clusters)] + 1e-12 * blurred.max())
        return density

    def tell(self, num_clusters: int, ratio: float) -> None:
        """Take a reading of r_C; the order of readings does not matter."""
        distance = math.log(num_clusters) - self.log_clusters
        unused, density = _probit(self._at_cutoff, _SLOPES * distance[:, None])
        misfit = (density * _MISFIT * _SLOPES * np.abs(distance)[:, None]) ** 2
        scatter = unused * (1 - unused) / num_clusters + (0.5 / num_clusters) ** 2
        variance = _NOISES[:, None] ** 2 * scatter[:, None, :] + misfit[:, None, :]
        residual = (1 - ratio - unused)[:, None, :] ** 2 / variance
        told = -0.5 * np.log(variance) - (_READING_DOF + 1) / 2 * np.log1p(residual / _READING_DOF)
        below = distance < 0
        self._below[below] += told[below]
        self._above[~below] += told[~below]
        self._density = None

    def expect(self, prior: Array) -> None:
        """Change the prior, which has the shape that it had before."""
        self._prior, self._density = prior, None

    def density(self) -> Array:
        """Probability of each point of :attr:`log_clusters`, shape ``(G,)``, sums to 1."""
        if self._density is None:
            noise_prior = _log_normal(_NOISES, _NOISE_MEDIAN, _NOISE_SPREAD)
            joint = self._prior[:, None] + noise_prior + _log_sum_exp(self._below) + _log_sum_exp(self._above)
            weights = np.exp(joint - joint.max()).sum(axis=1)
            self._density = weights / weights.sum()
        return self._density

    def spread(self) -> float:
        """Standard deviation of ln C_max."""
        density = self.density()
        mean = float(density @ self.log_clusters)
        return math.sqrt(float(density @ (self.log_clusters - mean) ** 2))

    def quantiles(self, shares: Array, low: float = -math.inf, high: float = math.inf) -> Array:
        """Values of ln C_max below which these shares of the probability lie, of what lies in ``[low, high]``."""
        # Half a step further out, so that a point lies inside even where low is high.
        inside = (self.log_clusters >= low - STEP / 2) & (self.log_clusters <= high + STEP / 2)
        found = _quantiles(self.log_clusters[inside], self.density()[inside], shares)
        return found.clip(low, high)

    def curve(self, num_clusters: Array, shares: Array) -> Array:
        """Quantiles of the mean of r_C, shape ``(len(shares), len(num_clusters))``, misfit left out."""
        noise_prior = _log_normal(_NOISES, _NOISE_MEDIAN, _NOISE_SPREAD)
        sides = _log_sum_exp(self._below), _log_sum_exp(self._above)
        rest = self._prior[:, None] + noise_prior
        joint = [(rest + other)[:, :, None] + own for own, other in ((self._below, sides[1]), (self._above, sides[0]))]
        top = max(part.max() for part in joint)
        weights = [np.exp(part - top).sum(axis=1) for part in joint]
        out = np.empty((len(shares), len(num_clusters)))
        for column, clusters in enumerate(num_clusters):
            distance = math.log(clusters) - self.log_clusters
            weight = np.where((distance < 0)[:, None], weights[0], weights[1])
            ratio = 1 - _probit(self._at_cutoff, _SLOPES * distance[:, None])[0]
            order = np.argsort(ratio, axis=None)
            out[:, column] = _quantiles(ratio.ravel()[order], weight.ravel()[order], shares)
        return out


def grid(max_clusters: int) -> Array:
    """The values of ln C at which a crossing is looked for, shape ``(G,)``."""
    points: Array = np.arange(math.log(2) - _BEYOND, math.log(max_clusters) + _BEYOND, STEP)
    return points


def _quantiles(points: Array, weights: Array, shares: Array) -> Array:
    """Quantiles of weighted points that rise, half of a point's weight on each side of it."""
    total = np.cumsum(weights)
    found: Array = np.interp(shares, (total - weights / 2) / total[-1], points)
    return found


def _probit(at_cutoff: float, shift: Array) -> tuple[Array, Array]:
    """Share of unused clusters and its derivative by the shift."""
    from scipy.special import ndtr

    z = at_cutoff + shift
    share: Array = ndtr(z)
    return share, np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _log_normal(values: Array, median: float, spread: float) -> Array:
    """Log probability of values on a geometric grid."""
    density = -0.5 * (np.log(values / median) / spread) ** 2
    normalised: Array = density - np.log(np.exp(density).sum())
    return normalised


def _log_sum_exp(values: Array) -> Array:
    top = values.max(axis=-1)
    total: Array = top + np.log(np.exp(values - top[..., None]).sum(axis=-1))
    return total
