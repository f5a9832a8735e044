"""One real search among secrets: where it listens, what it writes down, and who may read that."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401  brings psutil

from cedm_ray.stages.checkup.ports import Listener
from helpers.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

SMALL = (
    "--grouping=kmeans --bound.c-max=12 --granularity.rule=none --granularity.num-trials=1 --granularity.share=1 "
    "--granularity.total-kimg=2 --granularity.grace-kimg=1 --granularity.startup-trials=1 --granularity.sampler=random "
    "--score.num-images=200 --score.num-steps=4 --score.num-sets=1 --final.total-kimg=3 --final.num-images=150 "
    "--final.num-sets=1 --resources.num-workers=2"
)
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-aws", "AWS_SESSION_TOKEN": "canary-of-the-session",
    "MLFLOW_TRACKING_TOKEN": "canary-of-mlflow", "HF_TOKEN": "canary-of-the-hub", "WANDB_API_KEY": "canary-of-others",
}  # fmt: skip
PASSWORD = "canary-in-the-uri"


@dataclass
class Story:
    """What is left of a search and of the server that it wrote to."""

    storage: Path
    server: Path
    ray: Path
    home: Path
    said: str = ""
    status: int | None = None
    listeners: set[Listener] = field(default_factory=set)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("story")
    short = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a socket's path may have 107 bytes
    found = Story(root / "runs", root / "server", short, root / "home")
    for folder in (found.storage, found.server, found.home):
        folder.mkdir(mode=0o755)  # the storage folder was there before, for all to see
    port = free_port()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    environment = {**plain, **SECRETS, "HOME": str(found.home), "RAY_TMPDIR": str(short), "PYTHONUNBUFFERED": "1"}
    before = os.umask(0o022)
    server = _mlflow(found.server, port, plain)
    command = [
        sys.executable, "-m", "cedm_ray.search", "--storage-path", str(found.storage), *SMALL.split(),
        "--tracking-uri", f"http://somebody:{PASSWORD}@127.0.0.1:{port}",
    ]  # fmt: skip
    try:
        with open(root / "said", "w") as out:
            search = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
            while search.poll() is None:
                found.listeners |= _listeners(search.pid)
                time.sleep(0.5)
        found.said, found.status = (root / "said").read_text(), search.returncode
    finally:
        os.umask(before)
        server.terminate()
        server.wait(30)
    yield found
    shutil.rmtree(short, ignore_errors=True)


def _mlflow(folder: Path, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """An MLflow server, once it answers."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    environment = {**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    deadline_s = time.monotonic() + 180
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            assert time.monotonic() < deadline_s and server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)


def _listeners(pid: int) -> set[Listener]:
    import psutil

    found = set()
    try:
        processes: list[Any] = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return found
    for process in processes:
        try:
            name = process.name()
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    found.add(Listener(name, each.laddr.ip, each.laddr.port))
        except psutil.Error:  # ended meanwhile
            continue
    return found


def test_it_ends_well(story: Story) -> None:
    assert story.status == 0, story.said[-3000:]


def test_none_of_its_processes_ever_listened_beyond_loopback(story: Story) -> None:
    programs = {each.program for each in story.listeners}
    print(f"{len(story.listeners)} ports of {len(programs)} programs: {sorted(programs)}")
    assert {"gcs_server", "raylet"} <= programs and any("TrainWorker" in name for name in programs), programs
    assert [str(each) for each in story.listeners if each.outside] == []


def test_no_secret_was_written_down_anywhere(story: Story) -> None:
    token = (story.home / ".ray" / "auth_token").read_text().strip()
    secrets = [secret.encode() for secret in (*SECRETS.values(), PASSWORD, token)]
    files = [
        file
        for folder in (story.storage, story.server, story.ray, story.home)
        for file in folder.rglob("*")
        if stat.S_ISREG(file.lstat().st_mode) and file != story.home / ".ray" / "auth_token"
    ]
    found = [(str(file), secret) for file in files for secret in secrets if secret in file.read_bytes()]
    print(f"{len(files)} files searched for {len(secrets)} secrets")
    assert found == [] and len(files) > 100
    assert {"mlflow.db", "search.log", "result.json", "raylet.out"} <= {file.name for file in files}
    assert not any(secret.decode() in story.said for secret in secrets)


def test_no_secret_is_shown_by_help_or_in_an_error() -> None:
    environment = {**os.environ, **SECRETS}
    for program, flag in (("search", "--help-all"), ("search", "--help"), ("doctor", "--help"), ("evaluate", "--help")):
        command = [sys.executable, "-m", f"cedm_ray.{program}", flag]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0 and len(done.stdout) > 200
        assert "canary" not in done.stdout + done.stderr
    for flags in (
        ("--dataset", f"s3://key:{PASSWORD}@bucket/images", "--resolution", "8"),
        ("--storage-path", f"s3://key:{PASSWORD}@bucket/runs"),
        ("--tracking-uri", f"nothing://key:{PASSWORD}@host/runs"),
        ("--tracking-uri", f"postgresql://key:{PASSWORD}@127.0.0.1:9/runs"),
    ):
        command = [sys.executable, "-m", "cedm_ray.search", *flags]
        if flags[0] != "--storage-path":
            command += ["--storage-path", tempfile.mkdtemp()]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "canary" not in done.stdout + done.stderr, done.stderr


def test_what_it_keeps_is_open_to_nobody_else(story: Story) -> None:
    """The folder that was there before is left as it is; all that the search made in it is closed."""
    assert stat.S_IMODE(story.storage.stat().st_mode) == 0o755
    made = sorted(story.storage.iterdir())
    assert any(re.fullmatch(r"digits-[0-9a-f]{8}", path.name) for path in made) and story.storage / "store" in made
    assert [str(path) for path in made if path.stat().st_mode & 0o077] == []
    assert (story.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
