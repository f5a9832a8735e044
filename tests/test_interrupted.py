"""A real search in a real terminal that is interrupted as a person does it, and goes on by the command that it prints.

The parts come in the order in which they stand: each goes on with what the one before has left.
"""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import sys
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.stages.show.stopping import NOW_S, TERM_GRACE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = str(Path(__file__).parent.parent)
TINY = [
    "--temi.epochs=2", "--temi.warmup-epochs=1", "--temi.num-heads=2", "--bound.c-max=4", "--granularity.num-trials=1",
    "--granularity.no-baselines", "--granularity.share=1", "--granularity.rungs", "12", "24", "36",
    "--granularity.total-kimg=36", "--granularity.startup-trials=1", "--granularity.rule=none",
    "--granularity.max-concurrent=1", "--score.num-images=80", "--score.num-steps=2", "--score.num-sets=1",
    "--final.total-kimg=37", "--final.num-images=80", "--final.num-sets=1", "--resources.num-workers=1",
]  # fmt: skip
TRAINING = r"\x1b\[36mtraining"  # a trial in the table, in its colour
GO_ON = re.compile(r"go on with: (python -m cedm_ray\.search .*?)\s*$", re.DOTALL)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Session:
    """A program on a terminal of 300 columns, in which no line is broken."""

    argv: list[str]
    said: str = ""
    pid: int = 0
    fd: int = -1
    processes: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # pragma: no cover
            os.environ.update({"TERM": "xterm", "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"})
            os.execv(self.argv[0], self.argv)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 300, 0, 0))

    def read(self, seconds: float) -> bool:
        """Take what comes; False when the program has closed its terminal."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                part = os.read(self.fd, 65536)
            except OSError:
                return False
            self.said += part.decode(errors="replace")
            return bool(part)
        return True

    def until(self, pattern: str, timeout_s: float = 300) -> None:
        """Wait for something to appear from now on."""
        begin, deadline_s = len(self.said), time.monotonic() + timeout_s
        while not re.search(pattern, self.said[begin:]):
            assert time.monotonic() < deadline_s and self.read(0.2), f"{pattern} did not come:\n{self.text[-3000:]}"

    def press_ctrl_c(self) -> None:
        self.processes = below(self.pid)
        os.write(self.fd, b"\x03")

    def end(self, timeout_s: float = 300) -> tuple[int, float]:
        """Exit status, and how long it has taken; Ray's processes may hold the terminal a little longer."""
        started_s = time.monotonic()
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() - started_s < timeout_s, self.text[-3000:]
            if not self.read(0.2):
                time.sleep(0.1)
        seconds = time.monotonic() - started_s
        while select.select([self.fd], [], [], 0)[0] and self.read(0):
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(ended[1]), seconds

    @property
    def text(self) -> str:
        return ESCAPES.sub("", self.said).replace("\r", "")

    def left_processes(self) -> list[str]:
        """Processes of the program that live on 20 s after it."""
        deadline_s = time.monotonic() + 20
        while (left := [name for pid, name in self.processes.items() if process(pid)[1] == name]) and (
            time.monotonic() < deadline_s
        ):
            time.sleep(0.5)
        return left


def process(pid: int) -> tuple[int, str]:
    """Parent and identity (name and start) of a process that lives; of another one nothing."""
    try:
        name, rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)
    except OSError:
        return 0, ""
    values = rest.split()
    return (0, "") if values[0] == "Z" else (int(values[1]), f"{name}) {values[19]}")


