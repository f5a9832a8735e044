"""Runs three tiny trainings in legs with a real Tune and a real Ray Train; prints what happened as JSON.

Run by test_legs.py in a process of its own. The first training is paused at its first rung and then promoted, the
second is paused and never promoted, the third is stopped at its first rung.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import ray.tune

from cedm_ray.config import load
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.training.legs import Desk, Leg, LegScheduler, LegSearcher, Verdict

WAIT_S = 30
RUNGS_KIMG = (1, 2)
VERDICTS: dict[tuple[str, int], Verdict] = {("promoted", 1): "pause", ("left", 1): "pause", ("bad", 1): "stop"}


def train_worker(loop: Mapping[str, Any]) -> None:
    """Goes on from the newest checkpoint, reports again what it had reported, and then each missing rung."""
    rungs: list[dict[str, Any]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            rungs = json.loads((Path(folder) / "rungs.json").read_text())
    for rung in rungs:
        ray.train.report(rung)
    found = len(rungs)
    for kimg in RUNGS_KIMG[found:]:
        time.sleep(1)
        rungs.append({"kimg": kimg, "score": 1.0, "found": found, "worker_pid": os.getpid()})
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "rungs.json").write_text(json.dumps(rungs))
            ray.train.report(rungs[-1], checkpoint=ray.train.Checkpoint.from_directory(folder))


def train(config: Mapping[str, Any], folder: str) -> None:
    from ray.tune.integration.ray_train import TuneReportCallback

    ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(
            name="train", storage_path=f"{folder}/{config['name']}", callbacks=[TuneReportCallback()]
        ),
    ).fit()


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def quiet(pids: list[int]) -> bool:
    """Whether these processes are gone and all CPUs are free."""
    free = ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
    return free and not any(alive(pid) for pid in pids)


class Script:
    """Two trainings up to their first rungs; when their processes are gone, the promotion and the third training."""

    def __init__(self) -> None:
        self.first = [Leg(name, {"name": name}, 0, 1) for name in ("promoted", "left")]
        self.then = [Leg("promoted", {"name": "promoted"}, 1, 2), Leg("bad", {"name": "bad"}, 0, 1)]
        self.running: set[str] = set()
        self.told: list[tuple[str, int, int]] = []
        self.ended: list[str] = []
        self.pids: list[int] = []
        self.paused_s = 0.0
        self.quiet_s: float | None = None
        self.most = 0

    def ask(self) -> Leg | None:
        if not self.first and len(self.then) == 2:
            waited_s = time.monotonic() - self.paused_s
            if self.running or (not quiet(self.pids) and waited_s < WAIT_S):
                return None
            self.quiet_s = waited_s
        leg = (self.first or self.then).pop(0) if self.first or self.then else None
        if leg is not None:
            self.running.add(leg.key)
            self.most = max(self.most, len(self.running))
        return leg

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        self.told.append((key, result["kimg"], result["found"]))
        self.pids += [result["worker_pid"], result["pid"]]
        verdict = VERDICTS.get((key, result["kimg"]), "continue")
        if verdict == "pause":
            self.running.discard(key)
            self.paused_s = time.monotonic()
        return verdict

    def end(self, key: str, failed: bool) -> None:
        self.ended.append(f"{key} failed" if failed else key)
        self.running.discard(key)

    @property
    def done(self) -> bool:
        return not self.first and not self.then and not self.running


class Completed(ray.tune.Callback):
    """Which trials Tune calls complete, and the last rung of each."""

    def __init__(self, found: dict[str, int]) -> None:
        self.found = found

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.found[trial.config["name"]] = trial.last_result["kimg"]


def main(folder: str) -> None:
    script = Script()
    completed: dict[str, int] = {}
    desk = Desk(script, at_once=lambda: 2)
    started_s = time.monotonic()
    with connected(load([])):
        up_s = time.monotonic() - started_s
        trainable = ray.tune.with_parameters(train, folder=folder)
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, {"node:__internal_head__": 0.001}),
            tune_config=ray.tune.TuneConfig(search_alg=LegSearcher(desk), scheduler=LegScheduler(desk), num_samples=-1),
            run_config=ray.tune.RunConfig(
                name="legs", storage_path=f"{folder}/tune", verbose=0, callbacks=[Completed(completed)]
            ),
        ).fit()
        ended_s = time.monotonic()
        while not quiet(script.pids) and time.monotonic() - ended_s < WAIT_S:
            time.sleep(0.1)
        found = {
            "told": script.told, "ended": script.ended, "completed": completed, "most": script.most,
            "paused_quiet_s": script.quiet_s, "ended_quiet_s": time.monotonic() - ended_s,
            "ray_s": up_s, "tune_s": ended_s - started_s - up_s,
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
