"""Which numbers of clusters are as good as the best one, given how far a training scatters."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

PRIOR_FREEDOM = 4
"""Degrees of freedom that a given spread between retrainings is worth, and that measured ones must have to count."""


@dataclass(frozen=True)
class Trained:
    """One training: its number of clusters and its score on each independent set of images, lower is better."""

    num_clusters: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TieSet:
    """The numbers of clusters whose scores differ from the best one's by no more than trainings scatter."""

    best: int
    """C of the lowest score."""
    clusters: tuple[int, ...]
    """All C that tie with it, itself among them, ascending."""
    smallest: int
    """The smallest of them."""
    margin: float
    """How much worse than the best a C may score and still tie where both were trained once, relative to the score."""
    low: float
    """Score of the best C."""
    high: float
    """Score up to which a C that was trained once ties with it."""
    retrain_spread: float
    """Relative standard deviation between trainings of one C with other seeds, as it was used."""
    sampling_spread: float | None
    """Relative standard deviation between sets of images of one model; None where no model has two."""


@dataclass(frozen=True)
class _ScoresOfC:
    """All trainings of one C: their scores, each a mean over its sets, and their numbers of sets."""

    scores: tuple[float, ...]
    sets: tuple[int, ...]

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)

    def variance(self, retrain_spread: float, sampling_spread: float) -> float:
        """Relative variance of the score of this C."""
        num = len(self.scores)
        return retrain_spread**2 / num + sampling_spread**2 * sum(1 / each for each in self.sets) / num**2


def tie_set(trained: Sequence[Trained], *, retrain_spread: float = 0.015, confidence: float = 0.95) -> TieSet:
    """Find all C whose score cannot be told from the best one's.

    The score of C is the mean over its trainings of the mean over their sets. With n trainings of m_1 ... m_n sets its
    relative variance is ``v_C = r^2 / n + s^2 (1/m_1 + ... + 1/m_n) / n^2`` (for equal m that is
    ``r^2 / n + s^2 / (n m)``), with r the spread between retrainings and s that between sets of one model. C ties with
    the best one, b, where ``score_C <= score_b (1 + z sqrt(v_C + v_b))``, z the one-sided normal quantile of
    ``confidence``: that is the probability of each pair, not of the whole set.

    s is pooled over all trainings of at least two sets (n - 1). r is ``retrain_spread``, unless C that were trained
    several times give at least 4 degrees of freedom, ``d = sum (n - 1)``; then it is
    ``r^2 = (4 retrain_spread^2 + max(Q, 0)) / (4 + d)``. Q is the sum of squares of each training's score about the
    score of its C, relative to it, less what sets account for, ``s^2 (n - 1) / n (1/m_1 + ... + 1/m_n)`` for each C.

    Args:
        trained: The trainings, in any order; several of one C are retrainings with other seeds.
        retrain_spread: Relative standard deviation between retrainings of one C, as far as it is known.
        confidence: Probability with which a C as good as the best ties with it.

    Raises:
        ValueError: If there is no training, a score is not finite and above 0, or another argument is out of its range.
    """
    _check(trained, retrain_spread, confidence)
    by_clusters = _by_clusters(trained)
    sampling = _sampling_spread(trained)
    retrain = _retrain_spread(by_clusters.values(), retrain_spread, sampling or 0.0)
    best = min(by_clusters, key=lambda c: (by_clusters[c].score, c))
    low = by_clusters[best].score
    variances = {c: each.variance(retrain, sampling or 0.0) for c, each in by_clusters.items()}
    z = statistics.NormalDist().inv_cdf(confidence)
    ties = [c for c in by_clusters if by_clusters[c].score <= low * (1 + z * math.sqrt(variances[c] + variances[best]))]
    # A training with as many sets as one of the best C has on average.
    once = retrain**2 + (sampling or 0.0) ** 2 * statistics.fmean(1 / each for each in by_clusters[best].sets)
    return TieSet(
        best=best,
        clusters=tuple(sorted(ties)),
        smallest=min(ties),
        margin=z * math.sqrt(2 * once),
        low=low,
        high=low * (1 + z * math.sqrt(once + variances[best])),
        retrain_spread=retrain,
        sampling_spread=sampling,
    )


def _check(trained: Sequence[Trained], retrain_spread: float, confidence: float) -> None:
    if not trained:
        raise ValueError("trained is empty; at least one training is needed")
    for each in trained:
        if not each.scores or not all(math.isfinite(score) and score > 0 for score in each.scores):
            raise ValueError(f"scores of C={each.num_clusters} are {each.scores}; "
                             "at least one is needed, all finite and above 0")  # fmt: skip
    if not (math.isfinite(retrain_spread) and retrain_spread >= 0):
        raise ValueError(f"retrain_spread is {retrain_spread}; it must be finite and at least 0")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie in (0.5, 1)")


def _by_clusters(trained: Sequence[Trained]) -> dict[int, _ScoresOfC]:
    by_clusters: dict[int, list[Trained]] = defaultdict(list)
    for each in trained:
        by_clusters[each.num_clusters].append(each)
    return {
        c: _ScoresOfC(
            tuple(statistics.fmean(one.scores) for one in all_of_c), tuple(len(one.scores) for one in all_of_c)
        )
        for c, all_of_c in by_clusters.items()
    }


def _sampling_spread(trained: Sequence[Trained]) -> float | None:
    repeated = [each.scores for each in trained if len(each.scores) >= 2]
    if not repeated:
        return None
    squares = sum(chain.from_iterable(_relative_squares(scores) for scores in repeated))
    return math.sqrt(squares / sum(len(scores) - 1 for scores in repeated))


def _retrain_spread(every_c: Iterable[_ScoresOfC], given: float, sampling: float) -> float:
    repeated = [each for each in every_c if len(each.scores) >= 2]
    freedom = sum(len(each.scores) - 1 for each in repeated)
    if freedom < PRIOR_FREEDOM:
        return given
    squares = 0.0
    for each in repeated:
        num = len(each.scores)
        squares += sum(_relative_squares(each.scores))
        squares -= sampling**2 * (num - 1) / num * sum(1 / sets for sets in each.sets)
    return math.sqrt((PRIOR_FREEDOM * given**2 + max(squares, 0.0)) / (PRIOR_FREEDOM + freedom))


def _relative_squares(scores: Sequence[float]) -> list[float]:
    mean = statistics.fmean(scores)
    return [(score / mean - 1) ** 2 for score in scores]


def pareto_front(points: Mapping[int, tuple[float, ...]]) -> tuple[int, ...]:
    """The C that no other one beats: none is at least as good in everything and better in something.

    Args:
        points: What each C costs, lower is better, all of one length.

    Returns:
        The C, ascending; of equal points all stay.

    Raises:
        ValueError: If points are of unlike lengths or hold NaN.
    """
    if len({len(point) for point in points.values()}) > 1 or any(map(math.isnan, chain(*points.values()))):
        raise ValueError(f"points are {dict(points)}; they must be of one length, without NaN")
    return tuple(c for c in sorted(points) if not any(_beats(other, points[c]) for other in points.values()))


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
