"""What a search makes is for its user alone, and what it says of strangers' names is harmless."""

import os
import pickle
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cedm_ray.errors import UserError, printable
from cedm_ray.stages.storage.store import for_this_user, prepare_storage


@pytest.fixture(autouse=True)
def usual_mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_storage_folder_that_is_made_is_private_and_one_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    assert mode(prepare_storage(tmp_path / "shared")) == 0o755
    assert mode(prepare_storage(tmp_path / "a" / "b")) == 0o700


def test_files_and_folders_are_private_also_those_of_processes_that_are_started_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(KeyError), for_this_user():
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        subprocess.run(["mkdir", str(tmp_path / "child")], check=True)
        raise KeyError
    assert [mode(tmp_path / name) for name in ("folder", "file", "child")] == [0o700, 0o600, 0o700]
    (tmp_path / "later").touch()
    assert mode(tmp_path / "later") == 0o644


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode and 漢字 \\ too", "plain, ünïcode and 漢字 \\ too"),
        ("a\x1b[31m\r\nb\x07\x9b", "a\\x1b[31m\\r\\nb\\x07\\x9b"),
        ("exe\u202egnp.\u2066\u200b", "exe\\u202egnp.\\u2066\\u200b"),
        ("\udcff\U000e0001", "\\udcff\\U000e0001"),
    ],
)
def test_an_error_is_one_line_that_steers_no_terminal(text: str, shown: str) -> None:
    error = UserError(f"{text} is wrong")
    assert str(error) == f"{shown} is wrong" and printable(printable(text)) == shown
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes back from a task
