import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cedm_ray.errors import UserError
from cedm_ray.stages.lock import owned

HOLD = """
import sys, time
from pathlib import Path
from cedm_ray.stages.lock import owned
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
