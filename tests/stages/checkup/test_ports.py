"""Ports that processes of this test really listen on, and token files with the modes that they really have."""

import socketserver
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cedm_ray.stages.checkup.ports import (
    Listener,
    jobs_finding,
    listeners,
    port_finding,
    program_of,
    token_finding,
)

LISTEN = """
import socket, sys
servers = [socket.create_server((host, 0)) for host in ("0.0.0.0", "127.0.0.1")]
print(*(each.getsockname()[1] for each in servers), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def mlflow() -> Iterator[tuple[int, int]]:
    """A process that looks like MLflow's: its port on all addresses, and the one on loopback."""
    command = [sys.executable, "-c", LISTEN, "mlflow", "server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        outside, inside = map(int, process.stdout.readline().split())
        yield outside, inside
        process.stdin.close()


def test_listening_ports_are_found_with_their_program(mlflow: tuple[int, int]) -> None:
    found = {each.port: each for each in listeners("no-such-session")}
    outside, inside = (found[port] for port in mlflow)
    assert (outside.program, outside.host, outside.outside) == ("MLflow", "0.0.0.0", True)
    assert (inside.program, inside.host, inside.outside) == ("MLflow", "127.0.0.1", False)
    assert {each.program for each in found.values()} <= {"MLflow", "driver"}  # Ray's are of no such session


@pytest.mark.parametrize(
    ("host", "outside"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("::ffff:127.0.0.1", False),
     ("::ffff:10.0.0.2", True), ("0.0.0.0", True), ("::", True), ("192.168.0.2", True)],
)  # fmt: skip
def test_loopback_has_several_spellings(host: str, outside: bool) -> None:
    assert Listener("raylet", host, 1).outside == outside


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["/v/ray/core/src/ray/gcs/gcs_server", "--log_dir=/tmp/ray"], "GCS"),
        (["/v/ray/core/src/ray/raylet/raylet", "--agent=python /v/ray/dashboard/agent.py /v/dashboard.py"], "raylet"),
        (["python", "-u", "/v/ray/dashboard/dashboard.py", "--host=127.0.0.1"], "dashboard"),
        (["python", "/v/ray/dashboard/dashboard.py"], "dashboard"),
        (["python", "-u", "/v/ray/autoscaler/_private/monitor.py"], "monitor"),
        (["ray::DashboardAgent", ""], "agent"),
        (["ray::look", ""], "worker"),
        (["/v/bin/python", "/v/bin/mlflow", "server"], "MLflow"),
        (["python", "-m", "cedm_ray.search"], "driver"),
        (["python", "-m", "http.server"], None),
        ([], None),
    ],
)
def test_programs_are_known_by_their_command_lines(command: list[str], program: str | None) -> None:
    assert program_of(command) == program


@contextmanager
def silent() -> Iterator[int]:
    """A port that closes every connection, as a gRPC server does with what is not of its kind."""
    with socketserver.TCPServer(("0.0.0.0", 0), socketserver.BaseRequestHandler) as served:
        thread = Thread(target=served.serve_forever)
        thread.start()
        try:
            yield int(served.server_address[1])
        finally:
            served.shutdown()
            thread.join()


def test_ports_beyond_loopback_that_answer_without_a_token_are_told(web_server: Any) -> None:
    guarded, metrics = (web_server(status, host="0.0.0.0").port for status in (401, 200))
    with silent() as rpc:
        well = [Listener("agent", "0.0.0.0", guarded), Listener("GCS", "0.0.0.0", rpc)]
        finding = port_finding(well, token=True)
        assert finding.level == "ok" and finding.text.startswith("2 beyond loopback (agent, GCS)")
        finding = port_finding(well, token=False)
        assert finding.level == "warn" and finding.text.endswith(f"by GCS on port {rpc}")
        assert "RAY_AUTH_MODE=token" in finding.fix
        finding = port_finding([*well, Listener("MLflow", "0.0.0.0", metrics)], token=True)
        assert finding.level == "warn" and finding.text.endswith(f"by MLflow on port {metrics}")
        assert "127.0.0.1" in finding.fix


def test_ports_on_loopback_are_well_and_are_left_alone(web_server: Any) -> None:
    server = web_server()
    assert port_finding([Listener("MLflow", "127.0.0.1", server.port)], token=False).level == "ok"
    assert server.asked == []


def test_many_open_ports_are_counted() -> None:
    many = [Listener("worker", "0.0.0.0", 1 + number) for number in range(9)]  # nobody answers there
    assert port_finding(many, token=False).text.endswith("worker on port 4 and 5 more")


@pytest.mark.parametrize(
    ("status", "content_type", "level"),
    [
        (401, "text/plain", "ok"),
        (403, "text/plain", "ok"),
        (200, "application/json", "warn"),
        (200, "text/plain", None),
    ],
)
def test_the_jobs_api_is_tried_without_the_token(
    status: int, content_type: str, level: str | None, web_server: Any
) -> None:
    server = web_server(status, content_type)
    others = [Listener("dashboard", "127.0.0.1", 9), Listener("GCS", "127.0.0.1", server.port)]
    finding = jobs_finding([*others, Listener("dashboard", "127.0.0.1", server.port)])
    assert server.asked == ["GET /api/jobs/"] and server.tokens == [None]
    assert (finding.level if finding else None) == level


@pytest.fixture
def token(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    file = tmp_path / ".ray" / "auth_token"
    file.write_text("secret")
    file.chmod(0o600)
    return file


def test_a_token_that_others_may_read_is_told_with_its_mode_and_never_itself(tmp_path: Path, token: Path) -> None:
    assert token_finding({}, tmp_path).level == "ok"
    for mode in (0o644, 0o640, 0o602):
        token.chmod(mode)
        finding = token_finding({"RAY_AUTH_MODE": "token"}, tmp_path)
        assert finding.level == "warn" and f"(mode {mode:04o})" in finding.text
        assert finding.fix == f"chmod 600 {token}" and "secret" not in str(finding)


def test_another_place_of_the_token_counts(tmp_path: Path, token: Path) -> None:
    token.chmod(0o644)
    assert token_finding({"RAY_AUTH_TOKEN_PATH": str(token)}, Path("/nonexistent")).level == "warn"


@pytest.mark.parametrize(
    ("environment", "level", "said"),
    [
        ({}, "ok", "Ray will make one"),
        ({"RAY_AUTH_MODE": "disabled"}, "warn", "RAY_AUTH_MODE is disabled"),
        ({"RAY_ADDRESS": "10.0.0.2:6379"}, "warn", "there is no token in"),
        ({"RAY_ADDRESS": "10.0.0.2:6379", "RAY_AUTH_MODE": "token"}, "fail", "there is no token in"),
        ({"RAY_ADDRESS": "10.0.0.2:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, "ok", ""),
    ],
)
def test_without_a_token_file_the_mode_and_the_cluster_decide(
    environment: dict[str, str], level: str, said: str, tmp_path: Path
) -> None:
    finding = token_finding(environment, tmp_path)
    assert finding.level == level and said in finding.text and "secret" not in str(finding)
