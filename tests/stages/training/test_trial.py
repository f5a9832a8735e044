"""A trial without Ray: what its workers generate and score, what it asks of the cluster, and what interrupts it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast
from unittest.mock import Mock

import numpy as np
import pytest
import ray.exceptions
import torch
from ray.train import ControllerError, WorkerGroupError
from ray.train import UserCallback as RunCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from cedm_ray.clustering.clustering_io import CLUSTERING_FILE, save_clustering
from cedm_ray.clustering.types import make_clustering
from cedm_ray.config import SearchConfig
from cedm_ray.data.digits import digits
from cedm_ray.data.pack import pack
from cedm_ray.diffusion.compute import ComputeSettings
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.train import Progress, train
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.metrics.stats import save_stats
from cedm_ray.settings import DiffusionSettings, ScoreSettings
from cedm_ray.stages.cluster.shares import Shares
from cedm_ray.stages.inputs.detectors import lenet_spec
from cedm_ray.stages.inputs.features import FeatureParts
from cedm_ray.stages.inputs.scoring import Reference, Scoring
from cedm_ray.stages.storage.checkpoints import STATE_FILE
from cedm_ray.stages.storage.disk_faults import StorageError
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.training import trial
from cedm_ray.stages.training.records import TrialRecord, write_record
from cedm_ray.stages.training.streamed import StreamedImages
from cedm_ray.stages.training.trial_job import Planner, TrialJob
from cedm_ray.stages.training.worker import Worker
from helpers.failures import GONE, dead, group

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
            model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), total_batch=12
        ),
        compute=ComputeSettings(),
        score=ScoreSettings(detector="lenet", num_images=NUM_IMAGES, num_steps=3, batch_size=32),
        scoring=Scoring((Reference(parts.spec, stats.facts, folder / "reference.safetensors"),)),
        rungs_kimg=(1, 2), search_kimg=2, final_sets=1, final_images=NUM_IMAGES, num_workers=1, seed=0, inputs={},
        path=folder / "job",
    )  # fmt: skip


def worker(job: TrialJob, rank: int = 0, world_size: int = 1, board: Any = None, **score: Any) -> Worker:
    """A worker whose network has been given some life: a fresh one answers the same to every condition."""
    made = Worker(replace(job, score=replace(job.score, **score)), rank, world_size, CPU, board=board)
    torch.manual_seed(0)
    for parameter in made.state.ema.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return made


def images_of(job: TrialJob, world_size: int = 1, first: int = 0, **score: Any) -> torch.Tensor:
    each = [
        list(worker(job, rank, world_size, **score).scorer._generated(first, NUM_IMAGES)) for rank in range(world_size)
    ]
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
    pixels, detector = images_of(job), worker(job).scorer.detectors["fd_lenet"]
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
    scores = alone.scorer.score(0, NUM_IMAGES, keep_features=True)
    kept = np.load(job.features / "fd_lenet-0.npy")
    reference = job.scoring.references[0].load()
    expected = frechet_distance(kept.mean(0, dtype=np.float64), np.cov(kept.astype(np.float64), rowvar=False),
                                reference.mu, reference.sigma)  # fmt: skip
    assert scores == {"fd_lenet": pytest.approx(expected, rel=1e-8)}
    assert kept.shape == (NUM_IMAGES, 64) and alone.scorer.stats["fd_lenet"].facts.count == NUM_IMAGES
    assert alone.scorer.samples is not None and alike(alone.scorer.samples, images_of(job)[:64])


def test_conditions_follow_the_shares_or_are_uniform_over_the_used_clusters(job: TrialJob) -> None:
    by_share, uniform = worker(job).scorer.cluster_probs, worker(job, conditions="uniform").scorer.cluster_probs
    assert by_share is not None and uniform is not None
    assert by_share.tolist() == [1200 / 1797, 500 / 1797, 0, 97 / 1797]
    assert uniform.tolist() == [1, 1, 0, 1]
    assert not alike(images_of(job), images_of(job, conditions="uniform"))


def test_scoring_is_told_in_place_of_training(job: TrialJob) -> None:
    board, other = Mock(), Mock()
    told, silent = worker(job, board=board, batch_size=40), worker(job, rank=1, world_size=2, board=other)
    told.scorer.score(0, NUM_IMAGES)
    silent.scorer.score(0, NUM_IMAGES)
    names = [call[0] for call in board.method_calls]
    assert (names[0], names[1], names[-2:]) == ("remove", "open", ["remove", "open"]) and "update" in names
    key, label, done, total, unit, _ = board.update.call_args.args
    assert (key, label, total, unit) == (job.score_key, "C=4 scoring", NUM_IMAGES, "images") and 0 < done <= NUM_IMAGES
    assert not other.method_calls


def test_the_last_rung_of_the_search_takes_several_sets_and_earlier_ones_one(job: TrialJob) -> None:
    many = worker(replace(job, diffusion=replace(job.diffusion, total_batch=500)), num_sets=3)
    first, last = many.train_to(1, Mock()), many.train_to(2, Mock())
    sets = [many.scorer.score(number, NUM_IMAGES)["fd_lenet"] for number in range(3)]
    assert len(set(sets)) == 3 and last["score_sets"] == pytest.approx(sets, rel=1e-12)
    assert last["score"] == last["fd_lenet"] == pytest.approx(np.mean(sets), rel=1e-12)
    assert "score_sets" not in first and first["score"] == first["fd_lenet"] > 0
    assert first["num_images"] == last["num_images"] == NUM_IMAGES
    further = replace(job, diffusion=many.job.diffusion, rungs_kimg=(1, 2, 3))  # the best one's training goes on
    beyond = worker(further, num_sets=3)
    assert ["score_sets" in beyond.train_to(kimg, Mock()) for kimg in (1, 2, 3)] == [False, True, False]


def test_a_rung_tells_what_its_training_and_scoring_cost(job: TrialJob) -> None:
    alone = worker(replace(job, diffusion=replace(job.diffusion, total_batch=500)), num_sets=1)
    for kimg in (1, 2):
        rung = alone.train_to(kimg, Mock())
        seconds = 1000 / rung["images_per_s"] + rung["score_s"]
        assert rung["device"] == "cpu" and "energy_kwh" not in rung
        assert rung["device_hours"] * 3600 == pytest.approx(seconds, rel=0.05)


def test_the_meter_is_told_of_all_workers_and_what_each_asked_for(
    job: TrialJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Mock()
    monkeypatch.setattr("cedm_ray.stages.training.worker.Meter", meter)
    Worker(job, 1, 2, CPU, gpus=0.5)
    meter.assert_called_once_with(CPU, 2, 0.5)


def test_the_final_sets_are_scored_one_by_one_and_the_first_one_s_features_kept(job: TrialJob, tmp_path: Path) -> None:
    alone = worker(replace(job, final_sets=2, path=tmp_path / "job"))
    alone.rungs = [{"kimg": 2, "score": 9.0}]
    sets = [alone.scorer.score(number, NUM_IMAGES)["fd_lenet"] for number in range(2)]
    assert alone.finish() == {"kimg": 2, "score": 9.0, "final_images": NUM_IMAGES, "final_scores": {"fd_lenet": sets}}
    kept = np.load(alone.job.features / "fd_lenet-0.npy")
    np.testing.assert_allclose(kept, alone.scorer.detectors["fd_lenet"](images_of(job)), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_holds_the_samples_as_pixels_too(job: TrialJob, tmp_path: Path) -> None:
    alone = worker(job)
    alone.scorer.score(0, NUM_IMAGES)
    alone.scorer.score(1, NUM_IMAGES)
    alone.checkpoint(tmp_path)
    pixels = np.load(tmp_path / "samples.npy", allow_pickle=False)
    assert pixels.dtype == np.uint8 and pixels.shape == (64, 1, 8, 8)
    assert alike(torch.from_numpy(pixels), images_of(job)[:64])


@pytest.fixture
def planner(job: TrialJob, tmp_path: Path) -> Planner:
    config = SearchConfig(seed=5, storage_path=tmp_path)
    inputs = {"images": "some", "backbone": "pixels"}
    return Planner(config, Store(tmp_path / "store"), inputs, job.images, "ab" * 32, {}, job.scoring)


def test_a_retraining_has_a_seed_of_its_own_on_the_same_clustering(planner: Planner) -> None:
    params = {"grouping": "temi", "num_clusters": 17}
    first, again = planner.job(params), planner.job({**params, "train_seed": 3})
    assert (first.label, first.seed, again.label, again.seed) == ("C=17", 5, "C=17 (seed 3)", 3)
    assert again.clustering == first.clustering and first.clustering is not None and first.clustering.seed == 5
    assert {**again.inputs, "seed": 5} == first.inputs and again.path != first.path
    assert replace(again, label="C=17", seed=5, inputs=first.inputs, path=first.path) == first
    assert planner.job({**params, "train_seed": 5}) == first
    assert planner.job({"grouping": "none", "num_clusters": 1, "train_seed": 3}).label == "unconditional (seed 3)"
    assert planner.job(params).search_kimg == planner.job(params, total_kimg=200_000).search_kimg == 100_000


def test_how_a_training_is_computed_is_part_of_its_key_only_where_a_precision_is_asked_for(planner: Planner) -> None:
    def path_with(**values: Any) -> Path:
        return replace(planner, config=planner.config.with_values(values)).job(params).path

    params = {"grouping": "none", "num_clusters": 1}
    plain = planner.job(params).path
    same = {"compute.compile": True, "compute.device_batch": 4, "compute.images": "streamed", "score.batch_size": 7}
    assert path_with(**same) == plain
    others = {path_with(**{f"compute.{name}": "bf16"}) for name in ("precision", "sample_precision")}
    assert len(others | {plain}) == 3


def failing(error: Exception, times: int) -> Any:
    """A training that ends with an error, the first times that it is tried."""
    left = [times]

    def trains(state: Any, source: Any, **given: Any) -> Iterator[Progress]:
        if left[0]:
            left[0] -= 1
            raise error
        yield from train(state, source, **given)

    return trains


def test_want_of_memory_halves_once_what_is_computed_at_once_when_the_processes_start_again(
    job: TrialJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, path=tmp_path, diffusion=replace(job.diffusion, total_batch=500))
    monkeypatch.setattr("cedm_ray.stages.training.worker.train", failing(torch.OutOfMemoryError("full"), times=2))
    with pytest.raises(torch.OutOfMemoryError):
        worker(job).train_to(1, Mock())
    again = worker(job)
    assert again.compute.device_batch == 250
    with pytest.raises(torch.OutOfMemoryError):  # a second time it is the training that is too large
        again.train_to(1, Mock())
    third = worker(job)
    assert third.compute.device_batch == 250 and third.train_to(1, Mock())["device_batch"] == 250
    assert worker(replace(job, path=tmp_path / "other")).compute.device_batch is None


def test_want_of_memory_in_sampling_changes_no_image(job: TrialJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = images_of(job), []

    def short(net: Any, *, batch_size: int, indices: range, **given: Any) -> Iterator[torch.Tensor]:
        sizes.append(batch_size)
        batches = generate(net, batch_size=batch_size, indices=indices, **given)
        yield next(batches)
        if batch_size > 16:
            raise torch.OutOfMemoryError("full")
        yield from batches

    monkeypatch.setattr("cedm_ray.stages.training.scorer.generate", short)
    assert alike(images_of(job, batch_size=64), whole) and sizes == [64, 32, 16]
    with pytest.raises(torch.OutOfMemoryError):
        full = Mock(side_effect=torch.OutOfMemoryError("full"))
        monkeypatch.setattr("cedm_ray.stages.training.scorer.generate", full)
        images_of(job)


def test_a_training_whose_loss_is_no_number_any_more_is_not_scored(
    job: TrialJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = worker(job)
    assert lost._loss(torch.tensor([1.0, math.inf, 3.0])) == 2.0  # a step that overflowed is left out
    for parameter in lost.state.net.parameters():
        parameter.data.fill_(math.nan)
    monkeypatch.setattr(lost.scorer, "sets", Mock(side_effect=AssertionError("scored")))
    rung = lost.train_to(1, Mock())
    assert math.isnan(rung["loss"]) and math.isnan(rung["score"]) and math.isnan(rung["fd_lenet"])


def test_images_that_do_not_fit_are_streamed(job: TrialJob, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(worker(job).source, ResidentImages)
    asked: list[tuple[int, torch.device, float]] = []
    monkeypatch.setattr("cedm_ray.stages.training.worker.fits", lambda *given: asked.append(given))
    streamed = Worker(job, 0, 1, CPU, sharing=4.0).source
    assert asked == [(1797 * 64, CPU, 4.0)]
    assert isinstance(streamed, StreamedImages) and len(streamed) == 1797 and streamed.class_index is not None
    assert isinstance(Worker(with_images(job, "resident"), 0, 1, CPU).source, ResidentImages)
    monkeypatch.undo()
    assert isinstance(Worker(with_images(job, "streamed"), 0, 1, CPU).source, StreamedImages)


def with_images(job: TrialJob, where: Literal["resident", "streamed"]) -> TrialJob:
    return replace(job, compute=ComputeSettings(images=where))


def test_scores_of_a_retraining_are_of_other_images(job: TrialJob) -> None:
    assert not alike(images_of(job), images_of(replace(job, seed=1)))


@pytest.mark.parametrize("stored", [False, True])
def test_a_stored_clustering_asks_nothing_of_the_cluster(
    planner: Planner, job: TrialJob, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"grouping": "temi", "num_clusters": 17}
    clustering = planner.job(params).clustering
    assert clustering is not None
    if stored:
        with planner.store.create(clustering.path, clustering.inputs, {}) as scratch:
            (scratch / CLUSTERING_FILE).touch()
    tasks, trainer = Mock(), Mock()
    monkeypatch.setattr(trial.ray, "remote", tasks)
    monkeypatch.setattr(trial.ray, "get", Mock())
    monkeypatch.setattr(trial, "_nodes", lambda: {"head"})
    monkeypatch.setattr(trial.ray.train.torch, "TorchTrainer", trainer)
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", RunCallback)
    shares = Shares(2, 1.0, 0.5, 2.0, 0.0, max_trials=1, max_probes=1)
    trial.run_trial(params, planner, cast(Any, None), Mock(), shares)
    assert tasks.call_count == (not stored) and trainer.return_value.fit.call_count == 1
    loop = trainer.call_args.kwargs["train_loop_config"]
    assert loop["job"].num_clusters == 17 and loop["gpus"] == 0.5
    scaling = trainer.call_args.kwargs["scaling_config"]
    assert scaling.num_workers == 2 and scaling.resources_per_worker == {"CPU": 1.0, "GPU": 0.5}


def test_a_training_goes_on_from_its_newest_whole_checkpoint_and_says_what_was_torn(
    job: TrialJob, tmp_path: Path
) -> None:
    job = replace(job, path=tmp_path, diffusion=replace(job.diffusion, total_batch=500))
    first = worker(job)
    assert first.restore() == [] and list(first.missing_rungs()) == [1, 2]
    for number, kimg in enumerate(job.rungs_kimg):
        first.train_to(kimg, Mock())
        folder = job.checkpoints / f"checkpoint_{number}"
        folder.mkdir(parents=True)
        first.checkpoint(folder)
    paths = [str(job.checkpoints / f"checkpoint_{number}") for number in (0, 1)]
    whole = worker(job).restore()
    assert [rung.pop("checkpoint_path") for rung in whole] == paths and whole == first.rungs

    state = Path(paths[1]) / STATE_FILE
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(bytes(content))
    board = Mock()
    again = worker(job, board=board)
    assert again.restore() == [{**first.rungs[0], "checkpoint_path": paths[0]}]
    (line,) = board.say.call_args.args
    assert line.startswith(f"C=4: checkpoint {paths[1]} is torn ({STATE_FILE} has another content than was written)")
    assert list(again.missing_rungs()) == [2] and again.state.nimg == 1000
    again.train_to(2, Mock())
    for one, other in zip(again.state.ema.parameters(), first.state.ema.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("gone_after", "within_s", "lost"), [(1, 5, True), (18, 30, True), (18, 5, False)])
def test_whether_a_node_is_lost_is_waited_for(
    gone_after: int, within_s: float, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr(trial.time, "sleep", lambda seconds: passed.append(passed[-1] + seconds))
    monkeypatch.setattr(trial, "_nodes", lambda: {"head"} if passed[-1] >= gone_after else {"head", "a"})
    assert trial._lost({"head", "a"}, within_s) is lost
    assert passed[-1] == (max(trial.PAUSE_S, gone_after) if lost else within_s)


class Trained:
    """A training that fails as it is told to, and the record that the driver keeps of it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *course: Exception | int) -> None:
        self.job = cast(Any, SimpleNamespace(path=path, label="C=7"))
        self.course, self.board, self.pauses = list(course), Mock(), Mock()
        self.nodes = {"head", "a", "b"}
        monkeypatch.setattr(trial.time, "sleep", self.pauses)
        monkeypatch.setattr(trial, "_nodes", lambda: set(self.nodes))

    def train(self) -> None:
        while self.course:
            step = self.course.pop(0)
            if isinstance(step, int):
                rungs = ({"kimg": step, "score": 1.0},)
                write_record(self.job.path, TrialRecord("k", "C=7", "temi", 7, {}, "running", rungs=rungs))
            elif isinstance(step, ray.exceptions.NodeDiedError):
                self.nodes = {"head", f"new{len(self.course)}"}
                raise step
            else:
                raise step

    def run(self) -> str | None:
        return trial._keep_on(self.job, self.board, self.train)

    @property
    def said(self) -> list[str]:
        return [call.args[0] for call in self.board.say.call_args_list]


