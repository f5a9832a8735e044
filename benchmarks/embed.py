"""Embedding through Ray Data, as a search does it, against a bare loop over the same backbone in one process.

    python benchmarks/embed.py
    python benchmarks/embed.py --images 128 --rounds 1

Both have the same backbone with random weights (no time depends on their values), the same images, threads and batch
size. The loop reads a batch from the packed file, sends it to the device, embeds it and fetches the result. The stage
is the search's own: tasks that read, an actor that embeds, Parquet files, and the array made from them; a new store
makes it work each time. They take turns, and the medians of the ratios are reported.

share_of_bare_loop is of the rates from the first batch on, past starting processes and loading weights, up to the end
of the last Parquet file. share_with_startup is of the whole stage, gathering into an array included, against loading
the backbone and the loop; it grows towards the other one with the number of images. The cluster needs at least one CPU
more than the threads. On two cores the defaults take some three minutes.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import ray
import torch
from record import arguments, end
from safetensors.torch import save_file

from cedm_ray.config import load
from cedm_ray.data.pack import IMAGES, load_packed, pack
from cedm_ray.features.backbones import BackboneSpec
from cedm_ray.settings import EmbedSettings
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.cluster.shares import Shares
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import embed
from cedm_ray.stages.storage.store import Store

sys.path.append(str(Path(__file__).parents[1] / "tests" / "stages" / "inputs"))
from embed_growth import Noise

CUDA = torch.cuda.is_available()


class Times:
    """When how many embeddings were told of, and when there were no more to come."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float]] = []
        self.ended_s = 0.0

    def add(self, key: str, label: str, more: float, total: float, unit: str) -> None:
        self.told.append((time.time(), more))

    def remove(self, key: str) -> None:
        self.ended_s = time.time()

    def found(self) -> tuple[list[tuple[float, float]], float]:
        return self.told, self.ended_s


class Clock(Board):
    """A board that keeps the times of what is said."""

    def __init__(self) -> None:
        self._actor = ray.remote(num_cpus=0)(Times).remote()

    def found(self) -> tuple[list[tuple[float, float]], float]:
        return cast(Any, ray.get(self._actor.found.remote()))


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--backbone", default="vit_base_patch16_224" if CUDA else "vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=50_000 if CUDA else 512)
    parser.add_argument("--resolution", type=int, default=32, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=128 if CUDA else 32)
    parser.add_argument("--threads", type=int, default=4 if CUDA else 1, help="of torch, for the loop and the actor")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are measured, in turns")
    return parser.parse_args()


def bare_loop(spec: BackboneSpec, file: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the whole loop, and images per second after its first batch."""
    started_s, first_s = time.time(), 0.0
    device = torch.device("cuda" if CUDA else "cpu")
    backbone, images = spec.load(device), np.load(file, mmap_mode="r")
    for start in range(0, args.images, args.batch):
        backbone(torch.from_numpy(np.array(images[start : start + args.batch])).to(device)).cpu()
        first_s = first_s or time.time()
    return time.time() - started_s, (args.images - args.batch) / (time.time() - first_s)


def stage(spec: BackboneSpec, folder: Path, shares: Shares, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of the whole stage, seconds until its first batch, and images per second from there on."""
    config = load([]).model_copy(
        update={"embed": EmbedSettings(batch_size=args.batch, cpus_per_actor=float(args.threads))}
    )
    nobody, clock = cast(Any, None), Clock()
    with tempfile.TemporaryDirectory(dir=folder) as store:
        context = Context(
            config=config, folder=folder, store=Store(Path(store)), images=folder / "images",
            packed=load_packed(folder / "images"), weights_hash="random", detector_hashes={}, terminal=nobody,
            tracker=nobody, shares=shares, board=clock,
        )  # fmt: skip
        started_s = time.time()
        embed(context, spec)
        total_s = time.time() - started_s
    told, ended_s = clock.found()
    (first_s, first), count = told[0], sum(more for _, more in told)
    if count != args.images:
        raise SystemExit(f"{count} images were embedded, {args.images} are due")
    return total_s, first_s - started_s, (count - first) / (ended_s - first_s)


def main() -> None:
    import timm

    args = parsed()
    torch.set_num_threads(args.threads)
    rounds = []
    with tempfile.TemporaryDirectory() as name, connected(load([])) as shares:
        folder = Path(name)
        for _ in pack(Noise(args.images, args.resolution), folder / "images"):  # type: ignore[arg-type]
            pass
        save_file(timm.create_model(args.backbone, num_classes=0).state_dict(), folder / "random.safetensors")
        spec = BackboneSpec(args.backbone, folder / "random.safetensors", None)
        for _ in range(args.rounds):
            loop_s, loop_rate = bare_loop(spec, folder / "images" / IMAGES, args)
            total_s, startup_s, rate = stage(spec, folder, shares, args)
            rounds.append((rate / loop_rate, loop_s / total_s, rate, loop_rate, startup_s, total_s, loop_s))
            print(f"stage {rate:.1f} images/s after {startup_s:.1f} s, loop {loop_rate:.1f} images/s: "
                  f"{rate / loop_rate:.3f}; in all {total_s:.1f} s and {loop_s:.1f} s", flush=True)  # fmt: skip
    names = ("share_of_bare_loop", "share_with_startup", "images_per_s", "loop_images_per_s", "startup_s", "stage_s",
             "loop_s")  # fmt: skip
    digits = (3, 3, 1, 1, 1, 1, 1)
    values = zip(*rounds, strict=True)
    figures: dict[str, Any] = {
        name: round(median(each), places) for name, each, places in zip(names, values, digits, strict=True)
    }
    figures["threads"] = args.threads
    figures["device"] = "cuda" if CUDA else "cpu"
    figures["size"] = {name: getattr(args, name) for name in ("backbone", "images", "resolution", "batch", "rounds")}
    for label, value in figures.items():
        print(f"{label:>18}: {value}")
    end(figures, args.json, ("ray", "torch", "timm", "numpy"))


if __name__ == "__main__":
    main()
