"""Time of the neighbour search against the number of images, exact and approximate, beside a plain product and top-k.

    python benchmarks/neighbors.py              # three to five minutes on two cores
    python benchmarks/neighbors.py --sizes 2000 10000 --approximate 10000

The embeddings are a mixture of Gaussians of N / 200 components that overlap, in 64 of the dimensions, turned at random:
neighbours are mostly, but not only, of an image's own component. The baseline is torch's: blocks of queries times all
embeddings, then topk; of the larger sets it searches a part of the queries, for its time is in proportion to their
number. Exact search and baseline take turns, and the ratio is the median of those of the turns. The recall is that of
the 50 neighbours of random images against the baseline's, whatever the search itself has measured. Where there is a
GPU, the seconds include the test that faiss answers there.
"""

import statistics
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from rates import seconds
from record import arguments, end

from cedm_ray.features.neighbors import EXACT_UP_TO, Neighbors, faiss_device, search_neighbors

K = 50
BLOCK = 2048
BASELINE_QUERIES = 4096
CPU = torch.device("cpu")  # faiss ends when it has answered


def mixture(num_images: int, dim: int) -> NDArray[np.float32]:
    """Embeddings, shape ``(N, D)``, float32."""
    rng = np.random.default_rng(0)
    latent = min(dim, 64)
    centers = rng.standard_normal((max(1, num_images // 200), latent), dtype=np.float32)
    points = rng.standard_normal((num_images, latent), dtype=np.float32)
    points += centers[rng.integers(0, len(centers), num_images)]
    turned = np.linalg.qr(rng.standard_normal((dim, latent)))[0].astype(np.float32)
    return points @ turned.T


def baseline(units: torch.Tensor, queries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the neighbours of some images, shape ``(n, K)``, by embeddings at length 1."""
    found, device = [], units.device
    for block in torch.from_numpy(queries).to(device).split(BLOCK):
        cosines = units[block] @ units.T
        cosines[torch.arange(len(block), device=device), block] = -2
        found.append(cosines.topk(K, dim=1).indices.cpu())
    return torch.cat(found).numpy()


def share(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Of the neighbours wanted, those that were found."""
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, wanted, strict=True)]))


def measure(num_images: int, dim: int, methods: list[Literal["exact", "approximate"]], repeats: int) -> dict[str, Any]:
    """Seconds and recall of each method, and the exact one's ratio to the baseline."""
    embeddings, device = mixture(num_images, dim), torch.device(faiss_device())
    queries = np.sort(np.random.default_rng(1).permutation(num_images)[:BASELINE_QUERIES])
    wanted: dict[str, NDArray[np.int64]] = {}
    found: dict[str, Neighbors] = {}
    times_s: dict[str, list[float]] = {"baseline": [], **{method: [] for method in methods}}
    units = torch.nn.functional.normalize(torch.from_numpy(embeddings).to(device))
    baseline(units, queries[:BLOCK])
    for _ in range(repeats):
        part_s = seconds(lambda: wanted.update(all=baseline(units, queries)), device)
        times_s["baseline"].append(part_s * num_images / len(queries))
        for method in methods:
            work = lambda: found.update({method: search_neighbors(embeddings, K, method=method)})  # noqa: B023, E731
            times_s[method].append(seconds(work, CPU))
    ratios = [b / a for a, b in zip(times_s.get("exact", []), times_s["baseline"], strict=False)]
    return {
        "seconds": {name: round(statistics.median(values), 3) for name, values in times_s.items()},
        "recall": {name: round(share(found[name].indices[queries], wanted["all"]), 4) for name in methods},
        "own_recall": {name: round(found[name].recall, 4) for name in methods},
        "method": {name: found[name].method for name in methods},
        "speedup_over_baseline": round(statistics.median(ratios), 2) if ratios else None,
    }


def main() -> None:
    gpu = faiss_device() == "cuda"
    parser = arguments(__doc__)
    sizes = [10_000, 50_000, 200_000, 1_000_000] if gpu else [2_000, 10_000, 50_000]
    approximate = [10_000, 50_000, 200_000, 1_000_000] if gpu else [10_000, 50_000, 200_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="images of the exact searches")
    parser.add_argument(
        "--approximate", type=int, nargs="*", default=approximate, help="images of the approximate ones"
    )
    parser.add_argument("--dim", type=int, default=768 if gpu else 384, help="dimensions of the embeddings")
    args = parser.parse_args()
    seconds_by: dict[str, dict[int, float]] = {"exact": {}, "approximate": {}, "baseline": {}}
    recall: dict[int, float] = {}
    speedup: dict[int, float] = {}
    exact_instead: list[int] = []
    for num_images in sorted({*args.sizes, *args.approximate}):
        methods = [m for m, ns in (("exact", args.sizes), ("approximate", args.approximate)) if num_images in ns]
        measured = measure(num_images, args.dim, methods, repeats=3 if num_images <= 10_000 else 1)
        for name, value in measured["seconds"].items():
            seconds_by[name][num_images] = value
        if "approximate" in methods:
            recall[num_images] = measured["recall"]["approximate"]
            exact_instead += [num_images] if measured["method"]["approximate"] == "exact" else []
        if measured["speedup_over_baseline"]:
            speedup[num_images] = measured["speedup_over_baseline"]
        print(f"N = {num_images}: {measured}", flush=True)
    figures = {
        "seconds": seconds_by,
        "recall": recall,
        "approximate_was_exact": exact_instead,
        "speedup_over_baseline": speedup,
        "dim": args.dim,
        "k": K,
        "exact_up_to": EXACT_UP_TO[faiss_device()],
        "device": faiss_device(),
    }
    package = "faiss-gpu" if hasattr(faiss, "GpuIndexFlatIP") else "faiss-cpu"
    end(figures, args.json, ("torch", "numpy", package))


if __name__ == "__main__":
    main()
