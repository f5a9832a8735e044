"""A real search on a small disk of its own that runs full, or turns read-only, at one moment after the other.

Each time the search has to end with one line, with all that was stored unharmed; then room is made, the same command
goes on, and meets the next moment. What it ends with has to be what a search ends with that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.results import assert_same_tensors, plain, result_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(10_800)]

SETTINGS = {
    "temi": {"epochs": 4, "warmup-epochs": 1},
    "bound": {"c-start": 150, "precision": 2.0, "low-heads": 2, "low-spread": 0.6, "max-concurrent": 1},
    "granularity": {
        "num-trials": 2, "share": 0.2, "total-kimg": 2, "grace-kimg": 1, "startup-trials": 2, "max-concurrent": 1,
    },
    "score": {"num-images": 100, "num-steps": 3, "num-sets": 2},
    "final": {"total-kimg": 3, "num-images": 100, "num-sets": 2},
}  # fmt: skip
FLAGS = [f"--{group}.{name}={value}" for group, values in SETTINGS.items() for name, value in values.items()]
FLAGS.append("--granularity.no-baselines")
LONGEST_S = 1_800
RESERVED = 2**18
"""Most bytes that are left free: less than a checkpoint takes."""

MOMENTS = {
    "images": "everything is kept under",
    "Ray starts": "starting Ray",
    "embeddings": r"embedding 1,797",
    "statistics": "preparing the score",
    "groups": "preparing the groups",
    "probe": "searching C_max",
    "second probe": r"C=\d+: \d+ clusters used",
    "search over C": r"searching over C in",
    "training": r"C=\d+: starts",
    "rung": r"C=\d+: 1 kimg",
    "second training": r"C=(?!2:)\d+: starts",
    "final training": r"training C=\d+ on to",
    "evaluation": r"evaluating C=",
    "figures": r"ranking samples",
}
"""What the search has said when its disk runs full. It takes a while until it writes again: a moment may lie anywhere
in what follows."""

LINE = (
    r"error: (storage: )?the storage {} is full: (the rest of the search|a checkpoint of C=\d+) needs "
    r"(about [\d.,]+ [kMG]B, [\d.,]+ [kMG]B are free|more than the [\d.,]+ [kMG]B that are free); "
    r"make room or give another --storage-path; the same command goes on\n"
)
READ_ONLY = (
    r"error: (storage: )?the storage {} is read-only: .* cannot be written; make it writable or give another "
    r"--storage-path; the same command goes on\n"
)


@dataclass
class Ran:
    """What a search did."""

    status: int
    out: str
    err: str
    met: bool = False
    """Whether the moment came."""
    kept: dict[Path, str] = field(default_factory=dict)
    """Hashes of what was whole at that moment."""
    seconds: float = 0.0
    """From that moment to its end."""


def search(
    storage: Path, logs: Path, moment: str | None = None, act: Callable[[], object] = lambda: None,
    stay: Callable[[], object] = lambda: None,
) -> Ran:  # fmt: skip
    """Run the search to its end; when it has said what the moment waits for, act, and stay so from then on."""
    out, err = logs / "out.txt", logs / "err.txt"
    command = [sys.executable, "-m", "cedm_ray.search", "--storage-path", str(storage), *FLAGS]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with open(out, "w") as stdout, open(err, "w") as stderr:
        driver = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True, env=environment)
    ran, started_s, met_s = Ran(0, "", ""), time.monotonic(), 0.0
    while driver.poll() is None:
        if time.monotonic() - started_s > LONGEST_S:
            os.killpg(driver.pid, signal.SIGKILL)
        elif ran.met:
            stay()
        elif moment is not None and re.search(moment, out.read_text()):
            ran.kept, ran.met, met_s = whole_files(storage), True, time.monotonic()
            act()
        time.sleep(0.05)
    ran.status, ran.out, ran.err = driver.wait(), out.read_text(), err.read_text()
    ran.seconds = time.monotonic() - met_s if ran.met else 0.0
    return ran


def whole_files(storage: Path) -> dict[Path, str]:
    """Hashes of all that is finished: entries of the store, packed images, checkpoints that the records name."""
    found: set[Path] = set()
    for facts in storage.glob("store/*/[0-9a-f]*/facts.json"):
        found.update(file for file in facts.parent.rglob("*") if file.is_file())
    for folder in (folder for folders in checkpoints_of(storage) for folder in folders):
        found.update(file for file in folder.rglob("*") if file.is_file())
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in found if ".torn" not in str(file)}


def checkpoints_of(storage: Path) -> list[list[Path]]:
    """The checkpoints that each trial's record names, the newest last."""
    records = [json.loads(file.read_text()) for file in storage.glob("store/trials/*/trial.json")]
    return [[Path(rung["checkpoint_path"]) for rung in record["rungs"] if "checkpoint_path" in rung]
            for record in records]  # fmt: skip


def states(storage: Path) -> set[str]:
    return {json.loads(file.read_text())["state"] for file in storage.glob("store/trials/*/trial.json")}