def below(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those that they have started."""
    known = {int(entry): process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    found: set[int] = set()
    while more := {each for each, (parent, _) in known.items() if parent in {pid, *found}} - found:
        found |= more
    return {each: known[each][1] for each in found if known[each][1]}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a folder's") / "runs"


def start(storage: Path, *flags: str) -> Session:
    return Session([sys.executable, "-m", "cedm_ray.search", *TINY, "--storage-path", str(storage), *flags])


def record(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("store/trials/*/trial.json")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def rungs(storage: Path) -> dict[int, tuple[float, float]]:
    return {rung["kimg"]: (rung["loss"], rung["score"]) for rung in record(storage)["rungs"]}


def test_once_during_embedding_finishes_it_and_starts_nothing_more(storage: Path) -> None:
    session = start(storage)
    session.until("embedding 1,797 images")
    session.press_ctrl_c()
    status, seconds = session.end()
    assert status == 130, session.text[-3000:]
    assert "stopping: waits for" in session.text and "Ctrl-C again stops now" in session.text
    assert "stopped after the current checkpoints; go on with: python -m cedm_ray.search" in session.text
    assert "preparing the score" not in session.text and "Traceback" not in session.text
    assert list(storage.glob("store/embeddings/*/facts.json")) and not session.left_processes()
    print(f"once during embedding: ended {seconds:.1f} s later")


def test_once_during_a_training_ends_at_its_next_rung(storage: Path) -> None:
    session = start(storage)
    session.until(TRAINING)
    session.press_ctrl_c()
    status, seconds = session.end()
    assert status == 130, session.text[-3000:]
    assert "stopping: waits for C=" in session.text and "left at 12 kimg" in session.text
    assert "Traceback" not in session.text and session.said.rindex("\x1b[?25h") > session.said.rindex("\x1b[?25l")
    assert record(storage)["state"] == "running" and list(rungs(storage)) == [12]
    assert not session.left_processes()
    print(f"once during a training: ended {seconds:.1f} s later, at its rung")


def test_twice_ends_now(storage: Path) -> None:
    session = start(storage)
    session.until(TRAINING)
    session.press_ctrl_c()
    session.until("stopping: waits for C=")
    session.press_ctrl_c()
    status, seconds = session.end()
    assert status == 130, session.text[-3000:]
    assert "stopped; go on with: python -m cedm_ray.search" in session.text and "Traceback" not in session.text
    assert list(rungs(storage)) in ([12], [12, 24])  # it may just have come to its rung
    left = session.left_processes()
    print(f"twice: ended {seconds:.1f} s later")
    assert not left and seconds < NOW_S + 20  # a busy machine is late


def test_sigterm_ends_within_the_grace_of_batch_systems(storage: Path) -> None:
    session = start(storage)
    session.until(TRAINING)
    session.processes = below(session.pid)
    os.kill(session.pid, signal.SIGTERM)
    status, seconds = session.end()
    assert status == 130 and "go on with: python -m cedm_ray.search" in session.text, session.text[-3000:]
    print(f"SIGTERM: ended {seconds:.1f} s later")
    assert not session.left_processes() and seconds < TERM_GRACE_S + NOW_S + 20


def test_the_printed_command_goes_on_and_the_result_is_that_of_an_undisturbed_search(
    storage: Path, tmp_path: Path
) -> None:
    before = rungs(storage)
    session = start(storage)
    session.until("starting Ray")
    session.press_ctrl_c()
    status, _ = session.end()
    found = GO_ON.search(session.text.strip())
    assert status == 130 and found is not None
    printed = shlex.split(found.group(1))
    assert printed[:3] == ["python", "-m", "cedm_ray.search"] and str(storage) in printed
    last = Session([sys.executable, *printed[1:]])
    assert last.end(600)[0] == 0, last.text[-3000:]
    assert "best C" in last.text and record(storage)["state"] == "complete"
    after = rungs(storage)
    assert {kimg: after[kimg] for kimg in before} == before and list(after) == [12, 24, 36, 37]
    undisturbed = start(tmp_path / "runs", "--plain")
    assert undisturbed.end(600)[0] == 0, undisturbed.text[-3000:]
    assert rungs(tmp_path / "runs") == after
    assert "\x1b[?25l" not in undisturbed.said and "\x1b[2K" not in undisturbed.said
