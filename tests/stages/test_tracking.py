from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cedm_ray.errors import UserError
from cedm_ray.stages.tracking import Tracker, database_uri, flat, ui_command


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


def tracker(storage: Path) -> Tracker:
    return Tracker(database_uri(storage), "cedm_ray/test", storage / "artifacts")


def test_a_search_that_goes_on_finds_its_runs_and_doubles_no_point(storage: Path) -> None:
    ids = []
    for attempt in range(2):
        track = tracker(storage)
        parent = track.start("key", "digits-1", {"seed": 0}, {"state": "running"})
        child = track.child("trial", "C=7", {"num_clusters": 7}, {"C": 7, "stage": "granularity"})
        ids.append((parent, child))
        for kimg in (2, 4):
            track.metrics(child, {"score": 10.0 - kimg}, kimg)
        if attempt:
            track.metrics(child, {"score": 1.5}, 8)
            track.end(child, "complete", {"rung_kimg": 8})
            track.end(parent, "complete")
    assert ids[0] == ids[1]
    client = MlflowClient(tracking_uri=database_uri(storage))
    run = client.get_run(ids[0][1])
    history = client.get_metric_history(ids[0][1], "score")
    assert [(m.step, m.value) for m in history] == [(2, 8.0), (4, 6.0), (8, 1.5)]
    assert run.data.tags["mlflow.parentRunId"] == ids[0][0] and run.info.run_name == "C=7"
    assert run.info.status == "FINISHED" and run.data.tags["state"] == "complete" and run.data.tags["rung_kimg"] == "8"
    assert run.data.params == {"num_clusters": "7"}


def test_runs_of_another_search_are_others(storage: Path) -> None:
    track = tracker(storage)
    first = track.start("search one", "a", {}, {})
    child = track.child("trial", "C=7", {}, {})
    assert track.start("search two", "b", {}, {}) != first
    assert track.child("trial", "C=7", {}, {}) != child


def test_artifacts_lie_under_the_given_folder(storage: Path, tmp_path: Path) -> None:
    track = tracker(storage)
    run = track.start("artifacts", "a", {}, {})
    (tmp_path / "a.txt").write_text("hello")
    track.artifact(run, tmp_path / "a.txt", "sub")
    assert [path.read_text() for path in storage.glob("artifacts/*/artifacts/sub/a.txt")] == ["hello"]


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
