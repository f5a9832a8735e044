"""Ports on which nobody listens."""

import socket
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """So many different ones, free on every interface of this machine."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    (port,) = free_ports(1)
    return port
