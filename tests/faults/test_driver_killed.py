"""SIGKILL of the driver at random moments of a real search: the same command ends as if nothing had happened.

One Ray outlives all drivers, as a cluster does. ``CEDM_RAY_FAULT_SEEDS`` says how many seeds are tried (20).
"""

import json
import os
import random
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE, read_journal
from helpers.ports import free_ports
from helpers.results import MEASURED, assert_same_tensors, plain, result_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(14_400)]

SEEDS = int(os.environ.get("CEDM_RAY_FAULT_SEEDS", "20"))
SETTINGS = {
    "temi": {"num-heads": 2, "epochs": 8, "warmup-epochs": 1},
    "bound": {"c-start": 150, "precision": 2.0, "low-heads": 2, "max-concurrent": 1},
    "granularity": {
        "rule": "fitted", "num-trials": 2, "share": 0.15, "total-kimg": 12, "grace-kimg": 3, "startup-trials": 2,
        "max-concurrent": 1,
    },
    "resources": {"num-workers": 1},
    "score": {"num-images": 64, "num-steps": 4, "num-sets": 1},
    "final": {"total-kimg": 16, "num-images": 64, "num-sets": 2},
}  # fmt: skip
FLAGS = [f"--{group}.{name}={value}" for group, values in SETTINGS.items() for name, value in values.items()]
FLAGS.append("--granularity.no-baselines")
BOUND, BOUND_ENDS, TRIALS = "searching C_max", "C_max is", "searching over C"
EVENT = re.compile(r" C=\d+(?: \([^)]*\))?: ")
"""In a line of the terminal that says what has happened to a probe or a training."""
LONGEST_S = 1_800


class Driver:
    """One process of the command, in a process group of its own."""

    def __init__(self, storage: Path, address: str, number: int) -> None:
        self.log = storage.parent / f"driver-{number}.log"
        environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "cedm_ray.search", "--storage-path", str(storage), *FLAGS]
        with open(self.log, "w") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
        self.started_s = time.monotonic()

    def said(self) -> str:
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def events(self, stage: str) -> int:
        """How many things have happened in a stage; its start is the first."""
        said = self.said()
        if stage not in said:
            return 0
        said = said.split(stage, 1)[1]
        return 1 + len(EVENT.findall(said.split(BOUND_ENDS)[0] if stage == BOUND else said))

    def wait_for(self, stage: str, events: int = 1) -> float:
        """Wait until so much has happened in a stage, or it has ended; returns the time since its start."""
        while self.events(stage) < events and not self.ended:
            assert time.monotonic() - self.started_s < LONGEST_S, self.said()[-2000:]
            time.sleep(0.05)
        return time.monotonic() - self.started_s

    def wait(self) -> None:
        """Wait for its end, which must be a good one."""
        status = self._process.wait(LONGEST_S)
        assert status == 0 and "Traceback" not in self.said(), self.said()[-4000:]

    def kill(self) -> bool:
        """Kill the whole process group; False where it has ended by itself."""
        if self.ended:
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray head of our own, in a folder and with a token of its own."""
    port, dashboard = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: socket names have at most 107 characters
    host = ray.util.get_node_ip_address()
    address = f"{host}:{port}"
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
               f"--node-ip-address={host}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
               "--object-store-memory=300000000"]  # fmt: skip
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    # Processes of a trial look their instance up by its address: others may run on this machine.
    environment = {**os.environ, **RAY_ENVIRONMENT, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    environment["RAY_memory_monitor_refresh_ms"] = "0"  # the kills are ours alone, however full the machine is
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    deadline_s = time.monotonic() + 120
    while "Ray runtime started" not in (folder / "head.log").read_text():
        assert head.poll() is None and time.monotonic() < deadline_s, (folder / "head.log").read_text()
        time.sleep(0.5)
    yield address
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        del os.environ[name]
    for pid in (pid for pid, session in sessions() if session == head.pid):
        os.kill(pid, signal.SIGKILL)
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def sessions() -> list[tuple[int, int]]:
    """All processes and their sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.append((int(stat.parent.name), int(fields[3])))
    return found


@dataclass(frozen=True)
class Whole:
    """The undisturbed search: its storage, what happens when, and what the others start from."""

    storage: Path
    events_s: dict[str, list[float]]
    """By stage, when each thing happens, from the driver's start; the stage's end is the last."""
    prepared: Path
    """Images, embeddings and the statistics of the score: no search has to make them again."""
    bounded: Path
    """The same, with every probe."""

    def kill_at(self, driver: Driver, stage: str, share: float) -> bool:
        """Kill a driver when so much of a stage has gone by, whether the machine is faster now or slower.

        The last thing that had happened by then is waited for, and as much of the time to the next.
        """
        times = self.events_s[stage]
        moment_s = times[0] + share * (times[-1] - times[0])
        count = sum(each <= moment_s for each in times)
        reached_s = driver.wait_for(stage, count)
        time.sleep((moment_s - times[count - 1]) * reached_s / times[count - 1])
        return driver.kill()


