import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from cedm_ray.errors import UserError
from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking import delivery, outbox
from cedm_ray.stages.tracking import tracker as tracking
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE
from cedm_ray.stages.tracking.tracker import Tracker, flat, ui_command
from helpers.ports import free_port


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


def tracker(storage: Path, folder: Path | None = None) -> Tracker:
    return Tracker(database_uri(storage), "cedm_ray/test", storage / "artifacts", folder)


def client_of(storage: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=database_uri(storage))


def run_named(storage: Path, key: str) -> Any:
    """The one run with a key of ours, or that lies below a parent with this key."""
    client = client_of(storage)
    experiment = client.get_experiment_by_name("cedm_ray/test")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{delivery.KEY_TAG}` = '{key}'")
    return run


def history(storage: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    found = client_of(storage).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in found)


@pytest.mark.parametrize("kept", [True, False])
def test_a_search_that_goes_on_finds_its_runs_and_doubles_no_point(storage: Path, tmp_path: Path, kept: bool) -> None:
    key, ids = f"key {kept}", list[tuple[Any, Any]]()
    for attempt in range(2):
        track = tracker(storage, tmp_path)
        parent = track.start(key, "digits-1", {"seed": 0}, {"state": "running"})
        child = track.child("trial", "C=7", {"num_clusters": 7}, {"C": 7, "stage": "granularity"})
        for kimg in (2, 4):
            # What is measured may differ when it is measured again, the first one stays.
            track.metrics(child, {"score": 10.0 - kimg + attempt}, kimg)
        track.series(child, "head_loss", [3.0, 2.0])
        track.points(parent, {"c_max": 17.0})
        if attempt:
            track.metrics(child, {"score": 1.5}, 8)
            track.end(child, "complete", {"rung_kimg": 8})
            track.end(parent, "complete")
        assert track.close() == 0
        ids.append((track.run_id(parent), track.run_id(child)))
        if not kept:  # as in a storage of an older version, or after somebody has tidied up
            (tmp_path / OUTBOX_FILE).unlink()
    assert ids[0] == ids[1] and None not in ids[0]
    parent_id, child_id = ids[0]
    run = client_of(storage).get_run(child_id)
    assert history(storage, child_id, "score") == [(2, 8.0), (4, 6.0), (8, 1.5)]
    assert history(storage, child_id, "head_loss") == [(0, 3.0), (1, 2.0)]
    assert history(storage, parent_id, "c_max") == [(0, 17.0)]
    assert run.data.tags["mlflow.parentRunId"] == parent_id and run.info.run_name == "C=7"
    assert run.info.status == "FINISHED" and run.data.tags["state"] == "complete" and run.data.tags["rung_kimg"] == "8"
    assert run.data.params == {"num_clusters": "7"}


def test_runs_of_another_search_are_others(storage: Path) -> None:
    track = tracker(storage)
    first = track.start("search one", "a", {}, {})
    child = track.child("trial", "C=7", {}, {})
    assert track.start("search two", "b", {}, {}) != first
    other = track.child("trial", "C=7", {}, {})
    assert track.close() == 0
    assert track.run_id(child) != track.run_id(other)


def test_artifacts_lie_under_the_given_folder(storage: Path, tmp_path: Path) -> None:
    track = tracker(storage)
    run = track.start("artifacts", "a", {}, {})
    (tmp_path / "a.txt").write_text("hello")
    track.artifact(run, tmp_path / "a.txt", "sub")
    assert track.close() == 0
    assert [path.read_text() for path in storage.glob("artifacts/*/artifacts/sub/a.txt")] == ["hello"]


def test_two_values_at_one_step_are_two_points_and_the_same_value_is_one(storage: Path, tmp_path: Path) -> None:
    for _ in range(2):
        track = tracker(storage, tmp_path)
        run = track.start("points", "a", {}, {})
        for value in (0.97, 0.98, 0.97, math.inf):
            track.points(run, {"ratio": value}, step=20)
        assert track.close() == 0
        (tmp_path / OUTBOX_FILE).unlink()
    run_id = run_named(storage, run).info.run_id
    assert history(storage, run_id, "ratio") == [(20, 0.97), (20, 0.98), (20, delivery.MAX_FLOAT)]


class Flaky:
    """MLflow's client on a bad line: calls fail before they do anything, or after they did it.

    Its store keeps a point that is sent twice; MLflow's databases do so only where the times of the two differ.
    """

    moments = random.Random(0)
    failures = 0
    clock = itertools.count(1)

    def __init__(self, tracking_uri: str) -> None:
        self._client = MlflowClient(tracking_uri=tracking_uri)

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            luck = self.moments.random()
            points = [Metric(m.key, m.value, next(self.clock), m.step) for m in named.get("metrics", [])]
            named = {**named, "metrics": points} if points else named
            if luck < 0.2:
                Flaky.failures += 1
                raise ConnectionError("connection reset")
            answer = getattr(self._client, name)(*given, **named)
            if luck < 0.4:
                Flaky.failures += 1
                raise ConnectionError("no answer in time")
            return answer

        return call


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(delivery, "MlflowClient", Flaky)
    monkeypatch.setattr(outbox, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(outbox, "LAST_RETRY_S", 0.001)
    monkeypatch.setattr(delivery.Delivery, "first_connect", lambda self: None)
    yield


@pytest.mark.parametrize("seed", range(3))
def test_on_a_bad_line_every_point_arrives_once(storage: Path, tmp_path: Path, flaky: None, seed: int) -> None:
    Flaky.moments, Flaky.failures = random.Random(seed), 0
    key = f"flaky {seed}"
    said: list[str] = []
    track = Tracker(database_uri(storage), "cedm_ray/test", None, tmp_path, said.append)
    parent = track.start(key, "a", {"seed": 0}, {})
    for trial in range(2):
        child = track.child(f"C={trial}", f"C={trial}", {"num_clusters": trial}, {})
        for kimg in range(5):
            track.metrics(child, {"score": 1.0 / (kimg + 1), "loss": 0.5}, kimg)
        track.series(child, "head_loss", [0.5, 0.25])
        track.end(child, "complete")
    track.points(parent, {"c_max": 17.0})
    track.end(parent, "complete")
    assert track.close() == 0 and Flaky.failures > 10
    run = run_named(storage, key)
    assert history(storage, run.info.run_id, "c_max") == [(0, 17.0)] and run.data.params == {"seed": "0"}
    for trial in range(2):
        child = run_named(storage, f"{run.info.run_id}/C={trial}")
        assert history(storage, child.info.run_id, "score") == [(kimg, 1.0 / (kimg + 1)) for kimg in range(5)]
        assert history(storage, child.info.run_id, "loss") == [(kimg, 0.5) for kimg in range(5)]
        assert history(storage, child.info.run_id, "head_loss") == [(0, 0.5), (1, 0.25)]
        assert child.info.status == "FINISHED" and child.data.params == {"num_clusters": str(trial)}


def test_a_server_that_is_down_at_the_start_stops_nothing_and_another_store_gets_everything(
    storage: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    began_ms, began = time.time() * 1000, time.monotonic()
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    track = Tracker(uri, "cedm_ray/test", None, tmp_path, said.append)
    parent = track.start("down", "a", {"seed": 0}, {"state": "running"})
    child = track.child("trial", "C=7", {"num_clusters": 7}, {})
    for kimg in range(30):
        track.metrics(child, {"score": float(kimg)}, kimg)
    track.series(child, "head_loss", [2.0, 1.0])
    (tmp_path / "a.txt").write_text("hello")
    track.artifact(child, tmp_path / "a.txt")
    track.describe(parent, "what was found")
    track.end(child, "complete")
    assert time.monotonic() - began < tracking.START_WAIT_S
    assert parent == track.parent_key == "down" and track.run_id(parent) is None
    assert track.close(0.2) == 36
    assert len(said) == 2 and "does not answer" in said[0] and "refused" in said[0]
    assert said[1] == f"MLflow has not got 36 operations; {tmp_path / OUTBOX_FILE} keeps them for the next run"
    assert "secret" not in track.uri + "".join(said) + (tmp_path / OUTBOX_FILE).read_text()
    ended_ms = time.time() * 1000
    assert tracker(storage, tmp_path).close() == 0  # as a search does that is complete
    run = run_named(storage, "down")
    child_run = run_named(storage, f"{run.info.run_id}/trial")
    assert history(storage, child_run.info.run_id, "score") == [(kimg, float(kimg)) for kimg in range(30)]
    assert history(storage, child_run.info.run_id, "head_loss") == [(0, 2.0), (1, 1.0)]
    assert [file.path for file in client_of(storage).list_artifacts(child_run.info.run_id)] == ["a.txt"]
    assert run.data.tags["mlflow.note.content"] == "what was found" and child_run.info.status == "FINISHED"
    assert began_ms - 1 <= run.info.start_time <= child_run.info.end_time <= ended_ms  # when it was, not when it came


def test_a_run_that_somebody_deleted_is_made_again(storage: Path, tmp_path: Path) -> None:
    track = tracker(storage, tmp_path)
    first = track.start("deleted", "a", {"seed": 0}, {})
    first_id = track.run_id(first)
    client_of(storage).delete_run(first_id)
    track.points(first, {"c_max": 17.0})
    assert track.close() == 0
    run = run_named(storage, "deleted")
    assert run.info.run_id != first_id and run.data.params == {"seed": "0"} and run.data.metrics == {"c_max": 17.0}


def test_what_mlflow_never_takes_holds_up_nothing(storage: Path, tmp_path: Path) -> None:
    said: list[str] = []
    track = Tracker(database_uri(storage), "cedm_ray/test", None, tmp_path, said.append)
    run = track.start("refused", "a", {}, {})
    track.points(run, {"no * name": 1.0})
    track.artifact(run, tmp_path / "gone.txt")
    track.points(run, {"c_max": 17.0})
    assert track.close() == 0
    assert run_named(storage, "refused").data.metrics == {"c_max": 17.0}
    assert len(said) == 2 and "refuses points" in said[0] and "no * name" in said[0] and "gone.txt" in said[1]


@pytest.mark.parametrize("uri", ["htp://127.0.0.1:5000", "sqlite:////proc/no/such.db", "sqlite+nothing:///a.db"])
def test_a_store_that_can_never_be_is_refused_at_once(uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"tracking store .* does not answer") as caught:
        Tracker(uri, "x", None)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 20


def test_a_store_that_does_not_answer_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, but a text that is long enough to be seen as torn" * 50)
    with pytest.raises(UserError, match=r"tracking store sqlite:.* does not answer") as caught:
        Tracker(database_uri(tmp_path), "x", tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_become_dotted_names() -> None:
    assert flat({"a": 1, "temi": {"gamma": 0.6, "deep": {"x": None}}}) == {
        "a": 1,
        "temi.gamma": 0.6,
        "temi.deep.x": None,
    }


def test_the_ui_command_listens_on_loopback_and_names_the_store() -> None:
    command = ui_command("sqlite:////runs/mlflow.db")
    assert "--host 127.0.0.1" in command and "'sqlite:////runs/mlflow.db'" in command


def test_a_server_is_opened_by_its_address_without_name_and_password() -> None:
    assert ui_command("https://me:secret@mlflow.example.org:8443/ml") == "https://mlflow.example.org:8443/ml"


def test_the_page_of_a_run_has_an_address_once_mlflow_has_named_it(storage: Path, tmp_path: Path) -> None:
    away = Tracker(f"http://127.0.0.1:{free_port()}", "cedm_ray/test", None, tmp_path, lambda _: None)
    run = away.start("page", "a", {}, {})
    assert away.page(run) is None and run == "page"
    assert away.close(0.1) == 1
    track = tracker(storage, tmp_path)
    track.start("page", "a", {}, {})
    assert track.close() == 0
    run_id, experiment = track.run_id("page"), run_named(storage, "page").info.experiment_id
    kind = "?workflowType=machine_learning"  # else MLflow's pages for language models open
    assert track.page("page") == f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{run_id}{kind}"


def test_a_child_is_known_from_the_journal_without_being_opened_again(storage: Path, tmp_path: Path) -> None:
    track = tracker(storage, tmp_path)
    track.start("known", "a", {}, {})
    child = track.child("trial", "C=7", {}, {})
    track.end(child, "complete")
    assert track.close() == 0
    track = tracker(storage, tmp_path)
    track.start("known", "a", {}, {})
    assert track.known("trial") == child and track.known("other") is None
    assert track.close() == 0
    parent = run_named(storage, "known").info.run_id
    assert run_named(storage, f"{parent}/trial").info.status == "FINISHED"
