"""A Gaussian process over learning curves: what every number of clusters would score at the end of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

Array = NDArray[np.float64]
Places = NDArray[np.int64]

LENGTHS = (0.8, 1.6, 3.2)
"""Over which difference in ln C scores stay alike."""
AMPLITUDES = (0.1, 0.3)
"""How far ln(score) at the end of training varies over C: standard deviation."""
TILTS = (0.15, 0.5, 1.2)
"""How much learning curves of different C differ in their slope, as a multiple of the amplitude."""
NOISES = (0.5, 1.2, 3.5, 10.0)
"""Spread of retraining, as multiples of the one that is given."""
EXPONENTS = (0.4, -0.7)
"""ln(score) falls about as a power of the images seen, times a factor of each C's own: fast at first, or steadily."""
DRIFT = 1.5
"""Over which difference in ln(kimg) what is no such power law, and the luck of one training, stay alike."""
SMOOTHER = 1.5
"""The course of training stays alike over so many times the difference in ln C over which scores do."""
SLOPE = 0.4
"""Unit of the slope of ln(score) over ln(kimg) at the end of training."""
COMMON_SLOPE = 0.5
"""Slope that all C have in common: standard deviation, in units of SLOPE."""
COMMON_DRIFT = 0.05
"""What of the course that all C have in common is no power law: standard deviation of ln(score)."""
OWN_DRIFT = 0.3
"""What of a C's own course is no power law: standard deviation of ln(score), as a multiple of tilt times amplitude."""
NOISE_SPREAD = 0.7
"""How far the spread of retraining may be from the one that is given: standard deviation of its logarithm."""
NOISE_OVER_SETS = 3
"""Retrainings scatter so many times as far as sets of images of one training do."""
UNLIKELY = 0.003
"""Weight up to which a hypothesis is left out."""
_NODES = np.linspace(-6, 6, 241)
_WEIGHTS = np.exp(-(_NODES**2) / 2)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Hypothesis:
    """One setting of the process; the posterior is averaged over all of them by their likelihood."""

    length: float
    amplitude: float
    tilt: float
    exponent: float
    noise: float
    """Standard deviation of ln(score) over retrainings."""

    @property
    def sampling_noise(self) -> float:
        """Standard deviation of ln(score) over sets of generated images."""
        return self.noise / NOISE_OVER_SETS


def matern52(distance: Array, length: float) -> Array:
    """Matern covariance of smoothness 5/2 and variance 1 (Rasmussen and Williams 2006, Eq. 4.17)."""
    scaled = np.sqrt(5.0) * np.abs(distance) / length
    return np.asarray((1 + scaled + scaled**2 / 3) * np.exp(-scaled))


