"""Trains on the digits' labels twice, the second time with its processes killed again and again; prints JSON.

Run by test_processes_killed.py in a process of its own: ``killed_run.py FOLDER SEED``.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table

import cedm_ray.stages.cluster.board
import cedm_ray.stages.cluster.orphans
from cedm_ray.config import load
from cedm_ray.search import main
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.connection import connected

RUNGS_KIMG = tuple(range(1, 11))
FLAGS = [
    "--dataset=digits", "--grouping=labels", "--granularity.no-baselines", "--plain",
    f"--granularity.total-kimg={RUNGS_KIMG[-1]}", "--granularity.rungs", *map(str, RUNGS_KIMG),
    "--score.num-images=400", "--score.batch-size=40", "--score.num-sets=1", "--resources.num-workers=2",
    "--resources.cpus-per-worker=0.5", f"--final.total-kimg={RUNGS_KIMG[-1] + 1}", "--final.num-images=200",
    "--final.num-sets=1", "--compute.device-batch=16",
]  # fmt: skip
FAULTS = (
    ("worker 1", "training"), ("worker 0", "scoring"), ("trial", "training"), ("worker 1", "scoring"),
    ("worker 0", "training"), ("controller", "scoring"), ("trial", "scoring"), ("both workers", "training"),
    ("controller", "starting"),
)  # fmt: skip
WAIT_S = 240


@dataclass
class Fault:
    """A process that was killed, and how long it took until the training trained again."""

    who: str
    while_: str
    at_kimg: float
    pids: list[int]
    again_s: float = -1.0
    lost_kimg: float = -1.0


def workers() -> dict[int, int]:
    """The process of each rank, by the newest line of a controller that has started its workers."""
    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs" / "train"
    newest: tuple[float, dict[int, int]] = (0.0, {})
    for log in logs.glob("ray-train-app-controller*.log"):
        starts = log.read_text(errors="replace").split("Started training worker group")
        found = {int(rank): int(pid) for pid, rank in re.findall(r"pid=(\d+)\).{0,3}world_rank=(\d+)", starts[-1])}
        if len(starts) > 1 and log.stat().st_mtime > newest[0]:
            newest = log.stat().st_mtime, found
    return {rank: pid for rank, pid in newest[1].items() if Path(f"/proc/{pid}").exists()}


def named(title: str) -> list[int]:
    """Processes below ours whose title begins so; other Rays may run on this machine."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_text()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone meanwhile
            continue
    found = []
    for pid in (pid for pid, said in titles.items() if said.startswith(title)):
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        found += [pid] if above == os.getpid() else []
    return found


def groups() -> set[str]:
    """The placement groups that have room on the cluster."""
    return {name for name, group in placement_group_table().items() if group["state"] == "CREATED"}


class Killer(threading.Thread):
    """Kills one process after another, each when the training has got a rung further since the last one."""

    def __init__(self, board: Board, seed: int) -> None:
        super().__init__(daemon=True)
        self.board, self.random = board, random.Random(seed)
        self.faults: list[Fault] = []
        self.error: str | None = None

    def run(self) -> None:
        try:
            for number, (who, while_) in enumerate(FAULTS):
                self.kill(who, while_, RUNGS_KIMG[number])
        except Exception as error:
            self.error = repr(error)

    def wait_for(self, what: str, looks_right: object) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not looks_right():  # type: ignore[operator]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {WAIT_S} s: {what}; {self.board.works()}")
            time.sleep(0.05)

    def done(self, while_: str) -> float | None:
        """How far the training or the scoring is, where that is what is done now."""
        unit = {"training": "kimg", "scoring": "images"}[while_]
        return next((work.done for work in self.board.works() if work.unit == unit), None)

    def start_anew(self, pids: Iterable[int]) -> None:
        """End the training's processes, and wait until new ones have their room and are not there yet."""
        before = groups()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.wait_for("room for new workers", lambda: groups() - before)

    def kill(self, who: str, while_: str, after_kimg: int) -> None:
        known = [0.0]

        def ready() -> bool:
            known[0] = max(known[0], self.done("training") or 0.0)
            now = "training" if while_ == "starting" else while_
            return known[0] >= after_kimg and self.done(now) is not None and len(workers()) == 2

        self.wait_for(f"{while_} after {after_kimg} kimg", ready)
        time.sleep(self.random.uniform(0, 1.0))
        ranks = workers()
        if while_ == "starting":
            self.start_anew(ranks.values())
        pids = {
            "worker 0": [ranks.get(0)], "worker 1": [ranks.get(1)], "both workers": list(ranks.values()),
            "trial": named("ray::ImplicitFunc"), "controller": named("ray::TrainController"),
        }[who]  # fmt: skip
        fault = Fault(who, while_, known[0], [pid for pid in pids if pid])
        if not fault.pids:
            raise RuntimeError(f"no {who} to kill")
        for pid in fault.pids:
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        self.faults.append(fault)

        def others() -> bool:
            now = workers()
            return len(now) == 2 and not set(now.values()) & set(ranks.values())

        self.wait_for(f"other workers after the death of {who}", others)
        stale = self.board.works()  # what the dead had told last
        self.wait_for(
            f"training after the death of {who}", lambda: self.board.works() != stale and self.done("training")
        )
        fault.again_s = round(time.monotonic() - killed_s, 1)
        fault.lost_kimg = round(known[0] - (self.done("training") or 0.0), 2)


def idle(within_s: float = 60) -> float:
    """Seconds until all CPUs are free and no process of a training is left."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < within_s:
        free = ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
        if free and not any(named(title) for title in ("ray::RayTrainWorker", "ray::TrainController", "ray::Implicit")):
            break
        time.sleep(0.2)
    return round(time.monotonic() - started_s, 1)


def disturbed(folder: Path, seed: int) -> Killer:
    """The same training with the killer at work; the search makes the board that he reads."""
    killers: list[Killer] = []

    class WatchedBoard(Board):
        def __init__(self) -> None:
            super().__init__()
            # What travels to other processes is a board as theirs is.
            board = Board.__new__(Board)
            board._actor = self._actor
            killers.append(Killer(board, seed))
            killers[0].start()

        def __reduce__(self) -> object:
            return _board, (self._actor,)

    cedm_ray.stages.cluster.board.Board = WatchedBoard  # type: ignore[misc]
    status = main([*FLAGS, f"--storage-path={folder}"])
    assert status == 0
    return killers[0]


def _board(actor: object) -> Board:
    board = Board.__new__(Board)
    board._actor = actor  # type: ignore[assignment]
    return board


if __name__ == "__main__":
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    cedm_ray.stages.cluster.orphans.LOOK_EVERY_S = 5.0  # else the training may be over before
    with connected(load([])):
        started_s = time.monotonic()
        assert main([*FLAGS, f"--storage-path={root / 'undisturbed'}"]) == 0
        alone_s = time.monotonic() - started_s
        killer = disturbed(root / "disturbed", seed)
        figures = {
            "seed": seed,
            "planned": FAULTS,
            "rungs_kimg": [*RUNGS_KIMG, RUNGS_KIMG[-1] + 1],
            "faults": [asdict(fault) for fault in killer.faults],
            "error": killer.error,
            "undisturbed_s": round(alone_s, 1),
            "disturbed_s": round(time.monotonic() - started_s - alone_s, 1),
            "idle_s": idle(),
        }
    print(json.dumps(figures))
