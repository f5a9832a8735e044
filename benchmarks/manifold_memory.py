"""Memory and time of precision, recall, density and coverage on random features.

    python benchmarks/manifold_memory.py --num 50000 --dim 1024

The features are standard normal, the generated ones a little wider; the values say nothing, time and memory do not
depend on them. The defaults take a few seconds.
"""

import os
import platform
import time
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from rates import peak_memory_gb
from record import arguments, end

from cedm_ray.metrics.manifold import manifold_metrics


def features(num: int, dim: int, seed: int, scale: float) -> NDArray[np.float32]:
    """Random features ``(num, dim)``, drawn without a second copy."""
    drawn = np.random.default_rng(seed).standard_normal((num, dim), dtype=np.float32)
    drawn *= scale
    return drawn


def peak_mb() -> float:
    """Most memory that this process has held, whatever the device, in MB."""
    return 1000 * peak_memory_gb(torch.device("cpu"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--num", type=int, default=5000, help="images of each set")
    parser.add_argument("--dim", type=int, default=1024, help="dimensions of the features")
    parser.add_argument("--block", type=int, default=2048, help="images of each side compared at a time")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    real, fake = features(args.num, args.dim, 0, 1.0), features(args.num, args.dim, 1, 1.02)
    before_mb = peak_mb()
    started_s = time.monotonic()
    values = manifold_metrics(real, fake, block=args.block, device=args.device)
    seconds = time.monotonic() - started_s
    print(f"{args.num} against {args.num} of {args.dim} dimensions, blocks of {args.block}: {seconds:.1f} s, "
          f"peak {peak_mb():.0f} MB ({before_mb:.0f} MB before) on {args.device}, {platform.machine()}, "
          f"{torch.get_num_threads()} of {os.cpu_count()} threads; {values}")  # fmt: skip
    sizes = {"num": args.num, "dim": args.dim, "block": args.block, "device": args.device}
    peaks = {"peak_mb": round(peak_mb()), "peak_mb_before": round(before_mb)}
    end({**sizes, "seconds": round(seconds, 2), **peaks, "values": asdict(values)}, args.json)


if __name__ == "__main__":
    main()
