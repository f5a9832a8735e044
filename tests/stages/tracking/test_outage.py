"""Real outages: a server that is killed and started again, one that hangs, a locked database, a killed driver."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE, read_journal
from cedm_ray.stages.tracking.tracker import Tracker
from helpers.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Server:
    """A tracking server with its database in a folder, on a port of its own."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", database_uri(self.storage)]
        command += ["--artifacts-destination", str(self.storage / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.storage / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        for _ in range(240):
            time.sleep(0.5)
            try:
                urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (URLError, OSError):
                assert self.process.poll() is None, (self.storage / "server.log").read_text()[-2000:]
        raise AssertionError("the server did not start within two minutes")

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def points_of(storage: Path) -> Counter[tuple[str, str, int, float]]:
    """How often every point is there: name of the run, metric, step, value."""
    with sqlite3.connect(storage / "mlflow.db") as database:
        rows = database.execute(
            "SELECT runs.name, metrics.key, step, value FROM metrics JOIN runs USING (run_uuid)"
        ).fetchall()
    return Counter((str(run), str(key), int(step), float(value)) for run, key, step, value in rows)


def names_of(storage: Path) -> list[str]:
    with sqlite3.connect(storage / "mlflow.db") as database:
        return sorted(str(name) for (name,) in database.execute("SELECT name FROM runs"))


def tell(track: Tracker, trial: int, rungs: range) -> float:
    """What a trial reports; returns the seconds that it took to say so."""
    began = time.monotonic()
    child = track.child(f"C={trial}", f"C={trial}", {"num_clusters": trial}, {"stage": "granularity"})
    for kimg in rungs:
        track.metrics(child, {"score": 100.0 / (kimg + trial), "loss": 0.5}, kimg)
    return time.monotonic() - began


def expected(trials: range, rungs: range) -> Counter[tuple[str, str, int, float]]:
    wanted: Counter[tuple[str, str, int, float]] = Counter()
    for trial in trials:
        for kimg in rungs:
            values = {"score": 100.0 / (kimg + trial), "loss": 0.5, "kimg": float(kimg)}
            wanted.update((f"C={trial}", name, kimg, value) for name, value in values.items())
    return wanted


def wait_until_delivered(track: Tracker) -> None:
    assert track._outbox.flush(90) == 0


def test_a_server_that_is_down_at_the_start_in_the_middle_and_at_the_end_gets_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    server, said = Server(tmp_path), list[str]()
    track = Tracker(server.uri, "cedm_ray/test", None, tmp_path, said.append)
    parent = track.start("key", "search", {"seed": 0}, {"state": "running"})
    assert track.run_id(parent) is None and tell(track, 1, range(1, 21)) < 10
    server.start()
    try:
        wait_until_delivered(track)
        assert track.run_id(parent) is not None and points_of(tmp_path) == expected(range(1, 2), range(1, 21))
        tell(track, 2, range(1, 11))
        server.kill()  # while it is being told
        assert tell(track, 2, range(11, 21)) < 10
        time.sleep(3)
        server.start()
        wait_until_delivered(track)
        server.signal(signal.SIGSTOP)  # answers nobody, and reads later what was sent in vain
        assert tell(track, 3, range(1, 21)) < 10
        time.sleep(7)
        server.signal(signal.SIGCONT)
        wait_until_delivered(track)
        assert points_of(tmp_path) == expected(range(1, 4), range(1, 21))
        server.kill()
        (tmp_path / "a.txt").write_text("hello")
        track.artifact(parent, tmp_path / "a.txt")
        tell(track, 4, range(1, 21))
        track.end(parent, "complete")
        began = time.monotonic()
        assert track.close(3) == 23 and time.monotonic() - began < 6
        server.start()
        assert Tracker(server.uri, "cedm_ray/test", None, tmp_path, said.append).close(60) == 0
        assert points_of(tmp_path) == expected(range(1, 5), range(1, 21))
        assert names_of(tmp_path) == ["C=1", "C=2", "C=3", "C=4", "search"]
        assert [file.read_text() for file in tmp_path.glob("artifacts/**/a.txt")] == ["hello"]
    finally:
        server.kill()
    stops = [line for line in said if "does not answer" in line]
    assert len(stops) == 4 and len([line for line in said if "answers again" in line]) == 3


def test_a_locked_database_delays_the_points_and_nothing_else(tmp_path: Path) -> None:
    Tracker(database_uri(tmp_path), "cedm_ray/test", tmp_path / "artifacts", tmp_path).close()
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    said: list[str] = []
    began = time.monotonic()
    track = Tracker(database_uri(tmp_path), "cedm_ray/test", tmp_path / "artifacts", tmp_path, said.append)
    track.start("key", "search", {}, {})
    assert tell(track, 1, range(1, 21)) < 10 and time.monotonic() - began < 40
    assert track._outbox.flush(40) == 22
    other.execute("ROLLBACK")
    assert track.close(60) == 0
    assert points_of(tmp_path) == expected(range(1, 2), range(1, 21))
    assert len(said) == 2 and "locked" in said[0] and "answers again" in said[1]


DRIVER = """
import sys
from pathlib import Path
from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking.tracker import Tracker

folder, seed, base = Path(sys.argv[1]), sys.argv[2], int(sys.argv[2]) * 100
track = Tracker(database_uri(folder.parent), "cedm_ray/test", folder.parent / "artifacts", folder)
print("begun", flush=True)
parent = track.start(seed, f"search {seed}", {"seed": seed}, {"state": "running"})
for trial in range(base + 1, base + 4):
    child = track.child(f"C={trial}", f"C={trial}", {"num_clusters": trial}, {"stage": "granularity"})
    for kimg in range(1, 21):
        track.metrics(child, {"score": 100.0 / (kimg + trial), "loss": 0.5}, kimg)
    track.end(child, "complete")
track.end(parent, "complete")
print("told", flush=True)
sys.exit(track.close())
"""


def test_a_driver_that_is_killed_at_ten_random_moments_loses_and_doubles_no_point(tmp_path: Path) -> None:
    Tracker(database_uri(tmp_path), "cedm_ray/test", tmp_path / "artifacts", tmp_path).close()
    wanted: Counter[tuple[str, str, int, float]] = Counter()
    names, in_the_middle = list[str](), 0
    for seed in range(10):
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = [sys.executable, "-c", DRIVER, str(folder), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
            time.sleep(random.Random(seed).uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
        journal = read_journal(folder / OUTBOX_FILE)
        in_the_middle += 0 < len(journal.receipts) < 67
        assert subprocess.run(command, stdout=subprocess.PIPE, check=False).returncode == 0
        wanted += expected(range(100 * seed + 1, 100 * seed + 4), range(1, 21))
        names += [f"search {seed}", *(f"C={100 * seed + trial}" for trial in (1, 2, 3))]
    assert points_of(tmp_path) == wanted and names_of(tmp_path) == sorted(names)
    assert in_the_middle >= 3  # the moments were well chosen
