"""Made-up learning curves over C on which benchmarks/granularity.py replays the search."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cedm_ray.settings import GranularitySettings

SETTINGS = GranularitySettings()
BEST_FID = 2.31  # of CIFAR-100 (arXiv 2403.00570, Table 2)
RETRAINING, SETS = 0.015, 0.005  # luck of a training and of a set of images: standard deviations of ln(score)


@dataclass(frozen=True)
class Curves:
    """The learning curves of one seed."""

    num_clusters: np.ndarray
    kimg: np.ndarray
    score: np.ndarray
    """Shape (M, R)."""
    expected: np.ndarray | None = None
    """At the end of training, free of luck, shape (M,)."""
    unconditional: float | None = None

    def regret(self, candidate: int, *, luck: bool = False) -> float:
        """How much worse a candidate is than the best one; with this seed's luck, or free of it where that is known."""
        end_scores = self.score[:, -1] if self.expected is None or luck else self.expected
        return float(end_scores[candidate] / end_scores.min() - 1)

    def rungs(self) -> list[int]:
        """Columns nearest to the rungs of the product's own plan, the last one among them."""
        total = int(self.kimg[-1])
        wanted = [rung / SETTINGS.total_kimg * total for rung in SETTINGS.rungs_kimg()]
        return sorted({int(np.abs(np.log(self.kimg / kimg)).argmin()) for kimg in wanted})


def usual(seed: int, *, published: bool) -> Curves:
    """One seed of the two families that were at hand while the fitted rule was made."""
    rng = np.random.default_rng(seed)
    kimg = np.array(SETTINGS.rungs_kimg())
    end_of_range = 250 if published else int(np.exp(rng.uniform(np.log(60), np.log(600))))
    num_clusters = log_grid(end_of_range, 12 if seed % 2 else 24)
    u = np.log(num_clusters)
    # The parabola in ln C through the three published values has its lowest point at C = 207.
    best = rng.normal(np.log(207), 0.1) if published else rng.uniform(0.55 * u[0] + 0.45 * u[-1], u[-1])
    left = 0.1136 / BEST_FID * np.exp(rng.normal(0, 0.1 if published else 0.4))
    right = left * np.exp(rng.normal(0.7, 0.5))
    worst = 0.5 if published else rng.uniform(0.3, 0.8)  # ln of how much worse it is without clusters
    final = np.log(BEST_FID) + worst * np.tanh(np.where(u < best, left, right) * (u - best) ** 2 / worst)
    course = (kimg / kimg[-1]) ** -rng.uniform(0.3, 0.6) - 1
    scores = final[:, None] + _slopes(u, rng)[:, None] * course + _luck(kimg, len(u), rng)
    return Curves(num_clusters, kimg, np.exp(scores), np.exp(final), float(BEST_FID * np.exp(worst)))


Course = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""How far ln(score) is above its end: of the share of the images seen (R,) and of each C's slope (M,), shape (M, R)."""


