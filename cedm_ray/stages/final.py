"""The best C, trained on to the full budget, scored on independent sets of images, and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cedm_ray.data.registry import TEST_SPLITS, open_source
from cedm_ray.data.sources import ImageSource
from cedm_ray.data.subset import FirstImages
from cedm_ray.devices import default_device
from cedm_ray.errors import UserError
from cedm_ray.metrics.evaluation import EvaluationInputs, evaluate_features, score_of
from cedm_ray.metrics.scores import Score
from cedm_ray.metrics.stats import load_stats
from cedm_ray.stages.context import Context
from cedm_ray.stages.decide import Decision
from cedm_ray.stages.inputs.detectors import DetectorSpec
from cedm_ray.stages.inputs.embed import Embeddings
from cedm_ray.stages.inputs.features import FeatureParts
from cedm_ray.stages.inputs.images import pack_images
from cedm_ray.stages.inputs.scoring import Reference
from cedm_ray.stages.results.export import export_model
from cedm_ray.stages.results.exported import EXPORT_FOLDER
from cedm_ray.stages.storage.bucket_files import fetch_files
from cedm_ray.stages.storage.checkpoints import intact
from cedm_ray.stages.storage.store import Store, read_json, write_json
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.records import FinalScore, last_checkpoint, unconditional_record
from cedm_ray.stages.training.trial_job import TrialJob
from cedm_ray.stages.training.trials import TrialSource, tune_trials
from cedm_ray.stages.training.worker import samples_stats_file

EVALUATION_FILE = "evaluation.json"


def train_final(ctx: Context, ledger: Ledger, decision: Decision, embeddings: Embeddings) -> FinalScore:
    """Train the best trial on to the full budget, evaluate and export it; goes on from its newest checkpoint.

    Args:
        ctx: The search.
        ledger: Where trials are written down.
        decision: Which trial to go on with.
        embeddings: The embeddings and their neighbours.
    """
    total_kimg, best = ctx.config.final.total_kimg, decision.best
    job = ledger.planner.job(best.params, total_kimg=total_kimg)
    if not job.finally_scored(best.rungs[-1]) or last_checkpoint(best) is None:
        with ctx.terminal.stage(f"training {best.label} on to {total_kimg:,} kimg", ctx.board):
            source = TrialSource(ledger, [best.params])
            tune_trials(ctx, ledger, "final", embeddings, source, at_once=lambda: 1, total_kimg=total_kimg)
    record = next(record for record in ledger.records if record.key == best.key)
    last = record.rungs[-1]
    if record.state != "complete" or not job.finally_scored(last):
        raise RuntimeError(f"training {best.label} to the full budget failed: {record.reason}")
    checkpoint = last_checkpoint(record)
    if checkpoint is None:
        raise UserError(f"no checkpoint of {best.label} is whole under {job.checkpoints}; run the same command again")
    with ctx.terminal.stage(f"evaluating {best.label}", ctx.board):
        others = evaluate_final(ctx, ledger, job, embeddings)
    export = ctx.folder / EXPORT_FOLDER
    distances = _distances(job, last)
    final = FinalScore(
        num_clusters=best.num_clusters,
        kimg=int(last["kimg"]),
        mean=distances[0].value,
        std=distances[0].std or 0.0,
        num_sets=distances[0].num_sets,
        num_images=distances[0].num_images,
        export=str(export),
        scores=tuple(asdict(score) for score in (*distances, *others)),
    )
    facts = {"score": asdict(final), "metric": job.scoring.metric, "tie_set": asdict(decision.ties)}
    export_model(job, checkpoint, export, facts)
    return final


def _distances(job: TrialJob, rung: Mapping[str, Any]) -> list[Score]:
    """The Fréchet distances as means over the final sets of images, the one that the search minimises first."""
    found = []
    for reference in job.scoring.references:
        values = rung["final_scores"][reference.metric]
        found.append(
            score_of(
                reference.facts,
                reference.metric,
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else None,
                num_images=int(rung["final_images"]),
                num_reference=reference.facts.count,
                num_sets=len(values),
            )
        )
    return found


def evaluate_final(ctx: Context, ledger: Ledger, job: TrialJob, embeddings: Embeddings) -> list[Score]:
    """All further scores of the first final set of images, from the features that the workers left, once."""
    file = job.path / EVALUATION_FILE
    key = {"num_images": job.final_images, "kimg": job.rungs_kimg[-1], "sets": job.final_sets}
    known = read_json(file)
    if known is not None and known["key"] == key:
        return [Score(**score) for score in known["scores"]]
    other, test = unconditional_record(ledger.records), _test_images(ctx)
    unconditional = None if other is None else last_checkpoint(other)
    if other is not None and unconditional is None:
        ctx.terminal.line(f"  {other.label} is left out of the scores: its checkpoint is torn", style="yellow")
    task = ray.remote(_evaluate).options(num_cpus=ctx.shares.cpus_per_probe, num_gpus=ctx.shares.gpus_per_probe)
    work = [
        task.remote(job, reference, ctx.images, test, ctx.store, embeddings, unconditional)
        for reference in job.scoring.references
    ]
    scores = [score for found in ray.get(work) for score in found]
    write_json(file, {"key": key, "scores": [asdict(score) for score in scores]})
    return scores


def _test_images(ctx: Context) -> Path | None:
    """Folder of the packed held-out images, where the data set has some."""
    config = ctx.config
    if config.dataset not in TEST_SPLITS:
        return None
    try:
        source: ImageSource = open_source(
            config.dataset, data_dir=config.data_dir.expanduser(), resolution=None, split="test"
        )
        if config.max_images is not None:
            source = FirstImages(source, min(config.max_images, len(source)))
        return pack_images(source, ctx.store, ctx.terminal)
    except UserError as error:  # a search that took days does not end over one score
        ctx.terminal.line(f"  AUROC is left out, for want of the test images: {error}")
        return None


def _features(images: Path, spec: DetectorSpec, store: Store, device: torch.device) -> np.ndarray | None:
    """Features of packed images; what is missing of them is made. None where there are too many to keep."""
    parts = FeatureParts(images, spec, store)
    if not parts.kept:
        return None
    parts.make_missing(device, lambda _: None)
    return parts.features()


def _evaluate(
    job: TrialJob,
    reference: Reference,
    images: Path,
    test: Path | None,
    store: Store,
    embeddings: Embeddings,
    unconditional: Path | None,
) -> list[Score]:
    """The scores in the features of one detector but its distance, which is the mean over all sets."""
    device = default_device()
    fetch_files(job.features, fresh=True)
    spec = reference.detector
    real = embeddings.values if spec.backbone is not None else _features(images, spec, store, device)
    if real is None:
        return []
    name = samples_stats_file(reference.metric)
    samples = unconditional / name if unconditional and intact(unconditional, name) else None
    inputs = EvaluationInputs(
        facts=reference.facts,
        generated=np.concatenate(list(_kept(job, reference.metric))),
        real=real,
        logits=_joined(_kept(job, f"{reference.metric}-logits")),
        test=None if test is None else _features(test, spec, store, device),
        unconditional=load_stats(samples) if samples else None,
    )
    return [score for score in evaluate_features(inputs, device=device) if score.metric != reference.metric]


def _kept(job: TrialJob, name: str) -> Iterator[np.ndarray]:
    """What each worker left of a set of images, in the order of the images."""
    for rank in range(job.num_workers):
        file = job.features / f"{name}-{rank}.npy"
        if file.is_file():
            yield np.load(file, allow_pickle=False)


def _joined(parts: Iterator[np.ndarray]) -> np.ndarray | None:
    found = list(parts)
    return np.concatenate(found) if found else None
