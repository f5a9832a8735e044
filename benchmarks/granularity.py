"""The search for the best number of clusters replayed on known learning curves: what it finds, and for how many images.

    python benchmarks/granularity.py --seeds 200
    python benchmarks/granularity.py --families hard --seeds 60
    python benchmarks/granularity.py --curves curves.npz

Curves are score(C, kimg, seed), lower is better. Two families are replayed. One is calibrated on the published FID of
CIFAR-100 at 100 Mimg (2.93 at C = 20, 2.37 at 100, 2.31 at 200; arXiv 2403.00570, Table 2), the other has its best C
anywhere in the upper half of [2, C_max), with C_max from 60 to 600 and sides of random steepness. In both, ln(score) is
a U in ln C that flattens out at the score without clusters, falls as a power of the images seen whose factor varies
with C, so that curves cross, and carries the luck of each training (standard deviation 1.5 %, alike at neighbouring
rungs) and of each set of images (0.5 %). Grids of 12 and of 24 values of C take turns.

With --families hard six others are replayed, each like the random one but in what its name says: a V in ln C whose luck
is independent at every rung (a grid of 24 values of C); the best C in the lower third and an exponential fall (20); the
best C anywhere (16); scores that fall by the logarithm of the images (12); three rungs from 20 % of the images on (10);
a best C that moves by a factor of 3.5 to 6 from the first rung to the end (20).

A file of one's own holds num_clusters (M,), kimg (R,) ascending, score (S, M, R) and, if wanted, unconditional (S, R)
and expected (S, M), the score at the end that is free of luck; where it is missing and the seeds differ by nothing but
independent luck (tested by their second differences over C), it is their mean. Regret is the score of the chosen C over
that of the best one, minus 1, at the end of training, free of luck where that is known; "with luck" it is that of the
seed's own scores, of which the full grid has the lowest by definition. The share is that of the images which training
all M values to the end would see.

What decides is cedm_ray.granularity, the code of the search itself, with its default settings and a budget of a quarter
of the full grid; golden section search alone is written here. Some minutes on one core.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from learning_curves import HARD, SETTINGS, Curves, hard, usual
from record import arguments, end
from rich.console import Console
from rich.table import Table

from cedm_ray.granularity.budget import Limits, Workload, search_kimg
from cedm_ray.granularity.search import GranularitySearch, SearchPlan

TOLERATED = 0.02
METHODS = {
    "full grid": None,
    "golden section": None,
    "random + ASHA": ("random", "asha"),
    "TPE + ASHA": ("tpe", "asha"),
    "GP + ASHA": ("gp", "asha"),
    "TPE + promotion ASHA": ("tpe", "promotion"),
    "GP + promotion ASHA": ("gp", "promotion"),
    "GP + fitted curves": ("gp", "fitted"),
}
FAMILIES: dict[str, dict[str, Callable[[int], Curves]]] = {
    "usual": {"CIFAR-100": partial(usual, published=True), "random": partial(usual, published=False)},
    "hard": {name: partial(hard, family) for name, family in HARD.items()},
}
DEFAULT = next(name for name, how in METHODS.items() if how == (SETTINGS.sampler_name(), SETTINGS.rule_name()))


def read_curves(file: Path) -> list[Curves]:
    """The curves of a file, one for each seed.

    Raises:
        ValueError: If it is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"{file} is no readable .npz file: {error}") from error
    check_curves(file, arrays)
    order = np.argsort(arrays["num_clusters"])
    expected, unconditional = arrays.get("expected"), arrays.get("unconditional")
    if expected is None and is_luck(np.log(arrays["score"][:, order, -1])):
        expected = np.broadcast_to(arrays["score"][:, :, -1].mean(0), arrays["score"].shape[:2])
    # Only ratios of kimg count. In single images they are whole numbers, as the search wants them.
    images = np.round(arrays["kimg"].astype(np.float64) * 1000).astype(int)
    return [
        Curves(
            arrays["num_clusters"][order].astype(int),
            images,
            score[order],
            None if expected is None else expected[seed][order],
            None if unconditional is None else float(unconditional[seed, -1]),
        )
        for seed, score in enumerate(arrays["score"])
    ]


