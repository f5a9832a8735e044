"""What listens where while Ray runs as a search starts it, and who is let in."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
import ray  # noqa: F401  brings psutil

from cedm_ray.config import load
from cedm_ray.errors import UserError
from cedm_ray.stages.checkup.ports import Listener
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.cluster.joining import knock

SERVE = """
import json, sys
from cedm_ray.config import load
from cedm_ray.stages.cluster.connection import connected
with connected(load(["--resources.num-workers", "1"])):
    import ray
    from ray._private.worker import global_worker
    from ray.util.state import list_nodes
    seen = ray.get(ray.remote(lambda: [node.node_ip for node in list_nodes()]).remote())
    print(json.dumps([ray.get_runtime_context().gcs_address, global_worker.node.webui_url, seen]), flush=True)
    sys.stdin.read()
"""
MEET = """
import json, os, sys
from multiprocessing import get_context
import torch
import torch.distributed as dist
from cedm_ray.stages.training import process_group as group
import psutil, ray
ray.util.get_node_ip_address = lambda: sys.argv[1]

def rank(number, host, port, out):
    group._meet("gloo", host, port, number, 2, 60)
    tensor = torch.tensor([float(number + 1)])
    dist.all_reduce(tensor)
    open_here = [each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    said = [group.broadcast_text(text, tensor.device) for text in (("/a folder/ü", "")[number], ("", "/b")[number])]
    dist.barrier()
    out.put((float(tensor), open_here, said))

if __name__ == "__main__":
    host, port = group._listen()
    context = get_context("fork")
    out = context.Queue()
    other = context.Process(target=rank, args=(1, host, port, out))
    other.start()
    rank(0, host, port, out)
    other.join()
    print(json.dumps([out.get(), out.get()]))
"""


@dataclass(frozen=True)
class Running:
    """A Ray of its own process."""

    pid: int
    gcs: str
    dashboard: str
    token: str
    nodes: tuple[str, ...]
    """Addresses of the nodes, as a process of a trial finds them through the dashboard."""

    def listeners(self) -> list[Listener]:
        import psutil

        first = psutil.Process(self.pid)
        found = []
        for process in (first, *first.children(recursive=True)):
            try:
                found += [
                    Listener(process.name(), each.laddr.ip, each.laddr.port)
                    for each in process.net_connections("inet")
                    if each.status == psutil.CONN_LISTEN
                ]
            except psutil.Error:  # ended meanwhile
                continue
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")} | {
        "HOME": str(home)
    }
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin is not None and server.stdout is not None
        try:
            gcs, dashboard, seen = json.loads(server.stdout.readline())
            yield Running(server.pid, gcs, dashboard, (home / ".ray" / "auth_token").read_text(), tuple(seen))
        finally:
            server.stdin.close()


def status(url: str, token: str | None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.ray
def test_nothing_of_a_local_search_can_be_reached_from_another_machine(running: Running) -> None:
    assert running.nodes == ("127.0.0.1",)  # so Train learns there that a stopped trial's placement group is free
    found = running.listeners()
    programs = {each.program for each in found}
    assert {"gcs_server", "raylet"} <= programs and any("Dashboard" in name for name in programs), programs
    assert len(found) >= 6 and [str(each) for each in found if each.outside] == []


@pytest.mark.ray
def test_the_jobs_api_and_the_cluster_itself_refuse_who_lacks_the_token(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = f"http://{running.dashboard}/api/jobs/"
    assert [status(jobs, token) for token in (None, "wrong", running.token)] == [401, 403, 200]
    # Without the switch that a local search sets Ray looks for 127.0.0.1 under this machine's own address.
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": running.token}
    knock(running.gcs, right)
    file = tmp_path / "token"
    file.write_text(running.token + "\n")
    knock(running.gcs, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)})
    for environment in ({}, {"RAY_AUTH_TOKEN": running.token}, {**right, "RAY_AUTH_TOKEN": "wrong"}):
        with pytest.raises(PermissionError, match="token"):
            knock(running.gcs, environment)
    # And as a search meets it: one line, at once.
    for name, value in {"RAY_ADDRESS": running.gcs, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="lets nobody in without its token") as caught, connected(load([])):
        pass
    assert "wrong" not in str(caught.value) and running.token not in str(caught.value)
    file.chmod(0o600)
    assert not Path(f"/proc/{running.pid}").joinpath("cmdline").read_bytes().count(running.token.encode())


@pytest.fixture(scope="module")
def ranks() -> list[tuple[float, list[str], list[str]]]:
    """Of each of two processes that met: the sum of both, the addresses at which it listened, what rank 0 told it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEET, "127.0.0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [(total, addresses, said) for total, addresses, said in json.loads(done.stdout)]


def test_the_processes_of_a_training_meet_at_the_address_of_their_node(
    ranks: list[tuple[float, list[str], list[str]]],
) -> None:
    assert [total for total, *_ in ranks] == [3.0, 3.0]
    addresses = [each for _, here, _ in ranks for each in here]
    assert len(addresses) >= 3 and all(ip_address(each).is_loopback for each in addresses), addresses


def test_what_the_first_process_says_comes_to_all(ranks: list[tuple[float, list[str], list[str]]]) -> None:
    assert [said for *_, said in ranks] == [["/a folder/ü", ""]] * 2
