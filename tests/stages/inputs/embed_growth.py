"""Embeds two data sets, one eight times as large, with a small object store; prints memory at the peak as JSON.

Run by test_embed.py in a process of its own. The images are 32 x 32 pixels in colour and the backbone gives them back
as they are, so that embeddings take 12 kB an image: those of the larger set would fill the object store four times.
"""

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import ray

from cedm_ray.config import load
from cedm_ray.data.pack import load_packed, pack
from cedm_ray.settings import EmbedSettings
from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.shares import shares
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.embed import embed
from cedm_ray.stages.storage.store import Store

SMALL, LARGE = 4_000, 32_000
OBJECT_STORE_BYTES = 100 * 2**20


class Noise:
    """So many images of noise in colour; image i is the same in every set."""

    channels, num_classes = 3, None

    def __init__(self, count: int, resolution: int = 32) -> None:
        self.name = self.fingerprint = f"noise-{count}-{resolution}"
        self.resolution, self._count = resolution, count

    def __len__(self) -> int:
        return self._count

    def labels(self) -> None:
        return None

    def superclasses(self) -> None:
        return None

    def class_names(self) -> None:
        return None

    def read(self, start: int, stop: int) -> np.ndarray:
        shape = (self.channels, self.resolution, self.resolution)
        return np.stack([np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i in range(start, stop)])


def anonymous_bytes() -> int:
    """Memory of the largest of this and Ray's processes, without mapped files and without the object store.

    Not the sum over them: how many idle workers Ray has started at a moment varies by more than the data weigh.
    """
    parents, anonymous = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it has just ended
            continue
        parents[int(status.parent.name)] = int(facts["PPid"])
        anonymous[int(status.parent.name)] = int(facts.get("RssAnon", "0 kB").split()[0]) * 1024
    ours, before = {os.getpid()}, 0
    while len(ours) > before:
        before = len(ours)
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return max(anonymous.get(pid, 0) for pid in ours)


class Peak:
    """Highest memory while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def context(count: int, folder: Path) -> Context:
    images = folder / f"images-{count}"
    for _ in pack(Noise(count), images):  # type: ignore[arg-type]
        pass
    config = load([]).model_copy(update={"backbone": "pixels", "embed": EmbedSettings(batch_size=64)})
    return Context(
        config=config, folder=folder, store=Store(folder / "store"), images=images, packed=load_packed(images),
        weights_hash="pixels", detector_hashes={}, terminal=Mock(), tracker=Mock(),
        shares=shares(config.resources, ray.nodes()), board=Board(),
    )  # fmt: skip


def main(folder: Path) -> None:
    ray.init(
        address="local", num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
        log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": RAY_ENVIRONMENT},
    )  # fmt: skip
    found: dict[str, Any] = {}
    for name, count in (("first", SMALL), ("small", SMALL + 1), ("large", LARGE)):
        ctx = context(count, folder)
        started_s = time.monotonic()
        with Peak() as peak:
            embeddings = embed(ctx)
        images = np.load(ctx.images / "images.npy", mmap_mode="r")
        sample = np.array([0, count // 2, count - 1])
        pixels = images[sample].reshape(3, -1).astype(np.float32)
        order = [float(np.corrcoef(embeddings.values[i], pixels[n])[0, 1]) for n, i in enumerate(sample)]
        found[name] = {"peak": peak.bytes, "seconds": time.monotonic() - started_s, "order": min(order),
                       "embeddings": embeddings.values.nbytes}  # fmt: skip
    print(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
