"""The workers of a trial, without Ray: what they generate and score."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from cedm_ray.clustering.clustering_io import save_clustering
from cedm_ray.clustering.types import make_clustering
from cedm_ray.data.digits import digits
from cedm_ray.data.pack import pack
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.stats import save_stats
from cedm_ray.settings import DiffusionSettings, ScoreSettings
from cedm_ray.stages.features import FeatureParts, lenet_spec
from cedm_ray.stages.plan import TrialJob
from cedm_ray.stages.scoring import Reference, Scoring
from cedm_ray.stages.store import Store
from cedm_ray.stages.trial import Worker

CPU = torch.device("cpu")
NUM_IMAGES = 130
GROUPS = np.repeat([0, 1, 3], [1200, 500, 97])  # of four clusters, one empty


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrialJob:
    folder = tmp_path_factory.mktemp("trial")
    for _ in pack(digits(), folder / "images"):
        pass
    save_clustering(make_clustering(GROUPS.astype(np.int64), 4), folder / "groups.safetensors")
    store = Store(folder / "store")
    parts = FeatureParts(folder / "images", lenet_spec(folder / "images", store), store)
    parts.make_missing(CPU, lambda _: None)
    stats = parts.stats()
    save_stats(stats, folder / "reference.safetensors")
    return TrialJob(
        label="C=4", grouping="file", num_clusters=4, clustering=None, condition=folder / "groups.safetensors",
        images=folder / "images",
        diffusion=DiffusionSettings(
            model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), total_batch=4
        ),
        score=ScoreSettings(detector="lenet", num_images=NUM_IMAGES, num_steps=3, batch_size=32),
        scoring=Scoring((Reference(parts.spec, stats.facts, folder / "reference.safetensors"),)),
        rungs_kimg=(1,), final_sets=1, final_images=NUM_IMAGES, num_workers=1, seed=0, inputs={}, path=folder / "job",
    )  # fmt: skip


def worker(job: TrialJob, rank: int = 0, world_size: int = 1, **score: Any) -> Worker:
    """A worker whose network has been given some life: a fresh one answers the same to every condition."""
    made = Worker(replace(job, score=replace(job.score, **score)), rank, world_size, CPU)
    torch.manual_seed(0)
    for parameter in made.state.ema.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return made


def images_of(job: TrialJob, world_size: int = 1, first: int = 0, **score: Any) -> torch.Tensor:
    each = [list(worker(job, rank, world_size, **score)._generated(first, NUM_IMAGES)) for rank in range(world_size)]
    return torch.cat([batch for batches in each for batch in batches])


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for pixels on the edge of two grey levels, which the order of additions can tip."""
    apart = (a.int() - b.int()).abs()
    return a.shape == b.shape and int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 1e-3


def test_batch_size_and_number_of_workers_change_no_image(job: TrialJob) -> None:
    once = images_of(job)
    assert float(once.float().std()) > 10 and len(once.unique(dim=0)) == NUM_IMAGES
    for other in (images_of(job, batch_size=50), images_of(job, world_size=3), images_of(job, world_size=2)):
        assert alike(other, once)


def test_sets_share_no_image(job: TrialJob) -> None:
    first, second = images_of(job), images_of(job, first=NUM_IMAGES)
    assert len(torch.cat([first, second]).unique(dim=0)) == 2 * NUM_IMAGES


def test_sums_of_workers_add_up_to_those_of_one_pass(job: TrialJob) -> None:
    pixels, detector = images_of(job), worker(job).detectors["fd_lenet"]
    features = detector(pixels)
    whole, merged = FeatureSums(64), FeatureSums(64)
    whole.update(features)
    for part in features.split([40, 1, 60, 29]):
        sums = FeatureSums(64)
        sums.update(part)
        merged.merge(sums)
    for one, other in zip(whole.mean_cov(), merged.mean_cov(), strict=True):
        assert float((one - other).abs().max()) <= 1e-10 * float(one.abs().max())


def test_the_score_is_the_distance_of_its_images_and_features_are_kept_when_asked_for(job: TrialJob) -> None:
    alone = worker(job)
    scores = alone.score(0, NUM_IMAGES, keep_features=True)
    kept = np.load(job.features / "fd_lenet-0.npy")
    reference = job.scoring.references[0].load()
    expected = frechet_distance(kept.mean(0, dtype=np.float64), np.cov(kept.astype(np.float64), rowvar=False),
                                reference.mu, reference.sigma)  # fmt: skip
    assert scores == {"fd_lenet": pytest.approx(expected, rel=1e-8)}
    assert kept.shape == (NUM_IMAGES, 64) and alone.stats["fd_lenet"].facts.count == NUM_IMAGES
    assert alone.samples is not None and alike(alone.samples, images_of(job)[:64])


def test_conditions_follow_the_shares_or_are_uniform_over_the_used_clusters(job: TrialJob) -> None:
    by_share, uniform = worker(job).cluster_probs, worker(job, conditions="uniform").cluster_probs
    assert by_share is not None and uniform is not None
    assert by_share.tolist() == [1200 / 1797, 500 / 1797, 0, 97 / 1797]
    assert uniform.tolist() == [1, 1, 0, 1]
    assert not alike(images_of(job), images_of(job, conditions="uniform"))


def test_scoring_is_told_in_place_of_training(job: TrialJob) -> None:
    told, silent = worker(job, batch_size=40), worker(job, rank=1, world_size=2)
    told.board, silent.board = Mock(), Mock()
    told.score(0, NUM_IMAGES)
    silent.score(0, NUM_IMAGES)
    names = [call[0] for call in told.board.method_calls]
    assert (names[0], names[1], names[-2:]) == ("remove", "open", ["remove", "open"]) and "update" in names
    key, label, done, total, unit = told.board.update.call_args.args
    assert (key, label, total, unit) == (job.score_key, "C=4 scoring", NUM_IMAGES, "images") and 0 < done <= NUM_IMAGES
    assert not silent.board.method_calls
