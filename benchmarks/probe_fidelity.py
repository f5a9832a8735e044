"""What a cheap probe of r_C says about a full one: fewer heads, fewer epochs, a sample of the images.

    python benchmarks/probe_fidelity.py                      # scikit-learn's digits, some minutes on a core
    python benchmarks/probe_fidelity.py --features FILE.npy --dims 64 --clusters 90 130 180 240 320

Trains TEMI for every C and seed and reads r_C along the way: the learning rate is constant after the warm-up, so the
first epochs of a training are a shorter training. Fewer heads and half of the images (with C / 2) are trained apart.
A reading is r_C of the head with the lowest loss (``best``, the clustering that would be used) or the mean over the
heads (``mean``). Bias and spread are those of low minus full reading (best, mean over seeds), where the full one lies
above the cutoff by more than 0.02, near it, or below; ln is ln(C_low / C_full) of the curves averaged over seeds,
spread the deviation over seeds of ln C_low. Cost is in epochs of a head, a sample's epochs counted by its images.
"""

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import arguments, end

from cedm_ray.clustering.quality import utilization_ratio
from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.features.neighbors import knn

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
READINGS = ("best", "mean")
ZONE = 0.02  # r_C within this of the cutoff counts as near


@dataclass(frozen=True)
class Variant:
    """A way to train, of which every share of the epochs is a fidelity."""

    name: str
    heads: int
    sample: int = 1
    """One image of so many is kept, and one cluster."""


def load(file: Path | None, dims: int, limit: int | None) -> NDArray[np.float32]:
    """Features with mean 0 and one common scale, on their first ``dims`` principal axes where they have more."""
    if file is None:
        from sklearn.datasets import load_digits

        features = load_digits().data
    else:
        features = np.load(file, allow_pickle=False)[:limit]
    features = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    if features.shape[1] > dims:
        features = features @ np.linalg.eigh(features.T @ features)[1][:, ::-1][:, :dims]
    return (features / np.sqrt(np.square(features).mean())).astype(np.float32)


@torch.no_grad()
def ratio_of_heads(trainer: TemiTrainer, features: NDArray[np.float32], clusters: int) -> NDArray[np.float64]:
    """r_C of every head's teacher, shape ``(H,)``."""
    blocks = torch.split(torch.from_numpy(features), 1024)
    assigned = torch.cat([trainer.learner.teacher(block).argmax(dim=-1) for block in blocks], dim=1)
    return np.array([utilization_ratio(head, clusters) for head in assigned])


def train(features: NDArray[np.float32], neighbors: Any, clusters: int, settings: TemiSettings, seed: int) -> Any:
    """Readings ``(shares, 2)``, and of the end: the deviation between heads and the seconds of the training alone."""
    at = [max(1, round(settings.epochs * share)) for share in SHARES]
    trainer = TemiTrainer(features, neighbors, clusters, settings, seed=seed, device="cpu")
    read, heads, seconds, started_s = {}, np.zeros(1), 0.0, time.perf_counter()
    for progress in trainer.epochs():
        seconds += time.perf_counter() - started_s
        if progress.epoch in at:
            heads = ratio_of_heads(trainer, features, clusters)
            read[progress.epoch] = (heads[progress.best_head], heads.mean())
        started_s = time.perf_counter()
    spread = heads.std(ddof=1) if len(heads) > 1 else 0.0
    return np.array([read[epoch] for epoch in at]), spread, seconds


