"""The digits search for several seeds: the best C beside the unconditional and the label-conditioned training.

    python benchmarks/digits_seeds.py --seeds 0 1 2 --storage-path runs

Searches that are done are read, the others are run (some minutes each on two cores). Prints a Markdown table.
"""

import time
from pathlib import Path
from typing import Any

from record import arguments, end

from cedm_ray.config import load
from cedm_ray.search import run
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.training.records import TrialRecord


def score(trial: TrialRecord, kimg: int) -> str:
    """The score of a complete trial, or a dash."""
    rung = trial.rung_at(kimg)
    return f"{rung['score']:.3f}" if rung is not None and trial.state == "complete" else "-"


def c_max(result: SearchResult) -> str:
    """C_max with its interval."""
    bound = result.upper_bound
    return "-" if bound is None else f"{bound.c_max} {list(bound.interval or ())}"


def row(seed: int, result: SearchResult, minutes: float) -> str:
    """One line of the table."""
    best = next(t for t in result.trials if t.grouping == "temi" and t.num_clusters == result.best)
    others = {t.grouping: score(t, result.total_kimg) for t in result.trials if t.grouping != "temi"}
    final = f"{result.final.mean:.3f} ± {result.final.std:.3f}"
    cells = [seed, c_max(result), result.best, score(best, result.total_kimg), others["none"], others["labels"], final]
    return "| " + " | ".join(map(str, [*cells, f"{minutes:.1f}"])) + " |"


def figures(seed: int, result: SearchResult, minutes: float) -> dict[str, Any]:
    """The same as plain values."""
    scores = {
        t.label: (t.rung_at(result.total_kimg) or {}).get("score") for t in result.trials if t.state == "complete"
    }
    bound = result.upper_bound
    return {
        "seed": seed,
        "c_max": result.c_max,
        "interval": None if bound is None else bound.interval,
        "best": result.best,
        "scores": scores,
        "final": {"mean": result.final.mean, "std": result.final.std, "kimg": result.final.kimg},
        "minutes": round(minutes, 2),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage-path", type=Path, default=Path("runs"))
    args = parser.parse_args()
    rows, found = [], []
    for seed in args.seeds:
        started_s = time.monotonic()
        result = run(load(["--seed", str(seed), "--storage-path", str(args.storage_path)]))
        minutes = (time.monotonic() - started_s) / 60
        rows.append(row(seed, result, minutes))
        found.append(figures(seed, result, minutes))
    at = f"at {result.total_kimg} kimg"
    print(f"\n{result.metric}, {result.num_images:,} images a score, "
          f"final: mean ± deviation of {result.final.num_sets} sets")  # fmt: skip
    print(f"| seed | C_max | best C | best C {at} | unconditional {at} | labels {at} | best C, final | minutes |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    end({"searches": found}, args.json, packages=("torch", "numpy", "ray", "optuna"))


if __name__ == "__main__":
    main()
