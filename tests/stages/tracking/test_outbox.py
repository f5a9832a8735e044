import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.stages.tracking import outbox as module
from cedm_ray.stages.tracking.outbox import Operation, OutageError, Outbox, RefusedError, read_journal

Send = Callable[[Operation, bool], Mapping[str, Any]]


class Server:
    """Takes operations while it is up."""

    def __init__(self) -> None:
        self.up, self.taken, self.unsure, self.said = True, list[str](), list[bool](), list[str]()

    def send(self, operation: Operation, unsure: bool) -> dict[str, Any]:
        if not self.up:
            raise OutageError("connection refused")
        if operation.kind == "bad":
            raise RefusedError("no such metric")
        self.taken.append(operation.body["text"])
        self.unsure.append(unsure)
        return {}


def opened(file: Path, server: Server, store: str = "a", send: Send | None = None) -> Outbox:
    box = Outbox(file, store, send or server.send, server.said.append)
    box.start()
    return box


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "outbox.jsonl"


def test_what_was_put_during_an_outage_arrives_in_order_with_one_line_at_each_end_of_it(file: Path) -> None:
    server = Server()
    box = opened(file, server)
    box.put("text", "run", {"text": "0"})
    assert box.flush(10) == 0
    server.up = False
    for number in range(1, 5):
        box.put("text", "run", {"text": str(number)})
    assert box.flush(0.2) == 4
    server.up = True
    assert box.close(10) == 0
    assert server.taken == ["0", "1", "2", "3", "4"]
    assert server.said == [
        f"MLflow does not answer (connection refused); what is for it is kept in {file}",
        "MLflow answers again; 4 waiting operations are delivered",
    ]


def test_an_operation_is_on_disk_before_it_is_tried(file: Path) -> None:
    found: list[list[Operation]] = []

    def send(operation: Operation, unsure: bool) -> dict[str, Any]:
        found.append(read_journal(file).waiting())
        assert found[-1] == [operation]
        return {}

    box = opened(file, Server(), send=send)
    box.put("text", "run", {"text": "a", "value": float("inf")})
    assert box.close(10) == 0 and len(found) == 1
    assert file.stat().st_mode & 0o077 == 0


def test_putting_does_not_wait_for_a_server_that_hangs_and_closing_waits_no_longer_than_told(file: Path) -> None:
    hung = threading.Event()

    def send(operation: Operation, unsure: bool) -> dict[str, Any]:
        hung.wait(30)
        return {}

    box = opened(file, Server(), send=send)
    began = time.monotonic()
    for number in range(20):
        box.put("text", "run", {"text": str(number)})
    assert box.close(0.3) == 20
    assert 0.3 <= time.monotonic() - began < 10
    hung.set()
    assert len(read_journal(file).waiting()) == 20  # what arrives after the end is not claimed
    with pytest.raises(ValueError, match="is closed"):
        box.put("text", "run", {"text": "late"})


def test_the_next_process_delivers_the_rest_and_knows_that_it_may_have_arrived(file: Path) -> None:
    server = Server()
    box = opened(file, server)
    box.put("text", "run", {"text": "a"})
    assert box.flush(10) == 0
    server.up = False
    box.put("text", "run", {"text": "b"})
    assert box.close(0.1) == 1
    server.up = True
    box = opened(file, server)
    box.put("text", "run", {"text": "c"})
    assert box.close(10) == 0
    assert server.taken == ["a", "b", "c"] and server.unsure == [False, True, False]
    assert read_journal(file).waiting() == []


def test_what_failed_once_may_have_arrived(file: Path) -> None:
    server = Server()
    server.up = False
    box = opened(file, server)
    box.put("text", "run", {"text": "a"})
    box.flush(0.1)
    server.up = True
    assert box.close(10) == 0 and server.unsure == [True]


