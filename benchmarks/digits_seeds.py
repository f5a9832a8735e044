"""The digits search for several seeds: the best C beside the unconditional and the label-conditioned training.

    python benchmarks/digits_seeds.py --seeds 0 1 2 --storage-path runs

Searches that are done are read, the others are run (some minutes each on two cores). Prints a Markdown table.
"""

import argparse
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

from cedm_ray.config import load
from cedm_ray.search import run
from cedm_ray.stages.records import TrialRecord
from cedm_ray.stages.result import SearchResult


def score(trial: TrialRecord, kimg: int) -> str:
    """The score of a complete trial, or a dash."""
    rung = trial.rung_at(kimg)
    return f"{rung['score']:.3f}" if rung is not None and trial.state == "complete" else "-"


def row(seed: int, result: SearchResult, minutes: float) -> str:
    """One line of the table."""
    best = next(t for t in result.trials if t.grouping == "temi" and t.num_clusters == result.best)
    others = {t.grouping: score(t, result.total_kimg) for t in result.trials if t.grouping != "temi"}
    final = f"{result.final.mean:.3f} ± {result.final.std:.3f}"
    cells = [seed, result.c_max, result.best, score(best, result.total_kimg), others["none"], others["labels"], final]
    return "| " + " | ".join(map(str, [*cells, f"{minutes:.1f}"])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage-path", type=Path, default=Path("runs"))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        started_s = time.monotonic()
        result = run(load(["--seed", str(seed), "--storage-path", str(args.storage_path)]))
        rows.append(row(seed, result, (time.monotonic() - started_s) / 60))
    at = f"at {result.total_kimg} kimg"
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, {result.metric}, "
          f"{result.num_images:,} images a score, final: mean ± deviation of {result.final.num_sets} sets")  # fmt: skip
    print(f"| seed | C_max | best C | best C {at} | unconditional {at} | labels {at} | best C, final | minutes |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
