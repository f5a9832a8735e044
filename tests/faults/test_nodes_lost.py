"""Nodes of a cluster that go and come while a search runs on it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A search that lost all workers while it embedded, clustered and trained, and one of two while it trained."""
    folder = tmp_path_factory.mktemp("nodes")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("nodes_run.py")), str(folder), "0"],
        capture_output=True, text=True, timeout=3500, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seed')))
    (result,) = (folder / "runs").glob("digits-*/result.json")
    found["result"] = json.loads(result.read_text())
    print(json.dumps({name: value for name, value in found.items() if name != "result"}, indent=1))
    return found


def test_the_search_ends_with_every_training_whole(story: dict[str, Any]) -> None:
    assert story["status"] == 0
    trials = story["result"]["trials"]
    assert len(trials) >= 2 and all(trial["state"] == "complete" and not trial["reason"] for trial in trials)
    for trial in trials:
        kimg = [rung["kimg"] for rung in trial["rungs"]]
        assert kimg[:4] == [5, 20, 40, 60] and kimg == sorted(set(kimg))


@pytest.mark.parametrize("stage", ["embedding", "bound", "trials"])
def test_while_no_worker_is_there_the_search_waits_and_says_so(story: dict[str, Any], stage: str) -> None:
    line = story[f"{stage}_line"]
    said = r"no node of the cluster holds .*\b(0\.5|1) CPU: waiting for \d+ s; ray status shows what is asked for"
    assert re.search(said, line), line
    assert story[f"{stage}_told_s"] < 120


def test_the_trial_of_a_lost_node_is_told_and_moves(story: dict[str, Any]) -> None:
    assert story["moved_s"] < 120 and story["both_s"] < 180 and story["again_s"] < 180
    assert any("holds again what is asked for" in line for line in story["lines"])


def test_nothing_that_the_search_relies_on_lies_on_a_worker_node(story: dict[str, Any]) -> None:
    assert story["off_the_head"] == ["RayTrainWorker"]