class CurveModel:
    """Knows how learning curves of neighbouring numbers of clusters resemble one another.

    The logarithm of a score is the sum of what C scores at the end of training, a smooth function of ln C; a fall over
    training that is common to all C; a smooth deviation from it, so that curves may cross; and the luck of the one
    training and of the one set of images. A reading may be noisy: the process does not pass through it. Multi-fidelity
    Gaussian processes with a kernel for the training's course are those of Swersky et al., arXiv 1406.3896.

    Args:
        num_clusters: Numbers of clusters to choose from, shape ``(M,)``, at least 1 each.
        rungs_kimg: Where trainings are scored, shape ``(R,)``, ascending.
        retrain_spread: Expected standard deviation of ln(score) over retrainings.
    """

    def __init__(self, num_clusters: Sequence[int], rungs_kimg: Sequence[int], retrain_spread: float = 0.015) -> None:
        u = np.log(np.asarray(num_clusters, dtype=np.float64))
        t = np.log(np.asarray(rungs_kimg, dtype=np.float64) / rungs_kimg[-1])
        self.num_clusters = tuple(num_clusters)
        self.num_candidates, self.num_rungs = len(u), len(t)
        # One place per candidate and rung, rung by rung: the last block is the ends of training.
        self._places = np.arange(len(u) * len(t))
        self._last = self._places[-len(u) :]
        distance = u[:, None] - u[None]
        self._alike = {(x, y): matern52(distance, x * y) for x, y in product(LENGTHS, (1.0, SMOOTHER))}
        self._drift = np.exp(-np.abs(t[:, None] - t[None]) / DRIFT)
        falls = {b: (np.exp(-b * t) - 1) / abs(b) for b in EXPONENTS}
        self._falls = {b: fall[:, None] * fall[None] for b, fall in falls.items()}
        self._hypotheses = [
            Hypothesis(length, amplitude, tilt, exponent, noise * retrain_spread)
            for length, amplitude, tilt, exponent, noise in product(LENGTHS, AMPLITUDES, TILTS, EXPONENTS, NOISES)
        ]
        # Spreads far from the expected one are taken up only when the readings ask for them.
        self._log_prior = [-0.5 * (np.log(h.noise / retrain_spread) / NOISE_SPREAD) ** 2 for h in self._hypotheses]

    def _covariance(self, a: Places, b: Places) -> Callable[[Hypothesis], Array]:
        """Prior covariance of places, the luck of each training included, that of the sets of images not.

        Only what is asked for is made: of all places with all it would take gigabytes for hundreds of candidates.

        Args:
            a: Places, of any shape.
            b: Places; the shapes are broadcast.
        """
        (rung_a, candidate_a), (rung_b, candidate_b) = divmod(a, self.num_candidates), divmod(b, self.num_candidates)
        same, drift = candidate_a == candidate_b, self._drift[rung_a, rung_b]
        alike = {length: table[candidate_a, candidate_b] for length, table in self._alike.items()}
        falls = {exponent: SLOPE**2 * table[rung_a, rung_b] for exponent, table in self._falls.items()}

        def under(h: Hypothesis) -> Array:
            fall = falls[h.exponent]
            deviation = (h.tilt * h.amplitude) ** 2 * (fall + OWN_DRIFT**2 * drift)
            return np.asarray(
                1.0
                + COMMON_SLOPE**2 * fall
                + COMMON_DRIFT**2 * drift
                + h.amplitude**2 * alike[h.length, 1]
                + alike[h.length, SMOOTHER] * deviation
                + h.noise**2 * same * drift
            )

        return under

    def fit(self, candidates: Sequence[int], rungs: Sequence[int], values: Sequence[float]) -> Posterior:
        """What the readings say of every candidate at every rung.

        Args:
            candidates: Index of the candidate behind each reading, shape ``(n,)``.
            rungs: Index of the rung of each reading, shape ``(n,)``.
            values: Logarithm of the score, shape ``(n,)``.

        Raises:
            ValueError: If there is no reading.
        """
        if not len(values):
            raise ValueError("no reading is given; at least one is needed")
        places = np.asarray(rungs) * self.num_candidates + np.asarray(candidates)
        y = np.asarray(values, dtype=np.float64)
        centre = float(y.mean())
        prior = self._covariance(places[:, None], places[None])
        found = []
        for h, log_prior in zip(self._hypotheses, self._log_prior, strict=True):
            noisy = prior(h) + h.sampling_noise**2 * np.eye(len(y))
            factor: Array = np.linalg.cholesky(noisy).astype(np.float64)
            white: Array = solve_triangular(factor, y - centre, lower=True)
            evidence = log_prior - 0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
            found.append((evidence, h, factor, white))
        weights = np.exp(np.array([each[0] for each in found]) - max(each[0] for each in found))
        weights /= weights.sum()
        likely = [(float(w), *each[1:]) for w, each in zip(weights, found, strict=True) if w > UNLIKELY]
        return self._mixed(places, centre, likely)

    def _mixed(
        self, places: Places, centre: float, likely: Sequence[tuple[float, Hypothesis, Array, Array]]
    ) -> Posterior:
        """Mean and covariance over the hypotheses, by their weights."""
        total = sum(each[0] for each in likely)
        of_read = self._covariance(places[:, None], self._places[None])
        of_last = self._covariance(self._last[:, None], self._places[None])
        of_self = self._covariance(self._places, self._places)
        mean, variance = np.zeros(len(self._places)), np.zeros(len(self._places))
        joint = np.zeros((self.num_candidates, len(self._places)))
        for weight, h, factor, white in likely:
            share = weight / total
            whitened = solve_triangular(factor, of_read(h), lower=True)
            off = whitened.T @ white
            mean += share * off
            joint += share * (of_last(h) - whitened[:, self._last].T @ whitened + np.outer(off[self._last], off))
            variance += share * (of_self(h) - (whitened**2).sum(0) + h.sampling_noise**2 + off**2)
        joint -= np.outer(mean[self._last], mean)
        variance -= mean**2
        shape = (self.num_rungs, self.num_candidates)
        return Posterior((centre + mean).reshape(shape), variance.reshape(shape), joint.reshape(-1, *shape))


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and covariance of ln(score), given readings."""

    mean: Array
    """Shape ``(R, M)``."""
    variance: Array
    """Of a reading that would be taken there, shape ``(R, M)``."""
    joint: Array
    """Covariance of each candidate's end of training with every place, shape ``(M, R, M)``."""

    @property
    def final(self) -> Array:
        """Expected ln(score) at the end of training, shape ``(M,)``."""
        return np.asarray(self.mean[-1])

    def gain(self, candidate: int, rung: int) -> float:
        """How much lower the lowest expected final ln(score) is expected to be after one more reading.

        Source: the knowledge gradient of Frazier, Powell and Dayanik 2009, its integral by the trapezoidal rule: over
        what the reading may be the lowest of all lines has kinks, at which Gauss and Hermite's is out by up to a half.
        """
        top = int(self.final.argmin())
        move = self.joint[:, rung, candidate] / np.sqrt(self.variance[rung, candidate])
        # Relative to the line that is lowest now, so that tiny gains are no differences of large numbers.
        ahead = (self.final - self.final[top])[:, None] + (move - move[top])[:, None] * _NODES
        return float(-ahead.min(0) @ _WEIGHTS)

    def draw(self, rng: np.random.Generator) -> Array:
        """One sample of all candidates' final ln(score), shape ``(M,)``."""
        covariance = self.joint[:, -1]
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        return np.asarray(self.final + vectors @ (np.sqrt(np.maximum(values, 0)) * rng.standard_normal(len(values))))