def is_luck(end_scores: np.ndarray, least: float = 0.6) -> bool:
    """Whether seeds differ by independent luck at each C alone, shape (S, M): then their mean is free of it.

    What differs between curves of different shape is smooth in C, so that its second differences are small; those of
    independent numbers have six times their variance.
    """
    if end_scores.shape[0] < 20 or end_scores.shape[1] < 5:
        return False
    rest = end_scores - end_scores.mean(0)
    rest -= rest.mean(1, keepdims=True)
    variance = float(rest.var())
    return variance == 0 or float((np.diff(rest, 2, axis=1) ** 2).mean()) / 6 > least * variance


def check_curves(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays that are no learning curves.

    Raises:
        ValueError: If they are not.
    """
    missing = {"num_clusters", "kimg", "score"} - set(arrays)
    if missing:
        raise ValueError(f"{file} lacks {', '.join(sorted(missing))}")
    seeds = max(len(arrays["score"]), 1) if arrays["score"].ndim else 1
    many, rungs = max(arrays["num_clusters"].size, 1), max(arrays["kimg"].size, 1)
    shapes = {
        "num_clusters": (many,),
        "kimg": (rungs,),
        "score": (seeds, many, rungs),
        "expected": (seeds, many),
        "unconditional": (seeds, rungs),
    }
    for name in (name for name in shapes if name in arrays):
        values, due = arrays[name], shapes[name]
        good = values.size and values.shape == due and values.dtype.kind in "iuf"
        if not good or not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"{name} in {file} is {values.dtype} {values.shape}; it must be {due}, finite and above 0")
    clusters = arrays["num_clusters"]
    if np.any(clusters % 1) or np.unique(clusters).size < clusters.size:
        raise ValueError(f"num_clusters in {file} must be different whole numbers")
    if np.any(np.diff(np.round(arrays["kimg"].astype(np.float64) * 1000), prepend=0) <= 0):
        raise ValueError(f"kimg in {file} must ascend from 0.001 or more")


def search(curves: Curves, how: tuple[str, str], share: float, seed: int, at_once: int) -> tuple[int, float]:
    """The chosen candidate and the share of the full grid's images, by the product's own search."""
    columns = curves.rungs()
    clusters = [int(c) for c in curves.num_clusters]
    grid_kimg = len(clusters) * int(curves.kimg[-1])
    plan = SearchPlan(
        candidates=tuple(clusters),
        rungs_kimg=tuple(int(curves.kimg[column]) for column in columns),
        sampler=how[0],  # type: ignore[arg-type]
        rule=how[1],  # type: ignore[arg-type]
        startup=SETTINGS.startup_trials,
        eta=SETTINGS.reduction_factor,
        retrain_spread=SETTINGS.retrain_spread,
        seed=seed,
    )
    work = Workload(len(clusters), int(curves.kimg[-1]), 0, 0, 0, share)
    searching = GranularitySearch(plan, allowed_kimg=search_kimg(work, Limits(), None))
    seen: dict[str, int] = {}
    running: dict[str, Iterator[int]] = {}
    while not searching.done:
        while len(running) < at_once and (leg := searching.ask()) is not None:
            rungs = [kimg for kimg in plan.rungs_kimg if leg.start_kimg < kimg <= leg.stop_kimg]
            running[leg.key] = iter(rungs)
        for key, rungs_ahead in list(running.items()):
            kimg = next(rungs_ahead)
            seen[key] = kimg
            run = searching.runs[key]
            score = curves.score[clusters.index(run.num_clusters), columns[plan.rungs_kimg.index(kimg)]]
            if searching.tell(key, kimg, (float(score),)) != "continue" or kimg == plan.rungs_kimg[-1]:
                del running[key]
    complete = searching.runs.in_state("complete")
    best = min(complete, key=lambda run: (run.readings[plan.rungs_kimg[-1]], run.num_clusters))
    return clusters.index(best.num_clusters), sum(seen.values()) / grid_kimg


def golden_section(score: np.ndarray) -> tuple[int, float]:
    """Golden section over the places of the grid, every one trained to the end; takes no noise into account."""
    low, high, ratio = 0, len(score) - 1, (np.sqrt(5) - 1) / 2
    tried: dict[int, float] = {}

    def at(place: float) -> float:
        index = round(place)
        return tried.setdefault(index, float(score[index]))

    while high - low > 2:
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if at(first) <= at(second):
            high = int(np.floor(second))
        else:
            low = int(np.ceil(first))
    for place in range(low, high + 1):
        at(place)
    return min(tried, key=lambda place: tried[place]), len(tried) / len(score)


def method(name: str, share: float, at_once: int) -> Callable[[Curves, int], tuple[int, float]]:
    how = METHODS[name]
    if how is not None:
        return lambda curves, seed: search(curves, how, share, seed, at_once)
    if name == "full grid":
        return lambda curves, seed: (int(curves.score[:, -1].argmin()), 1.0)
    return lambda curves, seed: golden_section(curves.score[:, -1])


def replay(name: str, problems: list[Curves], share: float, at_once: int) -> dict[str, Any]:
    """Success rate, share of the images and regret of one method."""
    run = method(name, share, at_once)
    found = [
        (curves.regret(chosen), curves.regret(chosen, luck=True), used)
        for curves, (chosen, used) in ((c, run(c, s)) for s, c in enumerate(problems))
    ]
    regret, lucky_regret, used = np.array(found).T
    return {
        "success_rate": float(np.mean(regret <= TOLERATED)),
        "success_rate_with_luck": float(np.mean(lucky_regret <= TOLERATED)),
        "mimg_share": float(used.mean()),
        "mimg_share_max": float(used.max()),
        "regret_median": float(np.median(regret)),
        "regret_95": float(np.quantile(regret, 0.95)),
        "seeds": len(problems),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="seeds of each built-in family, or of the file at most")
    parser.add_argument("--families", choices=FAMILIES, default="usual", help="which built-in curves to replay")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="replay these curves instead of the built-in ones")
    parser.add_argument("--share", type=float, default=SETTINGS.share, help="budget as a share of the full grid")
    parser.add_argument("--at-once", type=int, default=1, help="trainings side by side")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD")
    args = parser.parse_args()
    if args.seeds < 1 or args.at_once < 1 or not 0 < args.share <= 1:
        parser.error("--seeds and --at-once must be at least 1, and --share must lie in (0, 1]")
    if args.curves is not None:
        try:
            families = {args.curves.name: read_curves(args.curves)[: args.seeds]}
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
    else:
        families = {name: [make(seed) for seed in range(args.seeds)] for name, make in FAMILIES[args.families].items()}
    found = {
        family: {name: replay(name, problems, args.share, args.at_once) for name in args.methods}
        for family, problems in families.items()
    }
    overall = {
        name: {
            key: max(each[name][key] for each in found.values())
            if key == "mimg_share_max"
            else float(np.mean([each[name][key] for each in found.values()]))
            for key in (
                "success_rate",
                "success_rate_with_luck",
                "mimg_share",
                "mimg_share_max",
                "regret_median",
                "regret_95",
            )
        }
        for name in args.methods
    }
    table = Table(title=f"Success: the chosen C is at most {TOLERATED:.0%} worse than the best one")
    for column in ("curves", "method", "success", "with luck", "share of images", "regret, median", "regret, 95 %"):
        table.add_column(column, justify="left" if column in ("curves", "method") else "right")
    for family, methods in found.items():
        for name, each in methods.items():
            table.add_row(
                f"{family} ({each['seeds']})",
                f"{name} (default)" if name == DEFAULT else name,
                f"{each['success_rate']:.1%}",
                f"{each['success_rate_with_luck']:.1%}",
                f"{each['mimg_share']:.3f}",
                f"{each['regret_median']:.2%}",
                f"{each['regret_95']:.2%}",
            )
    Console(width=130).print(table)
    end({"methods": overall, "default": DEFAULT, "families": found}, args.json, ("numpy", "scipy", "optuna"))


if __name__ == "__main__":
    main()