def measure(args: argparse.Namespace, features: NDArray[np.float32], variant: Variant, settings: TemiSettings) -> Any:
    """Readings ``(seeds, clusters, shares, 2)``, spread of heads and seconds ``(seeds, clusters)`` of one variant."""
    found = []
    for seed in range(args.seeds):
        kept = np.random.default_rng(seed).choice(len(features), len(features) // variant.sample, replace=False)
        part = np.ascontiguousarray(features[np.sort(kept)])
        neighbors, heads = knn(part, args.neighbors), replace(settings, num_heads=variant.heads)
        found += [train(part, neighbors, c // variant.sample, heads, seed) for c in args.clusters]
    shape = (args.seeds, len(args.clusters))
    ratios, spreads, seconds = (np.array(part) for part in zip(*found, strict=True))
    return ratios.reshape(*shape, len(SHARES), 2), spreads.reshape(shape), seconds.reshape(shape)


def log_crossing(clusters: list[int], ratios: NDArray[np.float64], cutoff: float) -> float:
    """ln of the first C at which the curve falls to the cutoff, linear in ln C; NaN where that lies off the grid."""
    for i in range(1, len(clusters)):
        if ratios[i - 1] > cutoff >= ratios[i]:
            step = math.log(clusters[i] / clusters[i - 1])
            return math.log(clusters[i - 1]) + step * float((ratios[i - 1] - cutoff) / (ratios[i - 1] - ratios[i]))
    return math.nan


def compare(low: NDArray[np.float64], full: NDArray[np.float64], args: argparse.Namespace) -> dict[str, Any]:
    """Bias and spread of readings ``(seeds, clusters)`` by zone, and ln C_low / C_full; None is not known."""
    truth, figures = full.mean(axis=0), {}
    zones = {"above": truth > args.cutoff + ZONE, "below": truth < args.cutoff - ZONE}
    zones["near"] = ~zones["above"] & ~zones["below"]
    for name, zone in zones.items():
        error = (low - truth)[:, zone]
        figures[name] = [error.mean(), error.std(ddof=1)] if error.size > 1 else [math.nan, math.nan]
    at_full = log_crossing(args.clusters, truth, args.cutoff)
    per_seed = np.array([log_crossing(args.clusters, row, args.cutoff) for row in low])
    inside = per_seed[np.isfinite(per_seed)]
    figures["ln_ratio"] = log_crossing(args.clusters, low.mean(axis=0), args.cutoff) - at_full
    figures["ln_spread"] = inside.std(ddof=1) if len(inside) > 1 else math.nan
    figures["seeds_off_grid"] = int(len(per_seed) - len(inside))
    return figures


def show_noise(args: argparse.Namespace, ratios: Any, spreads: Any, seconds: Any) -> list[dict[str, float]]:
    """The full trainings: r_C, its deviation over seeds and over heads, and that of C independent clusters."""
    rows = []
    print("    C  r_C best  r_C mean  over seeds  over heads  binomial  seconds")
    for i, clusters in enumerate(args.clusters):
        best, mean = ratios[:, i, -1].T
        r, over_heads = mean.mean(), np.sqrt(np.square(spreads[:, i]).mean())
        row = [best.mean(), r, best.std(ddof=1), over_heads, math.sqrt(r * (1 - r) / clusters), seconds[:, i].mean()]
        print("{:5d}  {:8.3f}  {:8.3f}  {:10.4f}  {:10.4f}  {:8.4f}  {:7.1f}".format(clusters, *row))
        names = ("best", "mean", "seed_spread", "head_spread", "binomial", "seconds")
        rows.append({"clusters": clusters, **dict(zip(names, map(float, row), strict=True))})
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--features", type=Path, metavar="FILE", help=".npy, (N, D); the digits where not given")
    parser.add_argument("--limit", type=int, help="only the first images of the file")
    parser.add_argument("--dims", type=int, default=64, help="principal axes kept (default: 64)")
    parser.add_argument("--clusters", type=int, nargs="+", default=[70, 100, 130, 180, 240])
    parser.add_argument("--cutoff", type=float, default=0.96)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2 (default: 5)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--low-heads", type=int, nargs="*", default=[2, 1])
    parser.add_argument("--neighbors", type=int, default=50)
    parser.add_argument("--steps", type=int, default=700, help="about so many for all images (default: 700)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--bottleneck-dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--teacher-momentum", type=float, default=0.99, help="0.996 from 2,000 steps on")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; it must be at least 2, or there is no spread")
    features = load(args.features, args.dims, args.limit)
    epochs = max(10, round(args.steps / (len(features) // args.batch_size)))
    widths = {"hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim, "batch_size": args.batch_size}
    rates = {"lr": args.lr, "teacher_momentum": args.teacher_momentum}
    settings = TemiSettings(epochs=epochs, warmup_epochs=round(epochs / 10), **widths, **rates)
    print(f"{len(features):,} images, {features.shape[1]} features, {epochs} epochs, {args.seeds} seeds")
    full, spreads, full_seconds = measure(args, features, Variant("full", args.heads), settings)
    noise = show_noise(args, full, spreads, full_seconds)
    variants = [Variant(f"{heads} heads", heads) for heads in (args.heads, *args.low_heads)]
    table = {}
    print("\nfidelity                    cost  seconds  above            near             below            ln  spread")
    for variant in [*variants, Variant("half, C/2", args.heads, sample=2)]:
        same = variant.heads == args.heads and variant.sample == 1
        ratios, _, seconds = (full, 0, full_seconds) if same else measure(args, features, variant, settings)
        for i, share in enumerate(SHARES):
            for j, reading in enumerate(READINGS[: 1 + (variant.heads > 1)]):
                figures = compare(ratios[:, :, i, j], full[:, :, -1, 0], args)
                figures["cost"] = share * variant.heads / args.heads / variant.sample  # in steps of a head
                figures["seconds"] = share * seconds.mean() / full_seconds.mean()
                name = f"{variant.name}, {share:.0%}, {reading}"
                zones = "  ".join("{:+.3f} +- {:.3f}".format(*figures[zone]) for zone in ("above", "near", "below"))
                tail = f"{figures['ln_ratio']:+.2f}  {figures['ln_spread']:.2f} ({figures['seeds_off_grid']} off)"
                line = f"{name:26s} {figures['cost']:5.3f}  {figures['seconds']:7.3f}  {zones}  {tail}"
                print(line.replace("+nan", "   -").replace("nan", "-"))
                table[name] = figures
    setup = {"images": len(features), "dims": features.shape[1], "seeds": args.seeds, "epochs": epochs}
    end(plain({**setup, "full": noise, "fidelities": table}), args.json)


def plain(value: Any) -> Any:
    """JSON values; NaN is not one."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 5) if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