def test_a_training_goes_on_by_itself_and_what_happened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ray.exceptions.NodeDiedError("gone")
    training = Trained(tmp_path, monkeypatch, group(dead()), 2, *[lost] * 20, group(GONE, dead()), 4, ValueError("x"))
    assert training.run() is None
    assert training.said[0] == "C=7: a process was killed; goes on from 0 kimg"
    assert training.said[1:21] == ["C=7: a node was lost; goes on from 2 kimg"] * 20
    assert training.said[-1] == "C=7: ValueError: x; goes on from 4 kimg"
    # Whether it was the node is waited for where only a process is known to be dead, and not for its own exception.
    waited_s = sum(call.args[0] for call in training.pauses.call_args_list)
    assert len(training.said) == 23 and waited_s == 2 * trial.NODE_S + 20 * trial.PAUSE_S + trial.PAUSE_S


def test_a_training_that_cannot_go_on_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trained(tmp_path, monkeypatch, 2, ValueError("x"), ValueError("x"), 4)
    assert own.run() == "ValueError: x" and own.course == [4] and len(own.said) == 1
    killed = Trained(tmp_path / "other", monkeypatch, *[group(dead())] * 9)
    assert str(killed.run()).startswith("killed from outside 5 times without reaching a rung (memory?)")
    assert len(killed.course) == 4
    full = Trained(tmp_path / "full", monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):  # the driver ends the search for it
        full.run()
    said = Trained(tmp_path / "said", monkeypatch, group(StorageError("the storage /a is full")))
    with pytest.raises(WorkerGroupError):
        said.run()


def test_waiting_for_room_is_not_told_as_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Trained(tmp_path, monkeypatch, *[ControllerError(WorkerGroupStartupTimeoutError(2))] * 50)
    assert waits.run() is None and waits.said == []
