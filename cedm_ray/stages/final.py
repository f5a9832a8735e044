"""The best C, trained on to the full budget, scored on independent sets of images, and exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import save_file

from cedm_ray.data.pack import load_packed
from cedm_ray.stages.context import Context
from cedm_ray.stages.granularity import Ledger, tune_trials
from cedm_ray.stages.plan import TrialJob
from cedm_ray.stages.records import FinalScore, TrialRecord
from cedm_ray.stages.store import write_json
from cedm_ray.stages.trial import SAMPLES_FILE, STATE_FILE

EXPORT_FOLDER = "export"


def train_final(ctx: Context, ledger: Ledger, best: TrialRecord, data: Mapping[str, Any]) -> FinalScore:
    """Train the best trial on to the full budget and export it; goes on from its newest checkpoint.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        best: The trial to go on with.
        data: References to ``embeddings`` and ``neighbors``.
    """
    total_kimg = ctx.config.final.total_kimg
    job = ledger.planner.job(best.params, total_kimg=total_kimg)
    if not job.finally_scored(best.rungs[-1]):
        with ctx.terminal.stage(f"training {best.label} on to {total_kimg:,} kimg", ctx.board):
            tune_trials(ctx, ledger, "final", data, params=best.params, total_kimg=total_kimg)
    record = next(record for record in ledger.records if record.key == best.key)
    last = record.rungs[-1]
    if record.state != "complete" or not job.finally_scored(last):
        raise RuntimeError(f"training {best.label} to the full budget failed: {record.reason}")
    export = ctx.folder / EXPORT_FOLDER
    scores = last["final_scores"]
    final = FinalScore(
        num_clusters=best.num_clusters,
        kimg=int(last["kimg"]),
        mean=float(np.mean(scores)),
        std=float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        num_sets=len(scores),
        num_images=int(last["final_images"]),
        export=str(export),
    )
    export_model(job, Path(last["checkpoint_path"]), export, {"score": asdict(final), "metric": job.scoring.metric})
    return final


def export_model(job: TrialJob, checkpoint: Path, out: Path, facts: Mapping[str, Any]) -> None:
    """Write the averaged weights and everything that is needed to use and to compare them into one folder.

    ``model.safetensors`` holds the weights, ``clustering.safetensors`` assignments and q(c), ``model.json`` how the
    network is built and what it scored, ``reference.safetensors`` the statistics of the real images.
    """
    out.mkdir(parents=True, exist_ok=True)
    with safe_open(checkpoint / STATE_FILE, framework="pt") as state:
        names = [name for name in state.keys() if name.startswith("ema.")]  # noqa: SIM118  not a dict
        save_file({name.removeprefix("ema."): state.get_tensor(name) for name in names}, out / "model.safetensors")
    if job.condition is not None:
        shutil.copyfile(job.condition, out / "clustering.safetensors")
    shutil.copyfile(job.scoring.reference, out / "reference.safetensors")
    shutil.copyfile(checkpoint / SAMPLES_FILE, out / SAMPLES_FILE)
    packed = load_packed(job.images)
    write_json(
        out / "model.json",
        {
            "img_resolution": packed.resolution,
            "img_channels": packed.channels,
            "label_dim": job.num_clusters if job.condition is not None else 0,
            "dataset": packed.name,
            "images_sha256": packed.facts.pixels_sha256,
            "diffusion": asdict(job.diffusion),
            "num_steps": job.score.num_steps,
            "detector": asdict(job.scoring.facts),
            **facts,
        },
    )
