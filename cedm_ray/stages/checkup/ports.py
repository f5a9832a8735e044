"""Who can reach a search from outside: the ports that its processes listen on, and the token that guards them."""

from __future__ import annotations

import importlib
import ipaddress
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.web import answer_of
from cedm_ray.stages.cluster.joining import token_file

# The programs of Ray by what ends the first words of their command lines, or begins their titles.
_PROGRAMS = {
    "gcs_server": "GCS", "raylet": "raylet", "dashboard.py": "dashboard", "monitor.py": "monitor",
    "ray::DashboardAgent": "agent", "ray::RuntimeEnvAgent": "agent", "ray::": "worker",
}  # fmt: skip
TOKEN = "turn Ray's token on: RAY_AUTH_MODE=token for every ray start and every driver"
LOOPBACK = "close these ports to other machines, or bind them to 127.0.0.1 and reach them through an SSH tunnel"


@dataclass(frozen=True, order=True)
class Listener:
    """A port on which a process waits for clients."""

    program: str
    host: str
    port: int

    @property
    def outside(self) -> bool:
        """Whether clients on other machines can reach it, as far as no firewall is between."""
        address = ipaddress.ip_address(self.host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None  # as gRPC listens
        return not (mapped or address).is_loopback

    @property
    def url(self) -> str:
        """How a client on this machine reaches it over HTTP."""
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.program} on port {self.port}"


def program_of(command: Sequence[str]) -> str | None:
    """What a process is, by its command line; None if it is none that a search has to do with."""
    for word in command[:3]:  # an interpreter and its flag may come first
        for name, program in _PROGRAMS.items():
            if word.startswith(name) if name.startswith("ray::") else Path(word).name == name:
                return program
    line = " ".join(command)
    return "MLflow" if "mlflow" in line else "driver" if "cedm_ray." in line else None


def listeners(session: str) -> list[Listener]:
    """The ports on which processes of this user listen that belong to a Ray session, to MLflow or to this project.

    Args:
        session: Name of the Ray session; the processes of others are left out.
    """
    importlib.import_module("ray")  # brings psutil with it
    psutil: Any = importlib.import_module("psutil")
    found = set()
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid():
                continue
            command = process.cmdline()
            program = program_of(command)
            if program is None or (program in _PROGRAMS.values() and not _of(session, process, command)):
                continue
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN:
                    found.add(Listener(program, each.laddr.ip, each.laddr.port))
        except psutil.Error:  # ended meanwhile
            continue
    return sorted(found)


def _of(session: str, process: Any, command: Sequence[str]) -> bool:
    """Whether a process is of a session: by its command line, or a worker by its raylet's."""
    own = command if not command[0].startswith("ray::") else (process.parent() or process).cmdline()
    return any(session in word for word in own)


def serves_strangers(listener: Listener, *, token: bool) -> bool:
    """Whether a port answers a client that shows no token.

    Args:
        listener: The port.
        token: Whether Ray asks its clients for a token: what speaks no HTTP is gRPC, which does then.
    """
    try:
        return answer_of(f"{listener.url}/").status not in (401, 403)
    except OSError:
        return not token


def port_finding(found: Sequence[Listener], *, token: bool) -> Finding:
    """Which ports can be reached from other machines without a token.

    Args:
        found: The listening ports.
        token: Whether Ray asks its clients for a token.
    """
    outside = [each for each in found if each.outside]
    served = [each for each in outside if serves_strangers(each, token=token)]
    if served:
        some = ", ".join(map(str, served[:4])) + (f" and {len(served) - 4} more" if len(served) > 4 else "")
        text = f"whoever reaches this machine is answered without a token by {some}"
        return Finding("ports", "warn", text, LOOPBACK if token else TOKEN)
    if outside:
        names = ", ".join(dict.fromkeys(each.program for each in outside))
        return Finding("ports", "ok", f"{len(outside)} beyond loopback ({names}), all of which ask for the token")
    return Finding("ports", "ok", f"{len(found)}, all of them on loopback")


def jobs_finding(found: Sequence[Listener]) -> Finding | None:
    """Whether the jobs API, which runs any command, refuses a client without a token; None where there is none."""
    for each in found:
        try:
            answer = answer_of(f"{each.url}/api/jobs/") if each.program == "dashboard" else None
        except OSError:
            continue
        if answer is not None and answer.status in (401, 403):
            return Finding("jobs API", "ok", f"{each} refuses a client without the token (status {answer.status})")
        # The same process answers with its metrics, as plain text, whatever it is asked for, on another port.
        if answer is not None and answer.status == 200 and answer.content_type == "application/json":
            return Finding("jobs API", "warn", f"{each} runs commands for every user of this machine", TOKEN)
    return None


def token_finding(environment: Mapping[str, str], home: Path) -> Finding:
    """Whether Ray will ask its clients for a token, and whether the token is for its owner alone.

    Args:
        environment: The environment of the driver.
        home: Its home folder.
    """
    mode, joins = environment.get("RAY_AUTH_MODE"), "RAY_ADDRESS" in environment
    file = token_file(environment, home)
    try:
        rights: int | None = stat.S_IMODE(file.stat().st_mode)
    except OSError:
        rights = None
    if rights is not None and rights & 0o077:
        return Finding("token", "warn", f"others may read {file} (mode {rights:04o})", f"chmod 600 {file}")
    has_token = rights is not None or "RAY_AUTH_TOKEN" in environment
    if mode is not None and mode.lower() != "token":
        text = f"RAY_AUTH_MODE is {mode}: whoever reaches Ray's ports can run commands"
        return Finding("token", "warn", text, "set RAY_AUTH_MODE=token")
    if joins and not has_token:
        fix = f"copy the head's token to {file}, mode 0600" if mode else "set RAY_AUTH_MODE=token here and on all nodes"
        return Finding("token", "fail" if mode else "warn", f"there is no token in {file} for the cluster to join", fix)
    return Finding("token", "ok", f"{file} is its owner's alone" if has_token else "Ray will make one when it starts")