def harmed(ran: Ran, storage: Path) -> list[str]:
    """What was whole and is not as it was; an old checkpoint may have been thinned, a trial's newest may not."""
    newest = {folder for folders in checkpoints_of(storage) for folder in folders[-1:]}
    bad = []
    for file, digest in ran.kept.items():
        if not file.is_file():
            old = "checkpoint_" in file.parent.name and file.parent not in newest
            bad += [] if old else [f"{file} is gone"]
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest and file.name != "manifest.json":
            bad.append(f"{file} has changed")
    return bad


def assert_same_end(storage: Path, undisturbed: Path) -> None:
    """The same probes, records and scores, and the same weights to the bit."""
    assert plain(result_of(storage), storage) == plain(result_of(undisturbed), undisturbed)
    (one,), (other,) = (list(place.glob("digits-*/export/model.safetensors")) for place in (storage, undisturbed))
    assert_same_tensors(one, other)


def assert_said(ran: Ran, line: str, storage: Path, name: str) -> None:
    assert ran.met and ran.status == 2, (name, ran.status, ran.out[-1500:], ran.err[-3000:])
    assert re.fullmatch(line.format(re.escape(str(storage))), ran.err), (name, ran.err[-3000:])
    assert "Traceback" not in ran.out and "failed" not in ran.out, (name, ran.out[-3000:])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ran = search(folder / "runs", folder)
    assert ran.status == 0, ran.out[-2000:] + ran.err[-2000:]
    return folder / "runs"


def test_a_search_whose_disk_runs_full_at_any_moment_says_so_and_ends_as_if_it_had_not(
    small_disk: Any, tmp_path: Path, undisturbed: Path
) -> None:
    disk = small_disk("256m")
    storage, seeds, table = disk.path / "runs", random.Random(0), []
    for number, (name, moment) in enumerate(MOMENTS.items()):
        leave = (0, seeds.randrange(RESERVED), 4096)[number % 3]
        ran = search(storage, tmp_path, moment, lambda: disk.fill(leave), lambda: disk.fill(leave))  # noqa: B023
        bad, row = harmed(ran, storage), f"{name:<16} {leave:>9,} {len(ran.kept):>6} {ran.seconds:>8.1f}"
        table.append(f"{row} {len(bad):>6}  {'went on' if ran.status == 0 else ran.err[len('error: ') :].strip()}")
        print(table[-1], flush=True)
        disk.make_room()
        assert not bad, (name, bad)
        assert_said(ran, LINE, storage, name)
        assert "failed" not in states(storage)
    ran = search(storage, tmp_path)
    assert ran.status == 0 and ran.err == "", ran.out[-2000:] + ran.err[-2000:]
    assert_same_end(storage, undisturbed)
    print("moment           left free  whole  s to end  harmed  what it said")
    print("\n".join(table))


class FailingDisk:
    """An ext4 file system in a file; its kernel can be told that it is faulty, and then writes to it no more."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.path, self._image = folder / "ext4", folder / "ext4.img"
        self.path.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(megabytes * 2**20)
        self._run("mkfs.ext4", "-q", str(self._image))
        self.mount()

    @staticmethod
    def _run(*command: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not installed")
        if done.returncode:
            pytest.skip(f"an ext4 file system cannot be made and mounted here ({done.stderr.strip()})")

    def mount(self) -> None:
        self._run("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.path))
        (device,) = [
            line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if str(self.path) in line
        ]
        assert device.startswith("/dev/loop")
        self._trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
        if not self._trigger.is_file():
            pytest.skip("this kernel cannot be told that a file system is faulty")

    def unmount(self) -> None:
        for _ in range(60):  # the last processes of Ray may still be ending
            if subprocess.run(["umount", str(self.path)], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(1)
        raise RuntimeError(f"{self.path} stays busy")

    def fail(self) -> None:
        os.sync()
        self._trigger.write_text("1")

    def repair(self) -> None:
        self.unmount()
        subprocess.run(["e2fsck", "-fy", str(self._image)], capture_output=True, check=False)
        self.mount()


def test_a_search_whose_disk_turns_read_only_says_so_and_ends_as_if_it_had_not(
    tmp_path: Path, undisturbed: Path
) -> None:
    disk = FailingDisk(tmp_path, 400)
    try:
        storage, table = disk.path / "runs", []
        for name in ("embeddings", "second probe", "training", "rung", "evaluation"):
            ran = search(storage, tmp_path, MOMENTS[name], disk.fail)
            closed = search(storage, tmp_path)  # nobody has seen to the disk yet
            disk.repair()
            bad = harmed(ran, storage)
            table.append(f"{name:<16} {len(ran.kept):>6} {ran.seconds:>8.1f} {len(bad):>6}  {ran.err.strip()}")
            print(table[-1], flush=True)
            assert not bad, (name, bad)
            assert_said(ran, READ_ONLY, storage, name)
            assert closed.status == 2 and re.fullmatch(READ_ONLY.format(re.escape(str(storage))), closed.err), (
                closed.err
            )
            assert "failed" not in states(storage)
        ran = search(storage, tmp_path)
        assert ran.status == 0 and ran.err == "", ran.out[-2000:] + ran.err[-2000:]
        assert_same_end(storage, undisturbed)
        print("moment            whole  s to end  harmed  what it said")
        print("\n".join(table))
    finally:
        disk.unmount()
