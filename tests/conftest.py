"""What tests of several rooms need: a disk to fill, and a small exported model, made as a search does, without Ray."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from cedm_ray.clustering.clustering_io import save_clustering
from cedm_ray.clustering.labels import from_labels
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.config import SearchConfig
from cedm_ray.data.digits import digits
from cedm_ray.data.pack import load_packed, pack
from cedm_ray.data.subset import FirstImages
from cedm_ray.diffusion.settings import build_net
from cedm_ray.diffusion.state_io import save_state
from cedm_ray.diffusion.train_state import new_state
from cedm_ray.features.backbones import PIXELS, check_backbone, load_backbone
from cedm_ray.features.neighbors import knn
from cedm_ray.features.pixels import pixel_stats
from cedm_ray.metrics.scores import Score
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, save_stats
from cedm_ray.report.grids import sample_grid
from cedm_ray.settings import DiffusionSettings, ScoreSettings

NUM_IMAGES, NUM_CLUSTERS = 300, 40
TEMI = TemiSettings(
    num_heads=2, hidden_dim=32, bottleneck_dim=16, lr=3e-3, teacher_momentum=0.9, batch_size=100, epochs=8,
    warmup_epochs=1, standardize=True,
)  # fmt: skip
MakeExport = Callable[..., Path]


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own."""

    path: Path

    @property
    def free(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self, leave: int) -> None:
        """Take what is free but so many bytes; called again it takes what has become free since."""
        with open(self._filler, "ab") as file, contextlib.suppress(OSError):
            more = self.free - leave
            if more >= 4096:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more // 4096 * 4096)

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """No more writing."""
        self._mount("-o", "remount,ro", str(self.path))

    @staticmethod
    def _mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """Makes a file system in memory of a size like ``3m``; skips the test where mounting is not permitted."""
    mounted: list[Path] = []

    def make(size: str) -> SmallDisk:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()})")
        mounted.append(place)
        return SmallDisk(place)

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


@pytest.fixture(scope="session")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """Makes the folder of a search with ``store/``, ``images/`` and ``export/``, once for each kind, and returns it."""

    @cache
    def make(grouping: str = "temi", *, backbone: str = PIXELS, weights: Path | None = None,
             conditions: str = "cluster_probs", **diffusion: Any) -> Path:  # fmt: skip
        # Not at the top: Ray takes seconds to import, which most tests need not.
        from cedm_ray.stages.results.export import export_model

        folder = tmp_path_factory.mktemp("run")
        list(pack(FirstImages(digits(), NUM_IMAGES), folder / "images"))
        job = _job(folder, grouping, backbone, weights, conditions, diffusion)
        scores = [Score(ref.metric, 1.5, 0.25, ref.facts.detector, ref.facts.weights_hash, ref.facts.resize,
                        "float32", 500, NUM_IMAGES, 3) for ref in job.scoring.references]  # fmt: skip
        facts = {"metric": "fd_lenet", "score": {"kimg": 3, "scores": [vars(score) for score in scores]}}
        export_model(job, _checkpoint(folder, job), folder / "export", facts)
        return folder

    return make


def _job(folder: Path, grouping: str, backbone: str, weights: Path | None, conditions: str, diffusion: Any) -> Any:
    settings = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.1}
    clustering, condition, num_clusters = None, None, 1
    if grouping == "labels":
        num_clusters, condition = 10, folder / "labels.safetensors"
        save_clustering(from_labels(digits().labels()[:NUM_IMAGES], 10), condition)
    elif grouping != "none":
        num_clusters, clustering = NUM_CLUSTERS, _clustering(folder, backbone, weights)
        condition = clustering.file
    references = [_reference(folder, detector) for detector in ("lenet", "pixels")]
    return cast(Any, SimpleNamespace(
        grouping=grouping, num_clusters=num_clusters, clustering=clustering, condition=condition,
        images=folder / "images", diffusion=DiffusionSettings(**{**settings, **diffusion}),
        score=ScoreSettings(detector="lenet", num_steps=4, conditions=conditions),  # type: ignore[arg-type]
        scoring=SimpleNamespace(references=references, facts=references[0].facts, metric="fd_lenet"),
        num_workers=2, seed=0,
    ))  # fmt: skip


def _clustering(folder: Path, backbone: str, weights: Path | None) -> Any:
    from cedm_ray.stages.inputs import clusterings
    from cedm_ray.stages.inputs.embed import Embeddings
    from cedm_ray.stages.storage.store import Store

    images = load_packed(folder / "images").images
    loaded = load_backbone(backbone, weights, device="cpu", pixel_stats=pixel_stats(images))
    values = loaded(torch.from_numpy(np.array(images))).numpy()
    np.save(folder / "embeddings.npy", values)
    np.save(folder / "neighbors.npy", knn(values, 10))
    identity = check_backbone(backbone, weights)
    inputs = {"images": "some", "backbone": backbone, "weights": identity, "dtype": "float32"}
    job = clusterings.clustering_job(
        SearchConfig(temi=TEMI), inputs, folder / "images", NUM_CLUSTERS, Store(folder / "store")
    )
    clusterings.fit(job, Embeddings(folder / "embeddings.npy", folder / "neighbors.npy", inputs), 1.0, Mock())
    return job


def _reference(folder: Path, detector: str) -> Any:
    facts = StatsFacts(detector, "ab" * 32, "none", "float32", 2, NUM_IMAGES)
    file = folder / f"{detector}.safetensors"
    save_stats(FeatureStats(torch.zeros(2).double(), torch.eye(2).double(), facts), file)
    return SimpleNamespace(facts=facts, file=file, metric=f"fd_{detector}")


def _checkpoint(folder: Path, job: Any) -> Path:
    """A network that has been given some life: a fresh one answers the same to every condition."""
    from cedm_ray.stages.storage.checkpoints import RUNGS_FILE, SAMPLES_FILE, STATE_FILE

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    label_dim = 0 if job.condition is None else job.num_clusters
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = new_state(build_net(job.diffusion, 8, 1, label_dim, augment=job.diffusion.augment_prob > 0))
        for parameter in state.ema.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state.nimg = 3000
    save_state(state, checkpoint / STATE_FILE)
    (checkpoint / RUNGS_FILE).write_text("[]")
    sample_grid(np.zeros((4, 1, 8, 8), np.uint8), columns=2).save(checkpoint / SAMPLES_FILE)
    return checkpoint