def test_a_refused_operation_is_set_aside_and_said(file: Path) -> None:
    server = Server()
    box = opened(file, server)
    for kind, text in (("bad", "a"), ("text", "b")):
        box.put(kind, "C=7", {"text": text})
    assert box.close(10) == 0 and server.taken == ["b"]
    assert server.said == ["MLflow refuses bad of C=7: no such metric"]
    assert opened(file, server).close(10) == 0 and server.taken == ["b"]


@pytest.mark.parametrize("torn", ['{"number": 2, "kind": "te', "\xff", '{"done": 1', "[]", '{"number": 2}'])
def test_a_torn_last_line_counts_for_nothing_and_harms_no_other(file: Path, torn: str) -> None:
    server = Server()
    box = opened(file, server)
    box.put("text", "run", {"text": "a"})
    assert box.close(10) == 0
    with file.open("ab") as handle:
        handle.write(torn.encode("latin-1"))
    server.up = False
    box = opened(file, server)
    box.put("text", "run", {"text": "b"})
    box.close(0.05)
    assert [op.body["text"] for op in read_journal(file).waiting()] == ["b"]


def test_a_full_disk_is_told_to_the_caller_and_leaves_the_journal_whole(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    box = opened(file, server)
    box.put("text", "run", {"text": "a"})
    assert box.flush(10) == 0
    before = file.read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 9:
            return write(descriptor, data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            box.put("text", "run", {"text": "exactly so long that nine bytes at a time leave a rest to be written"})
    assert file.read_bytes() == before
    box.put("text", "run", {"text": "c"})
    assert box.close(10) == 0 and server.taken == ["a", "c"]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_another_store_gets_what_waits_and_not_what_the_first_one_has(file: Path) -> None:
    first, second = Server(), Server()
    box = opened(file, first)
    box.put("text", "run", {"text": "a"})
    assert box.flush(10) == 0
    first.up = False
    box.put("text", "run", {"text": "b"})
    box.close(0.05)
    box = opened(file, second, store="b")
    assert box.journal.elsewhere == {1} and box.journal.receipts == {}
    assert box.close(10) == 0 and second.taken == ["b"]
    assert opened(file, first).close(10) == 0 and first.taken == ["a"]


def test_the_pauses_grow_from_one_second_to_sixty(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 1.0)
    server, pauses = Server(), list[float]()
    server.up = False
    box = Outbox(file, "a", server.send, server.said.append)

    class Clock:
        def wait(self, pause_s: float) -> bool:
            pauses.append(pause_s)
            server.up = len(pauses) == 9
            return False

        def set(self) -> None: ...

    box._hurry = Clock()  # type: ignore[assignment]
    box.start()
    box.put("text", "run", {"text": "a"})
    assert box.close(10) == 0
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


KILLED = """
import sys
from pathlib import Path
from cedm_ray.stages.tracking.outbox import Outbox

folder = Path(sys.argv[1])
server = (folder / "server").open("a+")

def send(operation, unsure):
    text = f"{operation.body['n']}\\n"
    server.seek(0)
    if not (unsure and text in server.readlines()):
        server.write(text)
        server.flush()
    return {}

box = Outbox(folder / "outbox.jsonl", "a", send, print)
box.start()
known = {operation.body["n"] for operation in box.journal.operations.values()}
print("begun", flush=True)
for n in range(3000):
    if n not in known:
        box.put("text", "run", {"n": n})
"""


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
            time.sleep(moments.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
    waiting = read_journal(tmp_path / "outbox.jsonl").operations
    taken = (tmp_path / "server").read_text().split() if (tmp_path / "server").exists() else []

    def send(operation: Operation, unsure: bool) -> dict[str, Any]:
        if not (unsure and str(operation.body["n"]) in taken):
            taken.append(str(operation.body["n"]))
        return {}

    assert opened(tmp_path / "outbox.jsonl", Server(), send=send).close(20) == 0
    assert waiting and taken == [str(n) for n in range(len(waiting))]
