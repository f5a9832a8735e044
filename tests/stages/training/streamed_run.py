"""Streams images in the processes of a training that hold every CPU of a small cluster; prints what was found as JSON.

Run by test_streamed.py in a process of its own.
"""

import json
import logging
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.lib.format import open_memmap

from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.training import streamed
from cedm_ray.stages.training.streamed import StreamedImages

CPU = torch.device("cpu")
SMALL, LARGE = 100, 200_000
LOCAL, BATCHES = 8, 22
SMALL_CHUNK = 5 * LOCAL * 192 + 1  # five batches: 22 are five chunks and, over two processes, three epochs
FIRST = 1_000_003


@ray.remote(num_cpus=1)
class Worker:
    """One process of a training."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def alike(self) -> dict[str, bool]:
        """Whether the batches are those of resident images, from the start and from later on."""
        pixels = torch.from_numpy(np.load(self.folder / "small.npy"))
        classes = torch.arange(SMALL).flip(0)
        source = StreamedImages(self.folder / "small.npy", classes, CPU, chunk_bytes=SMALL_CHUNK)
        start = FIRST + self.rank * LOCAL
        expected = list(islice(ResidentImages(pixels, classes).batches(7, start, LOCAL, 2 * LOCAL), BATCHES))
        found = list(islice(source.batches(7, start, LOCAL, 2 * LOCAL), BATCHES))
        later = list(islice(source.batches(7, start + 13 * 2 * LOCAL, LOCAL, 2 * LOCAL), 7))
        bare = StreamedImages(self.folder / "small.npy", None, CPU).batches(7, start, LOCAL, 2 * LOCAL)
        return {
            "from the start": same(found, expected),
            "resumed": same(later, expected[13:20]),
            "over epochs": len({tuple(c.tolist()) for _, c in expected if c is not None}) == BATCHES,
            "without clusters": torch.equal(next(bare)[0], expected[0][0]) and next(bare)[1] is None,
            "told": len(source) == SMALL and source.image_shape == (3, 8, 8) and source.class_index is classes,
        }

    def growth(self) -> dict[str, int]:
        """Memory of this process after streams from a small and from a large set, and the size of the latter."""
        used = {}
        for name in ("small", "small", "large"):
            source = StreamedImages(self.folder / f"{name}.npy", None, CPU, chunk_bytes=2**24)
            for _ in islice(source.batches(0, 0, 256, 256), 40):
                pass
            used[name] = anonymous_bytes()
        return {**used, "set": (self.folder / "large.npy").stat().st_size}

    def errors(self) -> dict[str, str]:
        """What is said of tasks that are late, fail, or mix up the images."""
        ours = streamed.read_images
        source = StreamedImages(self.folder / "small.npy", None, CPU)
        hasty = StreamedImages(self.folder / "small.npy", None, CPU, timeout_s=0.01)
        said = {"late": error_of(hasty)}
        for name, read in {"failing": failing, "mixed up": mixed_up, "too few": too_few}.items():
            streamed.read_images = read
            said[name] = error_of(source)
        streamed.read_images = ours
        return said

    def stopped_midway(self) -> dict[str, Any]:
        """How many tasks have read when a stream is closed after a batch, and some time later."""
        ours, streamed.read_images = streamed.read_images, slow
        batches = StreamedImages(self.folder / "large.npy", None, CPU).batches(0, 0, 64, 64)
        next(batches)
        batches.close()
        reads = [len((self.folder / "reads").read_text())]
        time.sleep(2)
        reads.append(len((self.folder / "reads").read_text()))
        streamed.read_images = ours
        left = [each.name for each in threading.enumerate()]
        return {"reads": reads, "threads": [each for each in left if "treamed" in each or "Executor" in each]}


def same(found: list[Any], expected: list[Any]) -> bool:
    pairs = [(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def error_of(source: StreamedImages) -> str:
    batches = source.batches(0, 0, 4, 4)
    try:
        next(batches)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def failing(batch: dict[str, np.ndarray], file: Path, column: str) -> dict[str, np.ndarray]:
    raise OSError("the disk is on fire")


def mixed_up(batch: dict[str, np.ndarray], file: Path, column: str) -> dict[str, np.ndarray]:
    index = batch["index"][::-1].copy()
    return {"index": index, "image": np.load(file)[index]}


def too_few(batch: dict[str, np.ndarray], file: Path, column: str) -> dict[str, np.ndarray]:
    index = batch["index"][:3]
    return {"index": index, "image": np.load(file)[index]}


def slow(batch: dict[str, np.ndarray], file: Path, column: str) -> dict[str, np.ndarray]:
    time.sleep(0.3)
    with (file.parent / "reads").open("a") as reads:
        reads.write("x")
    return {"index": batch["index"], "image": np.load(file, mmap_mode="r")[batch["index"]]}


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SMALL, 3, 8, 8), dtype=np.uint8)
    np.save(folder / "small.npy", pixels)
    open_memmap(folder / "large.npy", mode="w+", dtype=np.uint8, shape=(LARGE, 3, 32, 32))  # a file with no blocks
    ray.init(
        address="local", num_cpus=2, object_store_memory=700 * 2**20, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR, runtime_env={"env_vars": RAY_ENVIRONMENT},
    )  # fmt: skip
    workers = [Worker.remote(folder, rank) for rank in range(2)]
    found: dict[str, Any] = {"alike": ray.get([worker.alike.remote() for worker in workers])}
    found["free"] = ray.available_resources().get("CPU", 0.0)
    found["growth"] = ray.get(workers[0].growth.remote())
    found["errors"] = ray.get(workers[0].errors.remote())
    found["stopped"] = ray.get(workers[0].stopped_midway.remote())
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
