"""Disks that are full or read-only: recognised whoever met them, said in one line, and nothing stored is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from cedm_ray.errors import UserError
from cedm_ray.report.write import write_page
from cedm_ray.stages.checkup.storage import storage_finding
from cedm_ray.stages.storage.disk_faults import DiskFaultError, StorageError, fault_in_text, find_fault
from cedm_ray.stages.storage.storage_errors import Disk, Need, told_clearly, written_to
from cedm_ray.stages.storage.store import Store, prepare_storage, read_json, write_json

LINE = (
    r"the storage {} is full: {} needs (about [\d.,]+ [kMG]B, [\d.,]+ [kMG]B are free|more than the [\d.,]+ [kMG]B "
    r"that are free); make room or give another --storage-path; the same command goes on"
)
NOISE = np.random.default_rng(0).integers(0, 256, 1_440_000, dtype=np.uint8)


def line(storage: Path, what: str) -> str:
    return LINE.format(re.escape(str(storage)), re.escape(what)) + "$"


@pytest.fixture
def small(small_disk: Any) -> Any:
    return small_disk("1m")


@pytest.fixture
def disk(small: Any) -> Path:
    return Path(small.path)


def arrow_copy(path: Path) -> None:
    """As Ray Train copies a checkpoint to its place."""
    source = path.parent.parent / "source.bin"
    source.write_bytes(NOISE.tobytes())
    pyarrow.fs.copy_files(str(source), str(path))


def database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.execute("INSERT INTO t VALUES (?)", (NOISE.tobytes(),))


def text(path: Path) -> None:
    with open(path, "w") as file:
        json.dump(NOISE.tolist(), file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(NOISE.tobytes()),
    "json": text,
    "numpy": lambda path: np.save(path, NOISE),
    "npz": lambda path: np.savez(path, noise=NOISE),
    "safetensors": lambda path: save_file({"noise": torch.from_numpy(NOISE)}, path),
    "parquet": lambda path: pq.write_table(pa.table({"noise": NOISE}), path, compression="none"),
    "arrow": arrow_copy,
    "sqlite": database,
    "png": lambda path: Image.fromarray(NOISE.reshape(1200, 1200)).save(path, "png"),
    "folder": lambda path: [(path / str(i)).mkdir(parents=True) for i in range(100_000)],
}


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "folder"])
def test_a_full_disk_is_recognised_whoever_writes_to_it(disk: Path, name: str) -> None:
    with pytest.raises(Exception) as raised:
        WRITERS[name](disk / "new")
    fault = find_fault(raised.value)
    assert fault is not None and fault.kind == "full", repr(raised.value)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "sqlite"])  # see the test after this one
def test_a_read_only_disk_is_recognised_whoever_writes_to_it(small: Any, disk: Path, name: str) -> None:
    small.close()
    with pytest.raises(Exception) as raised:
        WRITERS[name](disk / "new")
    fault = find_fault(raised.value)
    assert fault is not None and fault.kind == "read-only", repr(raised.value)


def test_a_database_on_a_disk_that_has_become_read_only_is_recognised(small: Any, disk: Path) -> None:
    with sqlite3.connect(disk / "old") as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    small.close()
    with pytest.raises(sqlite3.Error) as raised, sqlite3.connect(disk / "old") as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    fault = find_fault(raised.value)
    assert fault is not None and fault.kind == "read-only", repr(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("28 is not a number"), FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/a.png"),
        MemoryError(), RuntimeError("CUDA error: an illegal memory access"), UserError("dataset 'x' is unknown"),
        OSError(errno.EIO, "Input/output error"), ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)  # fmt: skip
def test_other_errors_are_left_alone(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, told_clearly(tmp_path, lambda: Need("it", 1)):
        raise error
    assert raised.value is error


def test_a_file_that_is_closed_to_the_user_concerns_the_storage_only_inside_it(tmp_path: Path) -> None:
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "store" / "x"))
    with pytest.raises(StorageError, match=f"{tmp_path}/store/x is closed to this user; see to its rights or give"), \
            told_clearly(tmp_path, lambda: Need("it", 1)):  # fmt: skip
        raise inside
    weights = PermissionError(errno.EACCES, "Permission denied", "/models/weights.pt")
    with pytest.raises(PermissionError), told_clearly(tmp_path, lambda: Need("it", 1)):
        raise weights


def test_an_error_is_found_behind_what_it_was_wrapped_in() -> None:
    from ray.exceptions import RayTaskError

    full = OSError(errno.ENOSPC, "No space left on device", "/runs/a")
    try:
        try:
            raise full
        except OSError:
            raise RuntimeError("the run failed")  # noqa: B904  Tune wraps what its callbacks raise like this
    except RuntimeError as error:
        wrapped = error
    task = RayTaskError("write", "Traceback ...", full).as_instanceof_cause()
    group = RuntimeError("workers failed")
    group.worker_failures = {0: task}  # type: ignore[attr-defined]
    for error in (wrapped, task, group):
        fault = find_fault(error)
        assert fault is not None and (fault.kind, fault.path) == ("full", Path("/runs/a"))
    line = "the storage /r is full; make room"
    trace = f"Traceback\n  raise StorageError(\ncedm_ray.stages.storage.disk_faults.StorageError: {line}\n"
    fault = find_fault(RayTaskError("write", trace, StorageError(line)).as_instanceof_cause())
    assert fault is not None and fault.said == line


def test_an_error_is_found_in_the_traceback_of_another_process() -> None:
    told = "the storage /r is full: a checkpoint of C=17 needs about 2 GB, 1 GB are free; make room"
    text = f"Traceback:\n  File 'x'\nOSError: [Errno 28] No space left on device\nray...(StorageError): a\n" \
           f"cedm_ray.stages.storage.disk_faults.StorageError: {told}\n"  # fmt: skip
    fault = fault_in_text(text)
    assert fault is not None and fault.said == told
    message = OSError(errno.ENOSPC, "No space left on device", "Failed to apply UDF\nafter 1/1 attempts")  # Ray Data
    fault = find_fault(message)
    assert fault is not None and (fault.kind, fault.path) == ("full", None)
    fault = fault_in_text("OSError: [Errno 30] Read-only file system: '/r/store/x'\nmore")
    assert fault is not None and (fault.kind, fault.path) == ("read-only", Path("/r/store/x"))
    assert fault_in_text("ValueError: 3 requested") is None


def test_the_line_says_path_size_room_and_way_out(small: Any, disk: Path) -> None:
    small.fill(100_000)
    said = line(disk, "the rest of the search").replace(r"[\d.,]+ [kMG]B, ", "5.0 GB, ")
    need = Need("the rest of the search", 5 * 10**9)
    with pytest.raises(StorageError, match=said), told_clearly(disk, lambda: need):
        (disk / "x").write_bytes(NOISE.tobytes())
    (disk / "x").unlink()
    with pytest.raises(StorageError, match=line(disk, "a checkpoint of C=17")):
        Disk.storage(disk).check(Need("a checkpoint of C=17", 200_000))
    Disk.storage(disk).check(Need("a checkpoint of C=17", 50_000))
    said = f"the storage {disk} has reached its quota: it needs about 5 kB; make room"
    with pytest.raises(StorageError, match=said), told_clearly(disk, lambda: Need("it", 5_000)):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_full_folder_for_temporary_files_is_named_and_not_the_storage(disk: Path) -> None:
    said = rf"the folder for temporary files {disk} on .* is full: x needs .*; make room or set TMPDIR"
    with pytest.raises(StorageError, match=said), written_to(Disk.temporary(disk), Need("x", 1_000_000)):
        save_file({"noise": torch.from_numpy(NOISE)}, disk / "state.safetensors")
    with pytest.raises(StorageError, match=f"the folder {disk} on .* is full"), \
            told_clearly(Path("/elsewhere"), lambda: Need("x", 10**9)):  # fmt: skip
        raise OSError(errno.ENOSPC, "No space left on device", str(disk / "spilled"))


def test_an_entry_of_the_store_that_does_not_fit_leaves_the_others_whole_and_nothing_behind(
    small: Any, disk: Path
) -> None:
    store = Store(disk / "store")
    first, second = store.path("things", {"n": 1}), store.path("things", {"n": 2})
    with store.create(first, {"n": 1}, {}) as scratch:
        (scratch / "x").write_bytes(NOISE[:500_000].tobytes())
    for _ in range(2):
        with pytest.raises(OSError), store.create(second, {"n": 2}, {}) as scratch:
            (scratch / "x").write_bytes(NOISE.tobytes())
        assert store.facts(first) is not None and store.facts(second) is None
        assert (first / "x").read_bytes() == NOISE[:500_000].tobytes()
        assert [entry.name for entry in first.parent.iterdir()] == [first.name]
    # Full when the facts are written: no entry without them.
    with pytest.raises(OSError), store.create(second, {"n": 2}, {}) as scratch:
        (scratch / "x").write_bytes(b"x")
        small.fill(0)
    assert store.facts(second) is None and store.facts(first) is not None
    small.make_room()
    with store.create(second, {"n": 2}, {}) as scratch:
        (scratch / "x").write_bytes(b"x")
    assert store.facts(second) is not None


def test_json_and_figures_that_do_not_fit_leave_the_old_ones_as_they_were(small: Any, disk: Path) -> None:
    write_json(disk / "a.json", {"a": 1})
    figure = Figure()
    figure.subplots().plot([1, 2])
    for page, name in ((figure, "a.png"), ("a table", "a.md"), (Image.new("L", (50, 50)), "b.png")):
        write_page(page, disk / name)
    before = {file.name: file.read_bytes() for file in disk.iterdir()}
    small.fill(0)
    with pytest.raises(OSError):
        write_json(disk / "a.json", {"a": list(range(100_000))})
    for name in ("a.png", "a.md", "b.png"):
        with pytest.raises(OSError):
            write_page(
                figure if name == "a.png" else "x" * 10**6 if name == "a.md" else Image.new("L", (9, 9)), disk / name
            )
    assert {file.name: file.read_bytes() for file in disk.iterdir() if file.name != "filler"} == before
    small.make_room()
    write_json(disk / "a.json", {"a": 2})
    assert read_json(disk / "a.json") == {"a": 2}


def test_a_storage_path_that_is_full_or_read_only_is_refused_in_one_line(small: Any, disk: Path) -> None:
    small.fill(8192)
    finding = storage_finding(disk, lambda: Need("the rest of the search", 10**8))
    assert finding.level == "fail"
    assert re.match(line(disk, "the rest of the search"), f"{finding.text}; {finding.fix}")
    small.make_room()
    small.close()
    said = f"the storage {disk} is read-only: what a search stores cannot be written; make it writable or give another "
    with pytest.raises(UserError, match=said):
        prepare_storage(disk)
    finding = storage_finding(disk)
    assert finding.level == "fail" and re.match(said, f"{finding.text}; {finding.fix}")


def _gather(folder: Path, out: Path) -> None:
    from cedm_ray.stages.inputs.embed import gather

    with pytest.raises(OSError) as raised:
        gather(folder, out, 1_000)
    os._exit(100 + (raised.value.errno == errno.ENOSPC))


def test_an_array_that_is_mapped_into_memory_does_not_kill_the_process_when_the_disk_is_full(
    disk: Path, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(1_000, 2_000)).astype(np.float32)  # 8 MB onto 1 MB
    table = pa.table({"index": np.arange(1_000), "embedding": pa.FixedSizeListArray.from_arrays(values.ravel(), 2_000)})
    pq.write_table(table, tmp_path / "a.parquet")
    child = multiprocessing.get_context("fork").Process(target=_gather, args=(tmp_path, disk / "values.npy"))
    child.start()
    child.join(60)
    assert child.exitcode == 101  # -7 where the kernel has killed it


@pytest.mark.parametrize("event", ["on_trial_recover", "on_trial_error"])
def test_a_trial_that_met_a_full_disk_ends_the_run_and_is_not_written_down_as_failed(
    tmp_path: Path, event: str
) -> None:
    from cedm_ray.stages.training.storage_watch import StorageWatch

    told = Mock()
    watch = StorageWatch(tmp_path, told)
    file = tmp_path / "error.txt"
    trial: Any = SimpleNamespace(error_file=str(file))
    file.write_text("Traceback\nValueError: loss is nan\n")
    getattr(watch, event)(0, [], trial)
    assert getattr(told, event).called
    told.reset_mock()
    file.write_text(
        "Traceback\nSafetensorError: Error while serializing: I/O error: No space left on device (os error 28)\n"
    )
    with pytest.raises(DiskFaultError) as raised:
        getattr(watch, event)(0, [], trial)
    assert not told.mock_calls and raised.value.fault.kind == "full"


def test_a_record_that_could_not_be_written_when_a_trial_was_over_ends_the_run_at_the_next_step(tmp_path: Path) -> None:
    from cedm_ray.stages.training.storage_watch import StorageWatch

    told = Mock()
    watch = StorageWatch(tmp_path, told)
    watch.on_step_end(0, [])
    told.on_trial_complete.side_effect = OSError(errno.ENOSPC, "No space left on device")
    watch.on_trial_complete(0, [], Mock())  # Tune would swallow it here
    with pytest.raises(OSError, match="No space left"):
        watch.on_step_end(0, [])
    told.on_trial_complete.side_effect = RuntimeError("no disk")
    with pytest.raises(RuntimeError):
        watch.on_trial_complete(0, [], Mock())
