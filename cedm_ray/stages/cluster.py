"""The Ray cluster: joining or starting it, what it holds, and whether the search can ever fit."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.growth import possible_nodes


@dataclass(frozen=True)
class Shares:
    """What one training and one clustering take of the cluster, and how many of each fit at once."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    cpus_per_probe: float
    gpus_per_probe: float
    max_trials: int
    max_probes: int


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def connected(config: SearchConfig) -> Iterator[Shares]:
    """Join the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start one on this machine.

    A Ray that the process has already started is used and left running.

    Yields:
        The shares of the cluster that the stages ask for.

    Raises:
        UserError: If one training or one clustering can never fit into the cluster.
    """
    ours = not ray.is_initialized()
    if ours:
        _start()
    try:
        nodes = ray.nodes()
        # On a cluster whose workers come when work waits there may be none yet.
        yield shares(config.resources, possible_nodes(nodes) if os.environ.get("RAY_ADDRESS") else nodes)
    finally:
        if ours:
            ray.shutdown()


def _start() -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    # Processes of a trial look the instance up by its address: where a second Ray runs on this host, they would
    # not know which one is theirs, and placement groups of stopped trials would never be freed.
    port = _free_port()
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    ip = ray.util.get_node_ip_address()
    try:
        ray.init(
            address="local",
            include_dashboard=True,  # Train learns through it that the controller of a stopped trial is gone
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=ip,
            runtime_env={"env_vars": {**RAY_ENVIRONMENT, "RAY_ADDRESS": f"{ip}:{port}"}},
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]
    _keep_private(Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")))


def _keep_private(token: Path) -> None:
    """Ray makes the token with which its clients show who they are readable for everybody."""
    with contextlib.suppress(OSError):
        token.chmod(0o600)


def shares(settings: ResourceSettings, nodes: Iterable[Mapping[str, Any]]) -> Shares:
    """What one training and one clustering take of a cluster, and how many of each it holds at once.

    A worker and a clustering each lie on one node; the workers of a training may lie on several.

    Args:
        settings: What they ask for.
        nodes: The nodes as ``ray.nodes()`` lists them, with ``Alive`` and ``Resources``.

    Raises:
        UserError: If a worker or a clustering fits on no node, or the nodes do not hold all workers of one training.
    """
    has = [
        _Room(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in nodes if node["Alive"]
    ]
    total = _Room(sum(node.cpus for node in has), sum(node.gpus for node in has))
    gpus_per_worker = settings.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if total.gpus else 0.0
    worker = _Room(settings.cpus_per_worker, gpus_per_worker)
    probe = _Room(min(settings.cpus_per_probe, total.cpus), 1.0 if total.gpus else 0.0)
    workers = _fitting(worker, has, "a worker", "--resources.cpus-per-worker or --resources.gpus-per-worker")
    probes = _fitting(probe, has, "a clustering", "--resources.cpus-per-probe")
    if workers < settings.num_workers:
        raise UserError(
            f"resources.num_workers is {settings.num_workers} with {worker} each, but the cluster holds {workers} of "
            f"them ({total} in all); lower --resources.num-workers or --resources.cpus-per-worker"
        )
    return Shares(
        num_workers=settings.num_workers,
        cpus_per_worker=worker.cpus,
        gpus_per_worker=worker.gpus,
        cpus_per_probe=probe.cpus,
        gpus_per_probe=probe.gpus,
        max_trials=workers // settings.num_workers,
        max_probes=probes,
    )


@dataclass(frozen=True)
class _Room:
    """CPUs and GPUs that a node has, or that something asks for."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"

    def holds(self, asked: _Room) -> int:
        """How many of these fit in here at once."""
        found = _units(self.cpus) // max(1, _units(asked.cpus))
        if asked.gpus == 0:
            return found
        if asked.gpus >= 1:
            return min(found, int(self.gpus) // math.ceil(asked.gpus))
        # A share is of one GPU: what is left over of two GPUs makes none together.
        return min(found, int(self.gpus) * (_units(1) // max(1, _units(asked.gpus))))


def _units(resource: float) -> int:
    """In the units of 1/10000 in which Ray counts, so that three tenths hold one tenth three times."""
    return round(resource * 10_000)


def _fitting(asked: _Room, nodes: Sequence[_Room], what: str, flags: str) -> int:
    """How many of something fit on all nodes at once.

    Raises:
        UserError: If it fits on none.
    """
    found = sum(node.holds(asked) for node in nodes)
    if not found:
        largest = max(nodes, key=lambda node: (node.gpus if asked.gpus else 0, node.cpus), default=_Room(0, 0))
        raise UserError(f"{what} asks for {asked} of one node, but the largest has {largest}; lower {flags}")
    return found