def power_course(share: np.ndarray, slopes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.outer(slopes, share ** -rng.uniform(0.3, 0.6) - 1)


def exponential_course(share: np.ndarray, slopes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rate = rng.uniform(2, 6)
    return np.outer(2 * slopes, np.exp(-rate * share) - np.exp(-rate))


def logarithmic_course(share: np.ndarray, slopes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The score itself falls by the same amount for every doubling of the images."""
    return np.log1p(-np.outer(slopes, np.log(share)))


@dataclass(frozen=True)
class Family:
    """What sets a family of hard curves apart from the usual ones."""

    grid_points: int
    best: tuple[float, float] = (0.45, 1.0)
    """Between which shares of the range of ln C the best C lies."""
    course: Course = power_course
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Of the images at which trainings are scored."""
    is_v: bool = False
    """Whether ln(score) is a V in ln C, instead of a U that flattens out."""
    independent_luck: bool = False
    """Whether each rung has a luck of its own, instead of one that lasts over neighbouring rungs."""
    moves: tuple[float, float] | None = None
    """By how much the best ln C moves from the first rung to the end, at least and at most. Slopes are then alike."""


HARD = {
    "V, luck of every rung": Family(24, is_v=True, independent_luck=True),
    "left, exponential": Family(20, best=(0.0, 0.35), course=exponential_course),
    "anywhere": Family(16, best=(0.0, 1.0)),
    "logarithmic": Family(12, course=logarithmic_course),
    "three rungs": Family(10, shares=(0.2, 0.45, 1.0)),
    "best C moves": Family(20, best=(0.0, 1.0), moves=(1.25, 1.75)),
}


def hard(family: Family, seed: int) -> Curves:
    """One seed of a family that was made to be hard."""
    rng = np.random.default_rng(seed)
    num_clusters, kimg, free_of_luck = without_luck(family, rng)
    luck = _luck(kimg, len(num_clusters), rng, independent=family.independent_luck)
    return Curves(num_clusters, kimg, np.exp(free_of_luck + luck), np.exp(free_of_luck[:, -1]))


def without_luck(family: Family, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of clusters (M,), kimg (R,), and ln(score) (M, R) as it is expected."""
    num_clusters = log_grid(int(np.exp(rng.uniform(np.log(60), np.log(600)))), family.grid_points)
    u, share = np.log(num_clusters), np.array(family.shares)
    middle, (low, high) = (u[0] + u[-1]) / 2, family.best
    best = np.full(len(share), rng.uniform((1 - low) * u[0] + low * u[-1], (1 - high) * u[0] + high * u[-1]))
    slopes = _slopes(u, rng)
    if family.moves is not None:  # from the side with more room
        best += np.log(share) / np.log(share[0]) * rng.uniform(*family.moves) * (1 if best[-1] < middle else -1)
        slopes = np.full(len(u), slopes.mean())
    distance = u[:, None] - best
    if family.is_v:
        left, right = np.exp(rng.uniform(np.log(0.08), np.log(0.25), 2))
        shape = np.where(distance < 0, left, right) * np.abs(distance)
    else:
        left = 0.1136 / BEST_FID * np.exp(rng.normal(0, 0.4))
        right, worst = left * np.exp(rng.normal(0.7, 0.5)), rng.uniform(0.3, 0.8)
        shape = worst * np.tanh(np.where(distance < 0, left, right) * distance**2 / worst)
    kimg = np.round(share * SETTINGS.total_kimg).astype(int)
    return num_clusters, kimg, np.log(BEST_FID) + shape + family.course(share, slopes, rng)


def log_grid(end: int, count: int) -> np.ndarray:
    """At most so many whole numbers in [2, end), log-spaced: what is rounded to one number counts once."""
    return np.unique(np.round(np.geomspace(2, end - 1, count)).astype(int))


def _slopes(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How fast ln(score) falls for each C, shape (M,): unlike, so that curves cross."""
    middle = 2 * (u - u.mean()) / np.ptp(u)
    wave = np.sin(rng.uniform(0.5, 1.5) * u + rng.uniform(0, 2 * np.pi))
    return np.asarray(rng.uniform(0.25, 0.6) * np.exp(rng.normal(0, 0.12) * middle + rng.normal(0, 0.06) * wave))


def _luck(kimg: np.ndarray, count: int, rng: np.random.Generator, *, independent: bool = False) -> np.ndarray:
    """Of so many trainings at each rung, in ln(score), shape (M, R)."""
    distance = np.abs(np.log(kimg)[:, None] - np.log(kimg)[None])
    alike = np.eye(len(kimg)) if independent else np.exp(-distance / 1.5)
    luck = rng.multivariate_normal(np.zeros(len(kimg)), RETRAINING**2 * alike, size=count)
    return np.asarray(luck + rng.normal(0, SETS, luck.shape))
