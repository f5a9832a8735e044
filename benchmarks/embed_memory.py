"""Memory and time of the embedding stage against the number of images.

    python benchmarks/embed_memory.py
    python benchmarks/embed_memory.py --images 2000 4000

The images are noise of 32 x 32 pixels in colour and the backbone gives back their pixels, so that embeddings take 12 kB
an image, several times those of a network, and next to no time is spent in computing. The first size is embedded once
before, so that what every process needs once is not counted as growth. The peak is the anonymous memory of the largest
process, of the driver and of Ray's own, without mapped files and without the object store, which has a fixed size.
"""

import argparse
import gc
import logging
import sys
import tempfile
import time
from pathlib import Path

import ray
from record import arguments, end

from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.inputs.embed import embed

sys.path.append(str(Path(__file__).parents[1] / "tests" / "stages" / "inputs"))
from embed_growth import Peak, context

MIB = 2**20


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000, 200_000], metavar="N")
    parser.add_argument("--object-store", type=int, default=200, help="size of Ray's object store, in MiB")
    return parser.parse_args()


def measured(count: int) -> dict[str, float]:
    """Peak memory and time of one embedding; its files are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        ctx = context(count, Path(folder))
        gc.collect()
        started_s = time.monotonic()
        with Peak() as peak:
            values = embed(ctx).values
        seconds = time.monotonic() - started_s
        row = {"images": count, "peak_mib": round(peak.bytes / MIB), "embeddings_mib": round(values.nbytes / MIB),
               "seconds": round(seconds, 1), "images_per_s": round(count / seconds)}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    args = parsed()
    ray.init(
        address="local", num_cpus=2, object_store_memory=args.object_store * MIB, include_dashboard=False,
        log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": RAY_ENVIRONMENT},
    )  # fmt: skip
    print("once before:")
    measured(args.images[0])
    rows = [measured(count) for count in args.images]
    ray.shutdown()
    first, last = rows[0], rows[-1]
    grown, more = last["peak_mib"] - first["peak_mib"], last["embeddings_mib"] - first["embeddings_mib"]
    print(
        f"from {first['images']} to {last['images']} images the embeddings grow by {more} MiB, the peak by {grown} MiB"
    )
    figures = {"by_size": rows, "peak_growth": round(last["peak_mib"] / first["peak_mib"], 3),
               "object_store_mib": args.object_store, "backbone": "pixels", "resolution": 32}  # fmt: skip
    end(figures, args.json, ("ray", "torch", "numpy", "pyarrow"))


if __name__ == "__main__":
    main()
