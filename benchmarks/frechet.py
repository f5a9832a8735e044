"""Time of the Fréchet distance, beside the formula as it is mostly written, scipy's sqrtm of the product.

    python benchmarks/frechet.py                 # one to two minutes on two cores
    python benchmarks/frechet.py --dims 512

The covariances are those of random features whose deviations fall a thousandfold from the first direction to the last,
about as those of Inception-v3 do. The two take turns, and a ratio is the median of the ratios of the turns. Where there
is a GPU, the matrices lie on it for ours; the baseline has only the CPU. On a CPU both have all of torch's threads, and
ours is timed once more with one.

The last line sets the sums, from which a covariance is made, beside the network that the features come from:
Inception-v3 with random weights, on images of 32 x 32.
"""

import statistics
from typing import Any

import numpy as np
import scipy.linalg
import threadpoolctl
import torch
from numpy.typing import NDArray
from rates import seconds
from record import arguments, end

from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.inception import InceptionDetector, _empty_network

Gaussian = tuple[NDArray[np.float64], NDArray[np.float64]]


def gaussian(dim: int, seed: int) -> Gaussian:
    """Mean and covariance of 2 D random features."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2 * dim, dim)) * np.geomspace(1, 1e-3, dim)
    features = features @ rng.standard_normal((dim, dim)) / dim**0.5
    return features.mean(0), np.cov(features, rowvar=False)


def baseline(first: Gaussian, second: Gaussian) -> float:
    """The distance by the root of the product, which is not symmetric."""
    (m1, s1), (m2, s2) = first, second
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real)


def measure(dim: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds, ratio and values of ours and of the baseline."""
    pair = gaussian(dim, 0), gaussian(dim, 1)
    tensors = [torch.from_numpy(part).to(device) for part in (*pair[0], *pair[1])]
    values: dict[str, float] = {"ours": frechet_distance(*tensors)}  # and all libraries are loaded
    ours_s, baseline_s = [], []
    with threadpoolctl.threadpool_limits(torch.get_num_threads(), user_api="blas"):
        for _ in range(repeats):
            ours_s.append(seconds(lambda: frechet_distance(*tensors), device))
            baseline_s.append(seconds(lambda: values.update(baseline=baseline(*pair)), torch.device("cpu")))
    ratios = [b / a for a, b in zip(ours_s, baseline_s, strict=True)]
    return {
        "seconds": round(statistics.median(ours_s), 4),
        "baseline_seconds": round(statistics.median(baseline_s), 3),
        "speedup_over_baseline": round(statistics.median(ratios), 1),
        "value": values["ours"],
        "baseline_value": values["baseline"],
    }


def one_thread_seconds(dim: int, repeats: int) -> float:
    """Ours on a CPU with one thread."""
    tensors = [torch.from_numpy(part) for seed in (0, 1) for part in gaussian(dim, seed)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    times_s = [seconds(lambda: frechet_distance(*tensors), torch.device("cpu")) for _ in range(repeats)]
    torch.set_num_threads(before)
    return round(statistics.median(times_s), 4)


def sums_rate(batch: int, repeats: int, device: torch.device) -> float:
    """Images per second whose features are summed."""
    features = torch.randn(batch, 2048, device=device)
    sums = FeatureSums(2048, device=device)
    sums.update(features)
    return batch / statistics.median(seconds(lambda: sums.update(features), device) for _ in range(repeats))


def network_rate(batch: int, device: torch.device) -> float:
    """Images per second through Inception-v3."""
    network = _empty_network()
    detector = InceptionDetector(network, weights_hash="random", known=False, has_classifier=False, device=device)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    detector(images)
    return batch / statistics.median(seconds(lambda: detector(images), device) for _ in range(3))


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048], help="dimensions of the features")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--batch", type=int, default=512 if cuda else 64, help="images of a batch, for the sums")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    by_dim = {}
    for dim in args.dims:
        by_dim[dim] = measured = measure(dim, args.repeats, device)
        measured["seconds_one_cpu_thread"] = one_thread_seconds(dim, args.repeats)
        print(
            f"D = {dim}: {measured['seconds']} s on {device} ({measured['seconds_one_cpu_thread']} s on one thread of "
            f"the CPU), sqrtm {measured['baseline_seconds']} s, {measured['speedup_over_baseline']} times as long; "
            f"{measured['value']:.12g} and {measured['baseline_value']:.12g}",
            flush=True,
        )
    sums, network = sums_rate(args.batch, 20, device), network_rate(args.batch, device)
    print(
        f"Sums of 2048 dimensions: {sums:.0f} images/s in batches of {args.batch}, Inception-v3 {network:.1f} images/s"
    )
    largest = max(args.dims)
    figures = {
        f"seconds_{largest}": by_dim[largest]["seconds"],
        f"seconds_{largest}_one_cpu_thread": by_dim[largest]["seconds_one_cpu_thread"],
        "speedup_over_baseline": by_dim[largest]["speedup_over_baseline"],
        "device": str(device),
        "by_dim": by_dim,
        "sums_images_per_s": round(sums),
        "inception_images_per_s": round(network, 1),
    }
    end(figures, args.json, ("torch", "numpy", "scipy"))


if __name__ == "__main__":
    main()
