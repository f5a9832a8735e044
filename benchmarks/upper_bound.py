"""The search for C_max replayed on known curves r(C) with noise: the fit beside the paper's rule and bisection.

    python benchmarks/upper_bound.py --replays 200
    python benchmarks/upper_bound.py --table used.json

A table is a JSON object {"images": N, "used": {"C": clusters used, ...}}, such as utilization_cifar100.json beside this
script; r(C) is interpolated in ln C and goes on beyond the largest C with the last slope (in probits). A reading is
r(C) plus normal noise, rounded to whole clusters. Without a table of one's own, a random family of synthetic curves is
replayed beside the table: C_max from 20 to 5,000, each side of it a power of C of its own, a plateau, or a line, with
the same noise or with that of C clusters that are used or not; the latter is 0.4 times as large for the fit, which
reads the mean over the heads of a training. A cheap reading is one of the same curve moved by a
factor in C that is drawn once for each replay. True is the C at which the curve, made decreasing by isotonic
regression, falls to the cutoff. Compute is counted in epochs of full fidelity. Some minutes on one core.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from record import arguments, end
from rich.console import Console
from rich.table import Table
from scipy.optimize import isotonic_regression
from scipy.special import ndtr, ndtri

from cedm_ray.clustering.paper_rule import PaperRule
from cedm_ray.clustering.probes import Probe, Reading
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.settings import BoundSettings

Curve = Callable[[float], float]
HERE = Path(__file__).parent
CUTOFF, C_START = 0.96, 100
MEAN_OF_HEADS = 0.4  # scatter of the mean of eight heads over that of one, at most, in probe_fidelity.py
PAPER, OURS = "paper's rule", "fit, cheap probes first"


@dataclass(frozen=True)
class Case:
    """A curve to search on."""

    name: str
    curve: Curve
    true: float
    largest: int
    binomial: bool = False
    """Whether the noise is that of C clusters which are used or not, instead of ``--noise``."""


@dataclass(frozen=True)
class Outcome:
    """One replay of one search."""

    error: float
    """``|C_max / true - 1|``."""
    probes: int
    cost: float
    """In probes of full fidelity."""
    rounds: int
    covered: bool
    """Whether the interval holds the true C_max."""
    width: float
    """Upper end of the interval over its lower end."""


def table_case(path: Path) -> Case:
    """The curve through a table of used clusters.

    Raises:
        ValueError: If the file is no such table, or its curve never falls to the cutoff.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        points = sorted((int(c), int(used) / int(c)) for c, used in tree["used"].items())
        largest = int(tree["images"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f'{path} is no table {{"images": N, "used": {{"C": clusters used}}}}: {error!r}') from error
    if len(points) < 2 or not all(2 <= c <= largest and 0 < ratio <= 1 for c, ratio in points):
        raise ValueError(f"{path} must hold two or more C in [2, {largest}], each with 1 to C clusters used")
    logs, ratios = np.log([c for c, _ in points]), np.array([ratio for _, ratio in points])
    true = _crossing(logs, isotonic_regression(ratios, increasing=False).x)
    if not 2 <= true <= largest:
        raise ValueError(f"the curve of {path} does not fall to {CUTOFF} between C = 2 and {largest}, its images")
    return Case(path.stem, lambda c: _interpolated(math.log(c), logs, ratios), true, largest)


def _interpolated(log_c: float, logs: np.ndarray, ratios: np.ndarray) -> float:
    if log_c <= logs[-1]:
        return float(np.interp(log_c, logs, ratios))
    near, far = ndtri(np.clip(1 - ratios[-2:], 1e-4, 1 - 1e-4))
    slope = max((far - near) / (logs[-1] - logs[-2]), 0.1)  # a last step upwards must not go on
    return float(1 - ndtr(far + slope * (log_c - logs[-1])))


def _crossing(logs: np.ndarray, ratios: np.ndarray) -> float:
    fine = np.arange(logs[0], logs[-1] + 7, 1e-4)
    values = np.array([_interpolated(x, logs, ratios) for x in fine])
    below = np.flatnonzero(values <= CUTOFF)
    return float(np.exp(fine[below[0]])) if below.size else math.inf


def synthetic_case(rng: np.random.Generator, largest: int) -> Case:
    """A random decreasing curve."""
    true, cut = math.exp(rng.uniform(math.log(20), math.log(5000))), 1 - CUTOFF
    below, above = np.exp(rng.uniform(math.log(0.7), math.log(4), 2))
    plateau = math.exp(rng.uniform(math.log(0.08), math.log(0.6)))
    shapes: dict[str, Curve] = {
        "bent power": lambda c: cut * (c / true) ** (below if c < true else above),
        "plateau": lambda c: plateau / (1 + (plateau / cut - 1) * (true / c) ** max(below, 1.5)),
        "line": lambda c: cut * c / true,
    }
    name = str(rng.choice(list(shapes)))
    return Case(name, lambda c: 1 - min(shapes[name](c), 0.95), true, largest, bool(rng.random() < 0.5))


class Reader:
    """Reads r(C) with noise; the same probe always reads the same."""

    def __init__(self, case: Case, args: Any, rng: np.random.Generator, *, mean: bool) -> None:
        self._case, self._sigma, self._rng, self._mean = case, args.sigma, rng, mean
        self._low_factor = math.exp(args.low_spread * rng.standard_normal())

    def __call__(self, probe: Probe) -> float:
        clusters = probe.num_clusters
        ratio = self._case.curve(clusters / (self._low_factor if probe.fidelity == "low" else 1))
        sigma = math.sqrt(max(ratio * (1 - ratio), 0) / clusters) if self._case.binomial else self._sigma
        if self._mean and self._case.binomial:
            return min(max(ratio + MEAN_OF_HEADS * sigma * self._rng.standard_normal(), 1 / clusters), 1.0)
        used = round((ratio + sigma * self._rng.standard_normal()) * clusters)
        return min(max(used, 1), clusters) / clusters


class ThreefoldBisection:
    """Doubling and bisection where each C is judged by the mean of three readings; its bracket is its interval."""

    def __init__(self, largest: int, resolution: int) -> None:
        self._largest, self._resolution = largest, resolution
        self._sums: dict[int, list[float]] = {}
        self._lower, self._upper = 1, None

    @property
    def done(self) -> bool:
        if self._upper is None:
            return self._lower == self._largest
        return self._upper - self._lower <= self._resolution or self._upper == 2

    @property
    def c_max(self) -> int:
        return self._upper or self._largest

    @property
    def interval(self) -> tuple[int, int]:
        return self._lower, self.c_max

    @property
    def readings(self) -> list[Reading]:
        return [Reading(Probe(c, i), ratio) for c, read in self._sums.items() for i, ratio in enumerate(read)]

    def ask(self, k: int = 1) -> list[Probe]:
        if self.done:
            return []
        if self._upper is None:
            wanted = min(C_START if self._lower < C_START else 2 * self._lower, self._largest)
        else:
            wanted = max(2, (self._lower + self._upper) // 2) if self._lower > 1 else max(2, self._upper // 2)
        return [Probe(wanted, len(self._sums.get(wanted, ())))]

    def tell(self, probe: Probe, ratio: float) -> None:
        read = self._sums.setdefault(probe.num_clusters, [])
        read.append(ratio)
        if len(read) == 3 and np.mean(read) <= CUTOFF:
            self._upper = probe.num_clusters
        elif len(read) == 3:
            self._lower = probe.num_clusters


def replay(search: UpperBoundSearch | PaperRule | ThreefoldBisection, case: Case, read: Reader, args: Any) -> Outcome:
    """Run a search to its end, ``args.k`` probes a round."""
    rounds = 0
    while probes := search.ask(args.k):
        rounds += 1
        for probe in probes:
            search.tell(probe, read(probe))
    told = [reading.probe for reading in search.readings]
    low = sum(probe.fidelity == "low" for probe in told)
    lower, upper = search.interval[0], search.interval[1] or case.largest
    error = abs((search.c_max or 2) / case.true - 1)
    cost = len(told) - low + low * args.low_cost
    return Outcome(error, len(told), cost, rounds, lower <= case.true <= upper, upper / lower)


def searches(case: Case, args: Any) -> dict[str, Any]:
    """The searches that are compared, each new."""
    ours = {
        "max_clusters": case.largest,
        "precision": args.precision,
        "confidence": args.confidence,
        "max_probes": args.max_probes,
    }
    return {
        PAPER: PaperRule(C_START, CUTOFF, resolution=args.resolution, max_clusters=case.largest),
        "bisection x 3": ThreefoldBisection(case.largest, args.resolution),
        "fit": UpperBoundSearch(C_START, CUTOFF, resolution=args.resolution, **ours),
        OURS: UpperBoundSearch(C_START, CUTOFF, resolution=args.resolution, low_spread=args.low_spread, **ours),
    }


def replays(cases: Iterable[Case], args: Any, seed: int) -> dict[str, list[Outcome]]:
    """Every search on every case; the noise of a replay is drawn anew for each search."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Outcome]] = {}
    for case in cases:
        for name, search in searches(case, args).items():
            read = Reader(case, args, rng, mean=isinstance(search, UpperBoundSearch))
            found.setdefault(name, []).append(replay(search, case, read, args))
    return found


def figures(found: dict[str, list[Outcome]]) -> dict[str, float]:
    """What the fitted search with cheap probes reaches, and what it costs beside the paper's rule."""
    ours, paper = found[OURS], found[PAPER]
    return {
        "coverage": float(np.mean([one.covered for one in ours])),
        "median_relative_error": float(np.median([one.error for one in ours])),
        "probes_ratio": sum(one.probes for one in ours) / sum(one.probes for one in paper),
        "compute_ratio": sum(one.cost for one in ours) / sum(one.cost for one in paper),
        "median_relative_error_paper": float(np.median([one.error for one in paper])),
        "replays": len(ours),
    }


def table_of(title: str, found: dict[str, list[Outcome]]) -> Table:
    """One row for each search: means, but for the median of the error and of the width."""
    table = Table(title=title, title_justify="left")
    heads = ("search", "probes", "rounds", "epochs", "error", "90 %", "coverage", "width")
    for head in heads:
        table.add_column(head, justify="left" if head == "search" else "right")
    for name, all_of in found.items():
        errors = np.array([one.error for one in all_of])
        table.add_row(
            name,
            f"{np.mean([one.probes for one in all_of]):.1f}",
            f"{np.mean([one.rounds for one in all_of]):.1f}",
            f"{np.mean([one.cost for one in all_of]) * TemiSettings().epochs:,.0f}",
            f"{np.median(errors):.1%}",
            f"{np.quantile(errors, 0.9):.1%}",
            f"{np.mean([one.covered for one in all_of]):.1%}",
            f"x {np.median([one.width for one in all_of]):.2f}",
        )
    return table


def main() -> None:
    parser = arguments(__doc__)
    settings = BoundSettings()
    parser.add_argument("--table", type=Path, help="replay this table of used clusters, and nothing else")
    parser.add_argument("--replays", type=int, default=200, help="searches of each kind on each set of curves")
    parser.add_argument("--sigma", type=float, default=0.005, help="standard deviation of a reading of r_C")
    parser.add_argument("--k", type=int, default=1, help="probes that run at once")
    parser.add_argument("--low-cost", type=float, default=0.08, help="cost of a cheap probe, full is 1")
    parser.add_argument(
        "--low-spread", type=float, default=settings.low_spread, help="spread of ln C_max at low fidelity"
    )
    parser.add_argument("--precision", type=float, default=settings.precision)
    parser.add_argument("--confidence", type=float, default=settings.confidence)
    parser.add_argument("--max-probes", type=int, default=settings.max_probes)
    parser.add_argument("--resolution", type=int, default=settings.resolution)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        table = table_case(args.table or HERE / "utilization_cifar100.json")
    except ValueError as error:
        parser.error(str(error))
    sets = {f"{table.name}, C_max {table.true:.0f}": [table] * args.replays}
    if args.table is None:
        rng = np.random.default_rng(args.seed)
        sets["synthetic curves"] = [synthetic_case(rng, table.largest) for _ in range(args.replays)]
    console, every, by_set = Console(width=110), {}, {}
    for title, cases in sets.items():
        found = replays(cases, args, args.seed)
        console.print(table_of(title, found))
        by_set[title] = figures(found)
        for name, outcomes in found.items():
            every.setdefault(name, []).extend(outcomes)
    end({**figures(every), "by_set": by_set}, args.json)


if __name__ == "__main__":
    main()
