"""A search whose newest checkpoint, and what is noted beside it, are damaged while it is down."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cedm_ray.stages.storage.checkpoints import MANIFEST_FILE, SNAPSHOT_FILE, STATE_FILE, TORN, checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

FLAGS = [
    "--dataset=digits", "--grouping=labels", "--granularity.no-baselines", "--granularity.total-kimg=9",
    "--granularity.rungs", "1", "2", "3", "9", "--score.num-images=200", "--score.num-steps=4",
    "--score.num-sets=1", "--resources.num-workers=1", "--final.total-kimg=10", "--final.num-images=150",
    "--final.num-sets=1",
]  # fmt: skip
KILLED_AT = 3
"""Checkpoints that there are when the driver is killed."""


def command(storage: Path) -> list[str]:
    return [sys.executable, "-m", "cedm_ray.search", "--storage-path", str(storage), *FLAGS]


def search(storage: Path) -> str:
    done = subprocess.run(
        command(storage), capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def training(storage: Path) -> Path:
    (folder,) = storage.glob("store/trials/*/train")
    return folder


def kill_at(storage: Path, num_checkpoints: int) -> None:
    """Start the search and kill its driver when there are so many checkpoints."""
    with open(storage.parent / "killed.log", "w") as log:
        driver = subprocess.Popen(command(storage), stdout=log, stderr=log, start_new_session=True)
        deadline_s = time.monotonic() + 900
        while len(list(storage.glob(f"store/trials/*/train/checkpoint_*/{MANIFEST_FILE}"))) < num_checkpoints:
            assert driver.poll() is None and time.monotonic() < deadline_s, (storage.parent / "killed.log").read_text()
            time.sleep(0.1)
        time.sleep(3)  # into the next rung
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(10)  # the killed Ray's processes notice that their driver is gone


def points(storage: Path) -> list[tuple[str, str, int]]:
    """Run, name and kimg of every metric of the trainings."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        return database.execute("SELECT run_uuid, key, step FROM metrics WHERE key = 'loss'").fetchall()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed") / "runs"
    search(storage)
    return storage


def outcome(storage: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float, float]]]:
    """The exported weights, and kimg, loss and score of every rung."""
    (result,) = storage.glob("digits-*/result.json")
    (trial,) = json.loads(result.read_text())["trials"]
    weights = load_file(result.parent / "export" / "model.safetensors")
    return weights, [(rung["kimg"], rung["loss"], rung["score"]) for rung in trial["rungs"]]


def test_a_torn_newest_checkpoint_costs_its_rung_and_nothing_else(undisturbed: Path, tmp_path: Path) -> None:
    storage, rng = tmp_path / "runs", random.Random(0)
    kill_at(storage, KILLED_AT)
    newest = checkpoints(training(storage))[-1]
    state = bytearray((newest.folder / STATE_FILE).read_bytes())
    state[rng.randrange(len(state))] ^= 1 << rng.randrange(8)
    (newest.folder / STATE_FILE).write_bytes(bytes(state))
    for name in (training(storage) / SNAPSHOT_FILE, training(storage).parent / "trial.json"):
        content = name.read_bytes()
        name.write_bytes(content[: rng.randrange(1, len(content))])

    started_s = time.monotonic()
    said = search(storage)
    spent_s = time.monotonic() - started_s
    assert said.count(f"checkpoint {newest.folder} is torn ({STATE_FILE} has another content than was written)") == 1
    assert "Traceback" not in said
    assert (newest.folder / f"{STATE_FILE}{TORN}").is_file() and not (newest.folder / STATE_FILE).exists()
    (weights, rungs), (expected, expected_rungs) = outcome(storage), outcome(undisturbed)
    assert rungs == expected_rungs and [kimg for kimg, *_ in rungs] == [1, 2, 3, 9, 10]
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    found = points(storage)
    assert len(found) == len(set(found)) == len(set(points(undisturbed)))

    # One more checkpoint than undisturbed: the torn one. Of the whole ones, old ones are thinned.
    whole = [each for each in checkpoints(training(storage)) if each.fault() is None]
    assert [each.nimg // 1000 for each in whole] == [1, 2, 3, 9, 10, 10]
    assert sum(each.resumable for each in whole) in (2, 3) and whole[-1].resumable and whole[-2].resumable
    print(f"{newest.nimg} images had been seen; faults 3 (state, snapshot, record), rungs lost 1, "
          f"rungs trained again 1, weights and scores bit-equal, {len(found)} points in MLflow, none doubled, "
          f"{spent_s:.0f} s to the end")  # fmt: skip


def test_a_torn_final_checkpoint_is_trained_again_before_it_is_exported(undisturbed: Path, tmp_path: Path) -> None:
    (run,) = undisturbed.glob("digits-*")
    before = outcome(undisturbed)
    for each in checkpoints(training(undisturbed))[-2:]:  # both hold the weights after the last rung
        (each.folder / STATE_FILE).write_bytes((each.folder / STATE_FILE).read_bytes()[:-7])
    for name in ("result.json", "export/model.safetensors"):
        (run / name).unlink()
    said = search(undisturbed)
    after = outcome(undisturbed)
    assert said.count("is torn") >= 1 and after[1] == before[1]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
