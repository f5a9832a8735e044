"""Processes of a training that are killed while it trains and scores: workers, the Tune trial, Train's controller."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors import safe_open

from cedm_ray.stages.storage.paths import database_uri

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(2400)]
SEEDS = range(int(os.environ.get("CEDM_RAY_FAULT_SEEDS", "1")))
MOST_S = 240
"""Until the training trains again, on a busy machine; the process group's own time-out is 30 minutes."""


@pytest.fixture(scope="module", params=SEEDS)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with an undisturbed training and one whose processes were killed, and what was measured."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_run.py")), str(folder), str(request.param)],
        capture_output=True, text=True, timeout=2300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seed')))
    figures["given_back"] = done.stdout.count("gave back what a training held")
    print(json.dumps(figures, indent=1))
    return folder, figures


def record(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("store/trials/*/trial.json")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_every_process_was_killed_and_the_training_trained_again_soon(killed: tuple[Path, dict[str, Any]]) -> None:
    _, figures = killed
    assert figures["error"] is None
    assert [(fault["who"], fault["while_"]) for fault in figures["faults"]] == [
        tuple(each) for each in figures["planned"]
    ]
    assert all(0 < fault["again_s"] < MOST_S for fault in figures["faults"])


def test_at_most_the_work_since_the_last_rung_was_lost(killed: tuple[Path, dict[str, Any]]) -> None:
    _, figures = killed
    assert all(fault["lost_kimg"] <= 1 for fault in figures["faults"])


def test_losses_scores_and_weights_are_those_of_the_undisturbed_training(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = killed
    one, other = (record(folder / name) for name in ("undisturbed", "disturbed"))
    assert one["state"] == other["state"] == "complete" and other["reason"] is None
    shown = [[(rung["kimg"], rung["loss"], rung["score"]) for rung in each["rungs"]] for each in (one, other)]
    assert shown[0] == shown[1] and [kimg for kimg, *_ in shown[1]] == figures["rungs_kimg"]
    tensors = []
    for each in (one, other):
        with safe_open(Path(each["rungs"][-1]["checkpoint_path"]) / "state.safetensors", "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > 50
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_mlflow_has_every_point_once(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = killed
    points = []
    for name in ("undisturbed", "disturbed"):
        client = MlflowClient(database_uri(folder / name))
        (experiment,) = [each for each in client.search_experiments() if each.name == "cedm_ray/digits"]
        (run,) = client.search_runs([experiment.experiment_id], "tags.stage = 'granularity'")
        assert run.info.status == "FINISHED"
        found = {
            metric: Counter(point.step for point in client.get_metric_history(run.info.run_id, metric))
            for metric in run.data.metrics
        }
        assert found["loss"] == dict.fromkeys(figures["rungs_kimg"], 1)
        points.append(found)
    assert points[0] == points[1] and max(max(counts.values()) for counts in points[1].values()) == 1


def test_nothing_of_the_killed_trainings_is_left(killed: tuple[Path, dict[str, Any]]) -> None:
    _, figures = killed
    assert figures["idle_s"] < 55  # of 60: all CPUs are free and no process is left
    assert figures["given_back"] == 1  # of the controller that was killed before its workers were there


def test_a_training_that_fails_by_itself_is_tried_twice_and_ends_with_its_reason(tmp_path: Path) -> None:
    storage, said = tmp_path / "runs", tmp_path / "said"
    flags = ["--dataset=digits", "--plain", "--grouping=labels", "--granularity.no-baselines", "--score.num-images=200"]
    rungs = ["--granularity.total-kimg=2", "--granularity.grace-kimg=1", "--final.total-kimg=2"]
    command = [sys.executable, "-um", "cedm_ray.search", f"--storage-path={storage}", *flags, *rungs]
    with open(said, "w") as out:
        search = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while "training on the given groups" not in said.read_text():
                assert search.poll() is None, said.read_text()
                time.sleep(0.1)
            (images,) = storage.glob("store/images/*/images.npy")
            images.rename(tmp_path / "images.npy")
            assert search.wait(timeout=600) == 2
        finally:
            search.kill()
    found = record(storage)
    assert found["state"] == "failed" and found["rungs"] == [] and "images" in found["reason"]
    lines = [line for line in said.read_text().splitlines() if found["reason"][:60] in line]
    assert len(lines) == 2 and "goes on from 0 kimg" in lines[0] and "failed at 0 kimg" in lines[1], lines
