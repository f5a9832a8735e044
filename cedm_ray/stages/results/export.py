"""The best model as a folder of its own: weights, conditions, statistics, scores, and a card that explains them."""

from __future__ import annotations

import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cedm_ray.clustering.clustering_io import CLUSTERING_FILE, HEAD_FILE, load_clustering
from cedm_ray.clustering.quality import kl_from_uniform
from cedm_ray.data.pack import PackedImages, load_packed
from cedm_ray.diffusion.model_file import FACTS_FILE, FORMAT, WEIGHTS_FILE
from cedm_ray.diffusion.state_io import read_ema
from cedm_ray.features.backbones import PIXELS
from cedm_ray.features.pixels import pixel_stats
from cedm_ray.settings import SEARCHED
from cedm_ray.stages.results.exported import PIXEL_STATS_FILE
from cedm_ray.stages.results.model_card import model_card
from cedm_ray.stages.storage.checkpoints import SAMPLES_FILE, intact, weights_file
from cedm_ray.stages.storage.store import write_json
from cedm_ray.stages.training.trial_job import TrialJob

REFERENCE_FILE, CARD_FILE = "reference.safetensors", "README.md"
PACKAGES = ("cedm-ray", "ray", "timm", "numpy")


def export_model(job: TrialJob, checkpoint: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Write the averaged weights and everything that is needed to use and to compare them into one folder.

    ``model.safetensors`` holds the weights, ``clustering.safetensors`` assignments and q(c), ``head.safetensors`` what
    gives clusters to other images, ``model.json`` how the network is built and what it scored,
    ``reference.safetensors`` the statistics of the real images (``reference-<metric>.safetensors`` those of further
    detectors), ``samples.png`` samples, ``README.md`` what all of that is.

    Args:
        job: The training.
        checkpoint: Its last checkpoint.
        out: The folder; that of an earlier export is replaced when this one is whole.
        facts: More facts for ``model.json``: ``score``, ``metric``, ...
    """
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        _write(job, checkpoint, scratch, facts)
        shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(job: TrialJob, checkpoint: Path, out: Path, facts: Mapping[str, Any]) -> None:
    tensors, nimg = read_ema(weights_file(checkpoint))
    # Not save_file: its files are closed to everyone but their owner, whatever the umask says.
    (out / WEIGHTS_FILE).write_bytes(save(tensors))
    packed = load_packed(job.images)
    _copy_condition(job, packed, out)
    for number, reference in enumerate(job.scoring.references):
        name = REFERENCE_FILE if number == 0 else f"reference-{reference.metric}.safetensors"
        shutil.copyfile(reference.file, out / name)
    if intact(checkpoint, SAMPLES_FILE):
        shutil.copyfile(checkpoint / SAMPLES_FILE, out / SAMPLES_FILE)
    described = {**_facts(job, packed), "num_parameters": sum(t.numel() for t in tensors.values()), "nimg": nimg}
    write_json(out / FACTS_FILE, {**described, **facts})
    files = {file.name for file in out.iterdir()}
    (out / CARD_FILE).write_text(model_card({**described, **facts}, files), encoding="utf-8")


def _copy_condition(job: TrialJob, packed: PackedImages, out: Path) -> None:
    """The clustering, and for TEMI all that gives images from elsewhere a cluster, but for the backbone's weights."""
    if job.condition is None:
        return
    shutil.copyfile(job.condition, out / CLUSTERING_FILE)
    if job.grouping != "temi":
        return
    shutil.copyfile(job.condition.with_name(HEAD_FILE), out / HEAD_FILE)
    embedding = _embedding(job)
    if embedding is not None and embedding["backbone"] == PIXELS:
        stats = pixel_stats(packed.images)
        tensors = {"mean": torch.from_numpy(stats.mean), "std": torch.from_numpy(stats.std)}
        (out / PIXEL_STATS_FILE).write_bytes(save(tensors))


def _embedding(job: TrialJob) -> dict[str, Any] | None:
    """What turned images into the embeddings that were clustered; None where none were."""
    if job.clustering is None or job.grouping not in SEARCHED:
        return None
    return {name: job.clustering.inputs[name] for name in ("backbone", "weights", "dtype")}


def _facts(job: TrialJob, packed: PackedImages) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "img_resolution": packed.resolution,
        "img_channels": packed.channels,
        "label_dim": job.num_clusters if job.condition is not None else 0,
        "dataset": packed.name,
        "num_images": len(packed),
        "images_sha256": packed.facts.pixels_sha256,
        **_condition(job),
        "embedding": _embedding(job),
        "diffusion": asdict(job.diffusion),
        "num_steps": job.score.num_steps,
        "conditions": job.score.conditions,
        "detector": asdict(job.scoring.facts),
        "num_workers": job.num_workers,
        "seed": job.seed,
        "versions": _versions(),
    }


def _condition(job: TrialJob) -> dict[str, Any]:
    if job.condition is None:
        return {"grouping": job.grouping}
    probs = load_clustering(job.condition).cluster_probs
    return {
        "grouping": job.grouping,
        "num_clusters": job.num_clusters,
        "num_used": int((probs > 0).sum()),
        "kl_from_uniform": kl_from_uniform(probs),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its CUDA
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed
            continue
    return found
