import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cedm_ray.stages.storage.leftovers import OLD_S, remove_leftovers
from cedm_ray.stages.storage.store import Store

INPUTS = {"what": "numbers"}
KILLED = """
import sys, time
from pathlib import Path
from cedm_ray.stages.storage.store import Store
store = Store(Path(sys.argv[1]))
with store.create(store.path("embeddings", {"what": "numbers"}), {"what": "numbers"}, {}) as scratch:
    (scratch / "numbers.npy").write_bytes(bytes(1000))
    print("written", flush=True)
    time.sleep(600)
"""


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A store in which a process was killed that made an entry."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    return tmp_path


def test_what_a_killed_process_left_is_removed_when_nobody_can_be_at_it(killed: Path) -> None:
    (scratch,) = (killed / "embeddings").iterdir()
    assert remove_leftovers(killed) == (0, 0) and (scratch / "numbers.npy").is_file()
    age(scratch, OLD_S + 60)
    number, size = remove_leftovers(killed)
    assert number == 1 and size >= 1000 and list((killed / "embeddings").iterdir()) == []


def test_an_old_folder_into_which_somebody_writes_stays(killed: Path) -> None:
    (scratch,) = (killed / "embeddings").iterdir()
    age(scratch, OLD_S + 60)
    (scratch / "numbers.npy").write_bytes(bytes(2000))
    age_of_folder = time.time() - OLD_S - 60
    os.utime(scratch, (age_of_folder, age_of_folder))
    assert remove_leftovers(killed) == (0, 0) and scratch.is_dir()


def test_entries_and_what_was_set_aside_stay_however_old_they_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("embeddings", INPUTS)
    with store.create(path, INPUTS, {}) as scratch:
        (scratch / "numbers.npy").write_bytes(bytes(1000))
    for name in (f"{path.name}.torn-1", ".hidden", ".a-folder.of-somebody"):
        (path.parent / name).mkdir()
    age(tmp_path, 10 * OLD_S)
    assert remove_leftovers(tmp_path) == (0, 0)
    assert store.facts(path) is not None and len(list(path.parent.iterdir())) == 4


def test_a_store_that_is_not_there_yet_has_nothing_left(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "store") == (0, 0)
