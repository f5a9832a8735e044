import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cedm_ray.errors import UserError
from cedm_ray.stages.storage.lock import owned

HOLD = """
import sys, time
from pathlib import Path
from cedm_ray.stages.storage.lock import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_driver_is_told_the_first_one_s_host_and_process(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    try:
        whose = rf"{tmp_path} belongs to the search of process {holder.pid} on {socket.gethostname()}, which runs since"
        with pytest.raises(UserError, match=whose), owned(tmp_path):
            pass
        with pytest.raises(UserError, match=whose), owned(tmp_path):  # being refused frees nothing
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_driver_leaves_the_folder_free(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / "driver.lock").read_text()
    with owned(tmp_path):  # and so does one that has ended
        pass


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"pid": 1}', "[" * 100_000, "\x1b"])
def test_a_lock_file_that_says_nothing_still_locks(tmp_path: Path, content: str) -> None:
    holder = hold(tmp_path)
    try:
        (tmp_path / "driver.lock").write_text(content)
        with pytest.raises(UserError, match="belongs to another search that runs"), owned(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be locked \(No locks available\)"), owned(tmp_path):
        pass
