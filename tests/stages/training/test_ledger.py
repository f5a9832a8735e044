import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cedm_ray.clustering.clustering_io import CLUSTERING_FILE
from cedm_ray.config import SearchConfig
from cedm_ray.metrics.stats import StatsFacts
from cedm_ray.settings import FinalSettings, GranularitySettings
from cedm_ray.stages.inputs.scoring import Reference, Scoring
from cedm_ray.stages.storage.checkpoints import SAMPLES_FILE
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.ledger_callback import LedgerCallback
from cedm_ray.stages.training.records import TrialRecord
from cedm_ray.stages.training.trial_job import Planner

CONFIG = SearchConfig(
    granularity=GranularitySettings(total_kimg=4, grace_kimg=1), final=FinalSettings(total_kimg=6), seed=7
)
FACTS = StatsFacts("lenet", "ab" * 32, "none", "float32", 2, 300)
TWELVE = {"grouping": "temi", "num_clusters": 12}
NONE = {"grouping": "none", "num_clusters": 1}
QUALITY = {"num_used": 11, "utilization_ratio": 11 / 12, "kl_from_uniform": 0.25}


class FakeTracker:
    """Keeps what is said of each child run."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, Any]] = {}
        self.params: dict[str, Mapping[str, Any]] = {}
        self.points: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
        self.ended: list[tuple[str, str]] = []
        self.files: list[tuple[str, str]] = []

    def child(self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        self.params.setdefault(name, dict(params))
        self.tags.setdefault(name, {}).update(tags)
        return name

    def metrics(self, run: str, values: Mapping[str, float], kimg: int) -> None:
        self.points.setdefault(run, []).append((kimg, values))

    def end(self, run: str, state: str, tags: Mapping[str, Any]) -> None:
        self.ended.append((run, state))
        self.tags[run].update(tags)

    def series(self, run: str, name: str, values: Any) -> None:
        self.files.append((run, name))

    def artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        self.files.append((run, path.name))


class Desk:
    """A ledger and what it writes to."""

    def __init__(self, root: Path, config: SearchConfig = CONFIG, name: str = "search") -> None:
        self.said: list[str] = []
        self.removed: list[str] = []
        self.tracker, self.store, self.changes = FakeTracker(), Store(root / "store"), 0
        scoring = Scoring((Reference(cast(Any, None), FACTS, root / "reference.safetensors"),))
        self.planner = Planner(config, self.store, {"backbone": "pixels"}, root / "images", "ab", {}, scoring)
        self.folder = root / name
        terminal = SimpleNamespace(
            line=lambda text, style="", facts=None: self.said.append(text.strip()), tell=lambda text, facts: None
        )
        board = SimpleNamespace(remove=self.removed.append)
        ctx = SimpleNamespace(folder=self.folder, terminal=terminal, tracker=self.tracker, board=board)
        self.ledger = Ledger(cast(Any, ctx), self.planner)
        self.ledger.on_change = self.changed

    def changed(self) -> None:
        self.changes += 1

    def state(self, params: Mapping[str, Any]) -> str:
        (found,) = [record.state for record in self.ledger.records if record.params == params]
        return found

    def cluster(self, params: Mapping[str, Any] = TWELVE) -> None:
        """Put the clustering of a trial into the store."""
        job = self.planner.job(params).clustering
        assert job is not None
        facts = {"quality": QUALITY, "head_losses": [1.0]}
        with self.store.create(job.path, job.inputs, facts) as scratch:
            (scratch / CLUSTERING_FILE).touch()


def result(kimg: int, score: float = 2.5, **more: Any) -> dict[str, Any]:
    return {
        "kimg": kimg, "nimg": kimg * 1000, "loss": 0.5, "images_per_s": 800.0, "score": score, "fd_lenet": score,
        "num_images": 300, "score_s": 1.5, "trial_id": "not kept", **more,
    }  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    found = Desk(tmp_path)
    found.cluster()
    return found


def test_a_trial_runs_pauses_goes_on_and_completes(desk: Desk) -> None:
    ledger, tags = desk.ledger, desk.tracker.tags
    ledger.open(TWELVE)
    assert desk.state(TWELVE) == "running" and desk.said == ["C=12: starts"] and tags["C=12"]["state"] == "running"
    ledger.open(TWELVE)  # a retry by Tune
    assert len(desk.said) == 1
    ledger.add(TWELVE, result(1))
    ledger.pause(TWELVE)
    assert desk.state(TWELVE) == "paused" and tags["C=12"] | {"state": "paused", "rung_kimg": 1} == tags["C=12"]
    job = desk.planner.job(TWELVE)
    assert desk.removed == [job.key, job.score_key]
    ledger.add(TWELVE, result(1))  # Tune's callbacks hear of a rung after its scheduler has paused the trial
    assert desk.state(TWELVE) == "paused"
    ledger.open(TWELVE)
    assert desk.state(TWELVE) == "running" and tags["C=12"]["state"] == "running"
    ledger.add(TWELVE, result(2, 2.0))
    ledger.add(TWELVE, result(4, 1.5))
    ledger.close(TWELVE)
    assert desk.state(TWELVE) == "complete" and desk.tracker.ended == [("C=12", "complete")]
    assert desk.said == [
        "C=12: starts", "C=12: 1 kimg, fd_lenet 2.5, 800 images/s", "C=12: paused at 1 kimg", "C=12: goes on",
        "C=12: 2 kimg, fd_lenet 2, 800 images/s", "C=12: 4 kimg, fd_lenet 1.5, 800 images/s",
    ]  # fmt: skip


def test_a_trial_that_is_stopped_and_one_that_fails_say_so(desk: Desk) -> None:
    ledger = desk.ledger
    ledger.open(TWELVE)
    ledger.add(TWELVE, result(2))
    ledger.close(TWELVE)
    assert desk.state(TWELVE) == "stopped" and desk.said[-1] == "C=12: stopped at 2 kimg"
    ledger.open(NONE)
    ledger.close(NONE, reason="OutOfMemoryError: none left")
    assert desk.state(NONE) == "failed" and desk.said[-1] == (
        "unconditional: failed at 0 kimg, OutOfMemoryError: none left"
    )
    assert desk.tracker.ended == [("C=12", "stopped"), ("unconditional", "failed")]
    assert desk.tracker.tags["unconditional"]["reason"] == "OutOfMemoryError: none left"
    ledger.close(NONE)  # Tune's callbacks end a trial that was closed before
    assert desk.state(NONE) == "failed" and len(desk.tracker.ended) == 2
    ledger.open(NONE)  # tried again by a later process
    assert [(r.state, r.reason) for r in ledger.records if r.grouping == "none"] == [("running", None)]


def test_costs_and_scores_are_kept_and_logged_and_what_is_no_part_of_a_rung_is_not(desk: Desk) -> None:
    desk.ledger.open(TWELVE)
    costs = {"device_hours": 0.125, "energy_kwh": 0.5, "device": "cuda"}
    desk.ledger.add(TWELVE, result(4, **costs, score_sets=[2.0, 3.0], checkpoint_path="/some/where"))
    (record,) = desk.ledger.records
    (rung,) = record.rungs
    wanted = result(4, **costs, score_sets=[2.0, 3.0], checkpoint_path="/some/where")
    assert rung == {name: value for name, value in wanted.items() if name != "trial_id"}
    assert record.utilization_ratio == 11 / 12
    ((kimg, values),) = desk.tracker.points["C=12"]
    assert kimg == 4 and values == {
        "nimg": 4000, "loss": 0.5, "images_per_s": 800.0, "score_s": 1.5, "device_hours": 0.125, "energy_kwh": 0.5,
        "fd_lenet_300": 2.5, **QUALITY,
    }  # fmt: skip
    desk.ledger.open(NONE)
    desk.ledger.add(NONE, result(1, energy_kwh=None))
    ((_, values),) = desk.tracker.points["unconditional"]
    assert "energy_kwh" not in values and "device_hours" not in values
    assert (values["num_used"], values["utilization_ratio"], values["kl_from_uniform"]) == (1, 1, 0)


def test_a_rung_that_is_reported_again_keeps_what_it_had_and_is_told_once(desk: Desk) -> None:
    desk.ledger.open(TWELVE)
    desk.ledger.add(TWELVE, result(1, checkpoint_path="/some/where"))
    desk.ledger.add(TWELVE, result(1, final_scores={"fd_lenet": [1.0]}))
    (record,) = desk.ledger.records
    (rung,) = record.rungs
    assert rung["checkpoint_path"] == "/some/where" and rung["final_scores"] == {"fd_lenet": [1.0]}
    assert len(desk.said) == 2


def test_params_and_terms_of_the_score_go_to_the_tracker(desk: Desk) -> None:
    desk.ledger.open(TWELVE)
    told = desk.tracker.params["C=12"]
    assert told["C"] == 12 and told["fd_lenet.weights_hash"] == "ab" * 32
    assert desk.tracker.tags["C=12"] == {"stage": "granularity", "C": 12, "grouping": "temi", "state": "running"}


def test_the_files_of_a_trial_go_to_the_tracker_when_it_ends(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).touch()
    desk.ledger.open(TWELVE)
    desk.ledger.add(TWELVE, result(4, checkpoint_path=str(tmp_path)))
    assert desk.tracker.files == []
    desk.ledger.close(TWELVE)
    assert {("C=12", CLUSTERING_FILE), ("C=12", SAMPLES_FILE), ("C=12", "head_loss")} <= set(desk.tracker.files)


def test_a_later_process_finds_the_trials_in_their_order_and_closes_those_that_were_left(tmp_path: Path) -> None:
    first = Desk(tmp_path)
    trials = [NONE, *({"grouping": "temi", "num_clusters": c} for c in (9, 5, 7))]
    for params in trials:
        if params is not NONE:
            first.cluster(params)
        first.ledger.open(params)
        first.ledger.add(params, result(1))
    first.ledger.pause(trials[1])
    first.ledger.add(trials[3], result(4))
    later = Desk(tmp_path)
    assert [record.params for record in later.ledger.records] == trials
    assert [record.state for record in later.ledger.records] == ["running", "paused", "running", "running"]
    later.ledger.close_left("temi")
    assert [record.state for record in later.ledger.records] == ["running", "stopped", "stopped", "complete"]
    assert later.said == ["C=9: stopped at 1 kimg", "C=5: stopped at 1 kimg"]
    assert json.loads((later.folder / "trials.json").read_text()) == trials


def test_every_change_of_a_record_is_told(desk: Desk) -> None:
    ledger = desk.ledger
    ledger.open(TWELVE)
    counts = [desk.changes]
    for step in (lambda: ledger.add(TWELVE, result(1)), lambda: ledger.pause(TWELVE), lambda: ledger.close(TWELVE)):
        step()
        counts.append(desk.changes)
    assert counts == [0, 1, 2, 3]


def test_another_search_finds_in_the_store_what_was_trained_and_says_where_it_is_from(tmp_path: Path) -> None:
    one = Desk(tmp_path)
    one.cluster()
    one.ledger.open(TWELVE)
    for kimg in (1, 2, 4):
        one.ledger.add(TWELVE, result(kimg))
    one.ledger.close(TWELVE)
    other = Desk(tmp_path, name="other")
    assert other.ledger.records == [] and other.ledger.stored(NONE) == {}
    stored = other.ledger.stored(TWELVE)
    assert list(stored) == [1, 2, 4] and stored[2]["score"] == 2.5
    other.ledger.open(TWELVE)
    other.ledger.add(TWELVE, stored[1], stored=True)
    assert other.said == ["C=12: goes on", "C=12: 1 kimg, fd_lenet 2.5, from the store"]
    assert [kimg for kimg, _ in other.tracker.points["C=12"]] == [1]
    other.ledger.pause(TWELVE)  # of no more than the first rung: but the training is whole
    assert other.state(TWELVE) == "complete" and other.tracker.ended == [("C=12", "complete")]


def test_a_training_is_found_under_the_parameters_of_this_search(tmp_path: Path) -> None:
    dropout = CONFIG.diffusion.dropout
    one, other = Desk(tmp_path), Desk(tmp_path, name="other")
    same = {**TWELVE, "diffusion.dropout": dropout}  # searched over there: the very same training
    assert one.planner.job(TWELVE).path == other.planner.job(same).path
    one.ledger.open(TWELVE)
    other.ledger.open(same)
    assert [record.params for record in one.ledger.records] == [TWELVE]
    assert [record.params for record in other.ledger.records] == [same]


def test_tunes_callback_writes_down_a_trial_and_the_last_line_that_names_an_error(desk: Desk, tmp_path: Path) -> None:
    log = tmp_path / "error.txt"
    log.write_text("Traceback:\n  File x\nray.exceptions.RayTaskError: no\nValueError: too few images\n\nmore words\n")
    callback = LedgerCallback(desk.ledger)
    trial = SimpleNamespace(config=TWELVE, error_file=str(log))
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(1, [], trial, result(1))
    callback.on_trial_error(2, [], trial)
    (record,) = desk.ledger.records
    assert (record.state, record.reason, len(record.rungs)) == ("failed", "ValueError: too few images", 1)
    trial = SimpleNamespace(config=NONE, error_file=str(tmp_path / "missing.txt"))
    callback.on_trial_start(3, [], trial)
    callback.on_trial_error(4, [], trial)
    record = desk.ledger.records[1]
    assert record.reason == f"no reason given; Tune looked for it in {tmp_path / 'missing.txt'}"
    callback.on_trial_start(5, [], trial)
    callback.on_trial_complete(6, [], trial)
    assert [record.state for record in desk.ledger.records] == ["failed", "stopped"]


def test_how_far_a_search_asks_a_trial_to_train_is_kept_for_that_search_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.ledger.stop_kimg(TWELVE) is None
    for stop_kimg in (1, 4):
        desk.ledger.set_stop_kimg(TWELVE, stop_kimg)
    again, other = Desk(tmp_path), Desk(tmp_path, name="other")
    assert again.ledger.stop_kimg(TWELVE) == 4
    assert again.ledger.stop_kimg(NONE) is None and other.ledger.stop_kimg(TWELVE) is None


def test_a_clustering_that_is_not_whole_is_named(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.cluster()
    job = desk.planner.job(TWELVE)
    assert job.condition is not None
    job.condition.write_bytes(b"torn")
    desk.ledger.open(TWELVE)
    with pytest.raises(RuntimeError, match=r"is not whole; remove that folder and run again"):
        desk.ledger.add(TWELVE, result(1))


def test_a_retraining_has_a_record_of_its_own(desk: Desk) -> None:
    desk.ledger.open(TWELVE)
    desk.ledger.open({**TWELVE, "train_seed": 8})
    records: list[TrialRecord] = desk.ledger.records
    assert [record.label for record in records] == ["C=12", "C=12 (seed 8)"] and records[0].key != records[1].key


def test_a_trial_that_is_left_as_it_is_goes_on_from_its_record(desk: Desk) -> None:
    ledger = desk.ledger
    ledger.leave(TWELVE)  # it has not started
    assert ledger.records == [] and desk.tracker.ended == []
    ledger.open(TWELVE)
    ledger.add(TWELVE, result(1))
    ledger.leave(TWELVE)
    assert desk.state(TWELVE) == "running" and desk.said[-1] == "C=12: left at 1 kimg"
    assert desk.tracker.ended == [("C=12", "interrupted")] and desk.tracker.tags["C=12"]["rung_kimg"] == 1
    ledger.open(TWELVE)
    ledger.add(TWELVE, result(4))
    ledger.leave(TWELVE)  # nothing is left of it to train
    assert desk.state(TWELVE) == "complete" and desk.tracker.ended[-1] == ("C=12", "complete")
