"""The rule of the paper for C_max: doubling, then bisection, one reading for each C."""

from cedm_ray.clustering.probes import Outcome, Probe, Reading
from cedm_ray.errors import require


class PaperRule:
    """Which number of clusters to try next, and what the readings say about C_max.

    C_max is the first number of clusters C at which the utilization ratio r_C falls to the cutoff (r_C <= cutoff). The
    search doubles C from ``c_start`` while r_C stays above the cutoff, then bisects between the last C above and the
    first C at or below it. Where already ``c_start`` is at or below the cutoff, it halves C instead, down to 2.

    Ask and tell: :meth:`ask` hands out one C at a time, and :meth:`tell` takes readings in any order, also of a C that
    was never asked for, such as stored results. Everything but :meth:`ask` depends on the set of readings alone, so a
    new search that is told the old readings goes on where the old one stopped. A curve that is not monotone ends the
    search too: the smallest C read at or below the cutoff counts, and readings above it no longer do.

    Args:
        c_start: First number of clusters to try, in ``[2, max_clusters]``.
        cutoff: Utilization ratio at or below which clusters count as left unused, in ``(0, 1]``.
        resolution: Clusters between the two ends of the interval at which bisection stops, at least 1.
        max_clusters: Largest number of clusters to try; None where nothing but r_C ends the doubling.

    Raises:
        ValueError: If an argument lies outside its bounds.

    Source: arXiv 2403.00570, Sec. 3.3.
    """

    def __init__(
        self,
        c_start: int,
        cutoff: float = 0.96,
        *,
        resolution: int = 1,
        max_clusters: int | None = None,
    ) -> None:
        require(max_clusters is None or max_clusters >= 2, "max_clusters", max_clusters, "be at least 2")
        self.max_clusters = max_clusters
        self._require_in_range("c_start", c_start)
        require(0 < cutoff <= 1, "cutoff", cutoff, "lie in (0, 1]")
        require(resolution >= 1, "resolution", resolution, "be at least 1 cluster")
        self.c_start, self.cutoff, self.resolution = c_start, cutoff, resolution
        self._readings: dict[int, float] = {}
        self._outstanding: int | None = None

    @property
    def readings(self) -> list[Reading]:
        """All readings in the order in which they were told."""
        return [Reading(Probe(clusters), ratio) for clusters, ratio in self._readings.items()]

    @property
    def interval(self) -> tuple[int, int | None]:
        """Largest C known to lie above the cutoff before C_max, and smallest C at or below it (None: none yet).

        One cluster is always used, so the lower end is 1 before anything was read.
        """
        at_or_below = [c for c, ratio in self._readings.items() if ratio <= self.cutoff]
        upper = min(at_or_below, default=None)
        above = [c for c, ratio in self._readings.items() if ratio > self.cutoff and (upper is None or c < upper)]
        return max(above, default=1), upper

    @property
    def outcome(self) -> Outcome:
        """How the search stands.

        ``searching``: more probes are needed. ``found``: C_max is known to the resolution. ``capped``: even
        ``max_clusters`` lies above the cutoff, so C_max is at least that. ``empty``: C_max is 2, so there is no C in
        [2, C_max) to train; the features or the clustering are unfit for these images.
        """
        lower, upper = self.interval
        if upper is None:
            return "capped" if lower == self.max_clusters else "searching"
        if upper == 2:
            return "empty"
        return "found" if upper - lower <= self.resolution else "searching"

    @property
    def done(self) -> bool:
        """Whether no further probe is needed."""
        return self.outcome != "searching"

    @property
    def c_max(self) -> int | None:
        """Smallest C read at or below the cutoff once the search is done; ``max_clusters`` if capped; None before."""
        if not self.done:
            return None
        upper = self.interval[1]
        return self.max_clusters if upper is None else upper

    def ask(self, k: int = 1) -> list[Probe]:
        """The probe to run next; never more than one, however many could run at once, since each depends on the last.

        Returns:
            One probe, of a C that was not told yet; none if the search is done or the probe handed out last was not
            told yet (:attr:`done` tells the two apart).
        """
        require(k >= 1, "k", k, "be at least 1")
        if self.done or self._outstanding is not None:
            return []
        self._outstanding = self._next()
        return [Probe(self._outstanding)]

    def tell(self, probe: Probe, ratio: float) -> None:
        """Take the reading of a probe.

        Args:
            probe: What was tried: at full fidelity, not a repeat; need not have been asked for.
            ratio: Utilization ratio r_C that was found, in ``(0, 1]``.

        Raises:
            ValueError: If a value lies outside its bounds, or contradicts an earlier reading of the same C.
        """
        clusters = probe.num_clusters
        self._require_in_range("num_clusters", clusters)
        require(probe == Probe(clusters), "probe", probe, "be the first of its C, at full fidelity")
        told, shown = self._readings.get(clusters, ratio), f"{ratio} at {clusters} clusters"
        require(0 < ratio <= 1, "ratio", shown, "lie in (0, 1]")
        require(told == ratio, "ratio", shown, f"be {told}, as told before")
        self._readings[clusters] = ratio
        if clusters == self._outstanding:
            self._outstanding = None

    def _next(self) -> int:
        lower, upper = self.interval
        if upper is None:  # doubling
            wanted = self.c_start if lower < self.c_start else 2 * lower
            return wanted if self.max_clusters is None else min(wanted, self.max_clusters)
        if lower == 1:  # nothing above the cutoff yet: halving
            return max(2, upper // 2)
        return (lower + upper) // 2

    def _require_in_range(self, name: str, clusters: int) -> None:
        most = self.max_clusters
        bound = "be at least 2" if most is None else f"lie in [2, max_clusters], [2, {most}]"
        require(clusters >= 2 and (most is None or clusters <= most), name, clusters, bound)
