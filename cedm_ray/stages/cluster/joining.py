"""A knock at a Ray cluster's door: Ray itself waits for minutes where nobody answers, or the token is wrong."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 5.0
# Answered by the process that a driver joins first, without a look at anything; the only name of Ray's own that is
# used here. A release that answers to another one is left to Ray's own ways.
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def knock(address: str, environment: Mapping[str, str] = os.environ) -> None:
    """Try whether a cluster answers and lets this process in, within seconds.

    Args:
        address: As ``RAY_ADDRESS`` gives it; one without a port (``auto``) is not tried.
        environment: Where the token is looked for.

    Raises:
        OSError: If nobody answers there, or no Ray, or if the token is missing or another one.
    """
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    if not parts.hostname or not parts.port:
        return
    host = _where_ray_looks(parts.hostname)
    try:
        socket.create_connection((host, parts.port), TIMEOUT_S).close()
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror or error}, at {host}:{parts.port}") from error
    if not parts.scheme:  # Ray Client, ray://, speaks otherwise
        _ask(f"[{host}]:{parts.port}" if ":" in host else f"{host}:{parts.port}", _token(environment))


def _where_ray_looks(host: str) -> str:
    """Ray takes an address of this machine's own for the one under which other machines know it."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        local = False
    if not local:
        return host
    import ray  # takes seconds, and whoever asks for the token's file alone needs none

    return str(ray.util.get_node_ip_address())


def token_file(environment: Mapping[str, str], home: Path | None = None) -> Path:
    """Where Ray keeps the token, or looks for it; the file need not exist.

    Args:
        environment: May name another place; an empty name counts as none.
        home: Home folder of the user (None: of this process).
    """
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(named).expanduser() if named else (home or Path.home()) / ".ray" / "auth_token"


def _token(environment: Mapping[str, str]) -> str | None:
    """The token that Ray would show, from the places where Ray looks for it; None without one."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if "RAY_AUTH_TOKEN" in environment:
        return environment["RAY_AUTH_TOKEN"].strip()
    try:
        return token_file(environment).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _ask(target: str, token: str | None) -> None:
    """Ask the cluster whether it is alive.

    Raises:
        OSError: If it does not say so.
    """
    grpc: Any = importlib.import_module("grpc")
    shown = [] if token is None else [("authorization", f"Bearer {token}")]
    # Ray's own channels go past a proxy too.
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=TIMEOUT_S, metadata=shown)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                said = "it asks for a token, which is missing here" if token is None else "it refuses the token"
                raise PermissionError(
                    f"{said}: RAY_AUTH_MODE=token and the head's ~/.ray/auth_token are needed"
                ) from None
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ConnectionError(f"something listens at {target}, but no Ray") from None
