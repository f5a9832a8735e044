"""The cheap search for C_max: where clustering stops using every cluster it is given, with an honest interval."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cedm_ray.clustering.crossing import Crossing
from cedm_ray.clustering.probes import Fidelity, Outcome, Probe, Reading
from cedm_ray.errors import require

_GROWTH = 4  # no probe lies further than this factor above the largest C that was still used well
_SAME = 0.02  # a probe this close to an earlier one, in ln C, repeats it with a new seed
_LEFT, _RIGHT = 0.2, 0.8  # quantiles of C_max between which probes stand: readings on both sides tell the slopes
_MAX_LOW = 6  # cheap readings, however little they have told by then
_LEAST = 2  # full readings, however sure the first one makes it


class UpperBoundSearch:
    """Which number of clusters to try next, and what the readings say about C_max.

    C_max is the number of clusters C at which the utilization ratio r_C falls to the cutoff. One training's r_C is a
    random draw, so the search keeps a distribution of C_max (:class:`~cedm_ray.clustering.crossing.Crossing`), places
    probes where that distribution has its mass, repeats them with new seeds once they fall together, and ends when the
    central ``confidence`` of it is narrow enough. With a low fidelity it brackets first: cheap readings, whose own
    C_max is off by ``low_spread``, until they know no better than that; only readings at full fidelity decide.

    Ask and tell: :meth:`ask` hands out up to k probes at once, and :meth:`tell` takes readings in any order, also of
    probes that were never asked for, such as stored results. What the search says depends on the set of readings alone.

    Args:
        c_start: First number of clusters to try, in ``[2, max_clusters]``.
        cutoff: Utilization ratio at which C_max lies, in ``(0, 1)``.
        max_clusters: Largest number of clusters to try.
        precision: The search ends, after two full readings at the earliest, when the upper end of the interval is at
            most ``(1 + precision)^2`` times the lower one.
        resolution: It then also ends when the interval is at most this many clusters wide and its upper end at most
            twice its lower one, at least 1.
        confidence: Probability that the interval holds C_max, in ``(0, 1)``.
        max_probes: Probes of full fidelity after which it ends in any case, at least 1; twice as many where so many
            readings lie above the cutoff, since r_C had not fallen to it until then.
        low_spread: Standard deviation of ln C_max at low fidelity about that at full fidelity; None to ask for full
            fidelity only.

    Raises:
        ValueError: If an argument lies outside its bounds.

    Source: arXiv 2403.00570, Sec. 3.3, for C_max; see :class:`~cedm_ray.clustering.crossing.Crossing` for its
    distribution.
    """

    def __init__(
        self,
        c_start: int,
        cutoff: float = 0.96,
        *,
        max_clusters: int,
        precision: float = 0.2,
        resolution: int = 10,
        confidence: float = 0.95,
        max_probes: int = 12,
        low_spread: float | None = None,
    ) -> None:
        require(max_clusters >= 2, "max_clusters", max_clusters, "be at least 2")
        require(2 <= c_start <= max_clusters, "c_start", c_start, f"lie in [2, max_clusters], [2, {max_clusters}]")
        require(0 < cutoff < 1, "cutoff", cutoff, "lie in (0, 1)")
        require(precision > 0, "precision", precision, "be above 0")
        require(resolution >= 1, "resolution", resolution, "be at least 1 cluster")
        require(0 < confidence < 1, "confidence", confidence, "lie in (0, 1)")
        require(max_probes >= 1, "max_probes", max_probes, "be at least 1")
        require(low_spread is None or low_spread > 0, "low_spread", low_spread, "be above 0")
        self.c_start, self.cutoff, self.max_clusters = c_start, cutoff, max_clusters
        self.precision, self.resolution, self.confidence = precision, resolution, confidence
        self.max_probes, self.low_spread = max_probes, low_spread
        self._readings: dict[Probe, float] = {}
        self._pending: list[Probe] = []
        start = Crossing.around(c_start, max_clusters)
        self._low, self._full = (Crossing(cutoff, max_clusters, start) for _ in range(2))

    @property
    def readings(self) -> list[Reading]:
        """All readings in the order in which they were told."""
        return [Reading(probe, ratio) for probe, ratio in self._readings.items()]

    @property
    def interval(self) -> tuple[int, int]:
        """The central interval that holds C_max with probability ``confidence``, within ``[2, max_clusters]``."""
        tail = (1 - self.confidence) / 2
        lower, upper = np.exp(self._full.quantiles(np.array([tail, 1 - tail]))).clip(2, self.max_clusters)
        return math.floor(lower), math.ceil(upper)

    @property
    def outcome(self) -> Outcome:
        """How the search stands.

        ``searching``: more probes are needed. ``found``: the interval is as narrow as wanted. ``out_of_probes``: it is
        wider, but ``max_probes`` are spent. ``capped``: as found, but the median lies beyond ``max_clusters``, which is
        all that is known of C_max. ``empty``: it has ended with a median of 2, so there is no C in [2, C_max) to train;
        the features or the clustering are unfit for these images.
        """
        count = len(self._told("full"))
        lower, upper = self.interval
        if count == 0:
            return "searching"
        if upper == 2:
            return "empty"
        if lower == self.max_clusters:
            return "capped"
        few = upper - lower <= self.resolution and upper <= 2 * lower
        narrow = count >= _LEAST and (few or upper <= lower * (1 + self.precision) ** 2)
        if not narrow and count < self._limit():
            return "searching"
        if self._median() == 2:
            return "empty"
        if narrow and self._median() > self.max_clusters:
            return "capped"
        return "found" if narrow else "out_of_probes"

    @property
    def done(self) -> bool:
        """Whether no further probe is needed."""
        return self.outcome != "searching"

    @property
    def c_max(self) -> int | None:
        """Median of C_max, rounded up, once the search is done; ``max_clusters`` if capped; None before."""
        return min(self._median(), self.max_clusters) if self.done else None

    def curve(self, num_clusters: NDArray[np.float64]) -> NDArray[np.float64]:
        """The fitted mean of r_C.

        Args:
            num_clusters: Numbers of clusters, shape ``(M,)``, above 0.

        Returns:
            Lower end, median and upper end of its ``confidence`` band, shape ``(3, M)``.
        """
        tail = (1 - self.confidence) / 2
        return self._full.curve(num_clusters, np.array([tail, 0.5, 1 - tail]))

    def ask(self, k: int = 1) -> list[Probe]:
        """Up to ``k`` probes to run now, beside those handed out and not told yet.

        Args:
            k: How many more can run at once, at least 1; with 1, and each told before the next, the search is
                sequential.

        Returns:
            The probes, none of which was told or asked for before; none if the search is done, or if what is under way
            may end it.
        """
        require(k >= 1, "k", k, "be at least 1")
        asked: list[Probe] = []
        while len(asked) < k and not self.done:
            fidelity: Fidelity = "low" if self._brackets() else "full"
            limit = _MAX_LOW if fidelity == "low" else self._limit()
            if len(self._told(fidelity)) + len(self._under_way(fidelity)) >= limit:
                break
            asked.append(self._place(fidelity, k - len(asked)))
            self._pending.append(asked[-1])
        return asked

    def tell(self, probe: Probe, ratio: float) -> None:
        """Take the reading of a probe.

        Args:
            probe: What was tried; need not have been asked for.
            ratio: Utilization ratio r_C that was found, in ``(0, 1]``; the mean over the heads of a training says more
                than that of a single one.

        Raises:
            ValueError: If a value lies outside its bounds, or contradicts an earlier reading of the same probe.
        """
        clusters, bound = probe.num_clusters, f"lie in [2, max_clusters], [2, {self.max_clusters}]"
        require(2 <= clusters <= self.max_clusters, "num_clusters", clusters, bound)
        require(0 < ratio <= 1, "ratio", ratio, "lie in (0, 1]")
        if probe in self._pending:
            self._pending.remove(probe)
        if probe in self._readings:
            require(self._readings[probe] == ratio, "ratio", ratio, f"be {self._readings[probe]}, as told before")
            return
        self._readings[probe] = ratio
        (self._low if probe.fidelity == "low" else self._full).tell(clusters, ratio)
        if probe.fidelity == "low" and self.low_spread is not None:
            self._full.expect(self._low.shifted(self.low_spread))

    def _limit(self) -> int:
        """Full probes that may be spent: more where r_C was slow to fall, since little is known of C_max then.

        Readings that fall later leave it as it is: the first of them is what tells where C_max lies.
        """
        full = [ratio for probe, ratio in self._readings.items() if probe.fidelity == "full"]
        above = sum(ratio > self.cutoff for ratio in full)
        return 2 * self.max_probes if above >= self.max_probes else self.max_probes

    def _median(self) -> int:
        """Rounded up, at least 2; may lie beyond ``max_clusters``."""
        return max(math.ceil(math.exp(float(self._full.quantiles(np.array([0.5]))[0]))), 2)

    def _brackets(self) -> bool:
        """Whether cheap readings still have something to tell."""
        if self.low_spread is None or self._told("full") or self._under_way("full"):
            return False
        return len(self._told("low")) < _MAX_LOW and self._low.spread() > self.low_spread

    def _place(self, fidelity: Fidelity, more: int) -> Probe:
        """Where a further probe tells most: at the quantile of C_max that those under way leave most bare."""
        if not self._readings and not self._pending:
            return Probe(self.c_start, fidelity=fidelity)
        crossing = self._low if fidelity == "low" else self._full
        under_way = self._under_way(fidelity)
        used_well = [probe.num_clusters for probe, ratio in self._readings.items() if ratio > self.cutoff]
        top = min(self.max_clusters, _GROWTH * max(used_well, default=self.c_start))
        shares = _levels(len(under_way) + more, len(self._told(fidelity)))
        places = np.exp(crossing.quantiles(shares, math.log(2), math.log(top))).tolist()
        for probe in under_way:
            places.remove(min(places, key=lambda place: abs(math.log(place / probe.num_clusters))))
        return self._probe(places[0], fidelity)

    def _probe(self, place: float, fidelity: Fidelity) -> Probe:
        """A probe at a place, or a repeat of one that lies so close that nothing is gained by another C."""
        every = [probe for probe in [*self._readings, *self._pending] if probe.fidelity == fidelity]
        clusters = min(max(round(place), 2), self.max_clusters)
        nearest = min((probe.num_clusters for probe in every), key=lambda c: abs(math.log(c / place)), default=clusters)
        if abs(math.log(nearest / place)) < _SAME:
            clusters = nearest
        repeats = {probe.repeat for probe in every if probe.num_clusters == clusters}
        return Probe(clusters, next(i for i in range(len(repeats) + 1) if i not in repeats), fidelity)

    def _told(self, fidelity: Fidelity) -> list[Probe]:
        return [probe for probe in self._readings if probe.fidelity == fidelity]

    def _under_way(self, fidelity: Fidelity) -> list[Probe]:
        return [probe for probe in self._pending if probe.fidelity == fidelity]


def _levels(count: int, told: int) -> NDArray[np.float64]:
    """Shares of C_max's distribution at which ``count`` probes stand; a single one alternates between the sides."""
    if count > 1:
        return np.linspace(_LEFT, _RIGHT, count)
    return np.array([0.5 if told == 0 else (_LEFT, _RIGHT)[told % 2]])