@pytest.fixture(scope="module")
def whole(address: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root = tmp_path_factory.mktemp("whole")
    storage, prepared, bounded = (root / name for name in ("runs", "prepared", "bounded"))
    first = Driver(storage, address, 0)
    first.wait_for(BOUND)
    first.kill()
    shutil.copytree(storage / "store", prepared / "store", ignore=shutil.ignore_patterns("trials", "clusterings"))
    shutil.rmtree(storage)
    shutil.copytree(prepared, storage)
    driver = Driver(storage, address, 1)
    events_s: dict[str, list[float]] = {BOUND: [], TRIALS: []}
    while not driver.ended:
        driver.wait_for(BOUND)
        for stage, times in events_s.items():
            times += [time.monotonic() - driver.started_s] * (driver.events(stage) - len(times))
        if events_s[TRIALS] and not bounded.exists():
            shutil.copytree(storage / "store", bounded / "store", ignore=shutil.ignore_patterns("trials", ".*"))
        time.sleep(0.05)
    driver.wait()
    events_s[BOUND].append(events_s[TRIALS][0])
    events_s[TRIALS].append(time.monotonic() - driver.started_s)
    lasted = ", ".join(f"{name!r} {times[-1] - times[0]:.0f} s" for name, times in events_s.items())
    print(f"\nundisturbed: {events_s[BOUND][0]:.0f} s to start, {lasted}")
    return Whole(storage, events_s, prepared, bounded)


def done_work(storage: Path) -> dict[str, Any]:
    """Every probe and every rung that is stored, each with what was measured of it: made again it would differ."""
    found: dict[str, Any] = {}
    for file in storage.glob("store/clusterings/[0-9a-f]*/facts.json"):
        facts = json.loads(file.read_text())
        if "seconds" in facts:
            found[f"C={facts['num_clusters']} {file.parent.name}"] = facts["seconds"]
    for trial in storage.glob("store/trials/*"):
        manager = trial / "train" / "checkpoint_manager_snapshot.json"
        known = manager.read_text() if manager.is_file() else ""
        files = [file for file in trial.glob("train/checkpoint_*/rungs.json") if file.parent.name in known]
        lists = [json.loads(file.read_text()) for file in files]
        if (trial / "trial.json").is_file():
            lists.append(json.loads((trial / "trial.json").read_text())["rungs"])
        for rung in (rung for rungs in lists for rung in rungs):
            found[f"{trial.name} {rung['kimg']}"] = rung["images_per_s"], rung["score_s"]
    return found


def newest_s(storage: Path) -> float:
    """When the last piece of finished work was stored, in seconds of the epoch."""
    names = ("store/clusterings/*/facts.json", "store/trials/*/trial.json", "store/trials/*/train/checkpoint_*")
    return max((file.stat().st_mtime for name in names for file in storage.glob(name)), default=0.0)


def underway(storage: Path) -> str:
    """What was being trained, from the records."""
    found = []
    for file in storage.glob("store/trials/*/trial.json"):
        record = json.loads(file.read_text())
        if record["state"] == "running":
            reached = record["rungs"][-1]["kimg"] if record["rungs"] else 0
            found.append(f"{record['label']} after {reached} kimg")
    return ", ".join(found) or "-"


def compare_models(whole: Path, killed: Path) -> int:
    """The newest checkpoint of every trial and the exported model; returns how many numbers are equal to the bit."""
    expected, found = result_of(whole), result_of(killed)
    pairs = [(Path(result["final"]["export"]) / "model.safetensors") for result in (expected, found)]
    count = assert_same_tensors(*pairs)
    for one, other in zip(expected["trials"], found["trials"], strict=True):
        states = [Path(trial["rungs"][-1]["checkpoint_path"]) / "state.safetensors" for trial in (one, other)]
        assert str(states[1]).startswith(str(killed))
        count += assert_same_tensors(*states)
    return count


def tracked(storage: Path) -> tuple[list[tuple[str, str]], Counter[Any]]:
    """MLflow's runs with their status, and how often each point is there; measured ones without their value."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        rows = database.execute(
            "SELECT runs.name, metrics.key, step, value FROM metrics JOIN runs USING (run_uuid)"
        ).fetchall()
    assert database_uri(storage).endswith("mlflow.db")
    points = Counter((run, key, step, None if key in MEASURED else value) for run, key, step, value in rows)
    return sorted(runs), points


@dataclass
class Killed:
    """What became of a search that was killed."""

    seed: int
    stage: str
    moments_s: list[float] = field(default_factory=list)
    """Of each kill, since the driver's start."""
    underway: list[str] = field(default_factory=list)
    lost_s: list[float] = field(default_factory=list)
    """From the last thing that was stored to the kill: at most so much is computed again."""
    repeated: int = 0
    kept: int = 0
    numbers: int = 0


def kill_and_finish(seed: int, whole: Whole, address: str, folder: Path) -> Killed:
    """Kill drivers of one search at random moments, let the last one finish, and compare with the undisturbed search.

    Even seeds are killed among the probes first, odd ones among the trainings; every fourth is killed twice and every
    fifth three times, at any later moment.
    """
    rng = random.Random(seed)
    stage = BOUND if seed % 2 == 0 else TRIALS
    storage, found = folder / "runs", Killed(seed, "probes" if stage == BOUND else "trainings")
    shutil.copytree(whole.prepared if stage == BOUND else whole.bounded, storage)
    kills = 3 if seed % 5 == 4 else 2 if seed % 4 == 3 else 1
    before: list[dict[str, Any]] = []
    for number in range(kills):
        driver = Driver(storage, address, number)
        if number:  # it has less to do than the undisturbed one: at any moment from its start on
            time.sleep(rng.uniform(0, 0.5) * whole.events_s[TRIALS][-1])
        if not (driver.kill() if number else whole.kill_at(driver, stage, rng.uniform(0, 0.95))):
            driver.wait()
            break
        found.moments_s.append(time.monotonic() - driver.started_s)
        started = time.time() - found.moments_s[-1]
        found.lost_s.append(time.time() - max(newest_s(storage), started))
        found.underway.append(underway(storage))
        before.append(done_work(storage))
    Driver(storage, address, kills).wait()
    after = done_work(storage)
    found.kept = len(before[-1]) if before else 0
    found.repeated = sum(work.get(name) != after[name] for work in before for name in after if name in work)
    assert all(work.keys() <= after.keys() for work in before)
    assert plain(result_of(storage), storage) == plain(result_of(whole.storage), whole.storage)
    found.numbers = compare_models(whole.storage, storage)
    (runs, points), (expected_runs, expected_points) = tracked(storage), tracked(whole.storage)
    assert max(points.values()) == 1 and runs == expected_runs and {status for _, status in runs} == {"FINISHED"}
    assert points == expected_points
    (journal,) = storage.glob(f"digits-*/{OUTBOX_FILE}")
    assert not read_journal(journal).waiting()
    return found


def test_a_killed_search_ends_as_the_undisturbed_one(
    whole: Whole, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, faults = [], 0
    for seed in range(SEEDS):
        found = kill_and_finish(seed, whole, address, tmp_path / str(seed))
        rows.append(found)
        faults += len(found.moments_s)
        with capsys.disabled():
            moments = ", ".join(f"{moment:.0f}" for moment in found.moments_s)
            lost = ", ".join(f"{seconds:.1f}" for seconds in found.lost_s)
            print(f"seed {seed:2d}  {found.stage:9}  killed after {moments} s  lost at most {lost} s  "
                  f"under way: {'; '.join(found.underway)}  kept {found.kept}, made twice {found.repeated}  "
                  f"{found.numbers:,} numbers bit-equal", flush=True)  # fmt: skip
        assert found.repeated == 0
        shutil.rmtree(tmp_path / str(seed))
    with capsys.disabled():
        print(f"{SEEDS} seeds, {faults} SIGKILLs: no result, weight or point of MLflow differs, nothing was made twice")
    assert faults >= SEEDS and {row.stage for row in rows} == ({"probes", "trainings"} if SEEDS > 1 else {"probes"})


def test_what_is_left_out_of_the_comparison_is_measured_or_a_place(whole: Whole) -> None:
    """Scores, losses and everything else that is decided by the seeds is compared."""
    compared = plain(result_of(whole.storage), whole.storage)
    rung = compared["trials"][0]["rungs"][-1]
    assert {"score", "loss", "kimg", "nimg", "fd_lenet"} <= rung.keys()
    assert {"num_clusters", "ratio", "seed"} <= compared["upper_bound"]["probes"][0].keys()
    assert compared["final"]["scores"] and not re.search(r"/tmp|/home", json.dumps(compared))
