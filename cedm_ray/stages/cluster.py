"""The Ray cluster: joining or starting it, what it holds, and whether the search can ever fit."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
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
from cedm_ray.stages.joining import knock


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

    @property
    def worker(self) -> dict[str, float]:
        """What one process of a training asks for, in Ray's names."""
        return {"CPU": self.cpus_per_worker, **({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})}

    def trials_on(self, nodes: Iterable[Mapping[str, Any]]) -> int:
        """How many trainings these nodes hold side by side."""
        worker = _Room(self.cpus_per_worker, self.gpus_per_worker)
        return sum(room.holds(worker) for room in _rooms(nodes)) // self.num_workers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def connected(config: SearchConfig) -> Iterator[Shares]:
    """Join the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start one on this machine.

    A Ray that the process has already started is used and left running.

    Yields:
        The shares of the cluster that the stages ask for.

    Raises:
        UserError: If the cluster does not answer, or if one training or one clustering can never fit into it.
    """
    _keep_credentials()
    ours = not ray.is_initialized()
    if ours:
        _start()
    try:
        yield shares(config.resources, usable_nodes())
    finally:
        if ours:
            ray.shutdown()


def usable_nodes() -> list[Mapping[str, Any]]:
    """The nodes of the cluster, and those that come when work waits: there may be none yet."""
    nodes: list[Mapping[str, Any]] = ray.nodes()
    return possible_nodes(nodes) if os.environ.get("RAY_ADDRESS") else nodes


def _start() -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
        return
    # Processes of a trial look the instance up by its address: where a second Ray runs on this host, they would
    # not know which one is theirs, and placement groups of stopped trials would never be freed.
    port = _free_port()
    with _on_loopback(), _set(os.environ, "RAY_GCS_SERVER_PORT", str(port)):
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
        except Exception as error:
            fix = "try again when the machine has less to do, or see /tmp/ray/session_latest/logs"
            raise UserError(f"Ray does not start on this machine ({_line(error)}); {fix}") from error
    _keep_private(Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")))


def _join(address: str) -> None:
    """Join a cluster that runs.

    Raises:
        UserError: If it does not answer, or does not let this process in; within seconds.
    """
    fix = "start it, see to the address, or unset RAY_ADDRESS"
    try:
        knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (PermissionError, ray.exceptions.AuthenticationError) as error:
        fix = "copy the head's ~/.ray/auth_token here, mode 0600, and set RAY_AUTH_MODE=token"
        raise UserError(f"the cluster at {address} lets nobody in without its token ({_line(error)}); {fix}") from error
    except Exception as error:  # Ray has no class of its own for most of what can go wrong
        raise UserError(f"the cluster at {address} does not answer ({_line(error)}); {fix}") from error


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0][:200].replace("; ", ", ") if said else type(error).__name__


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What is started inside listens on 127.0.0.1 alone, for no other machine has to do with it.

    Ray has a switch for that, which it sets itself on macOS and Windows, whose firewalls ask the user about every
    port; elsewhere it takes 127.0.0.1 for the address that other machines see, also where it is asked for.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")  # has read the switch when Ray was imported
    with _set(os.environ, constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
        before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
        try:
            yield
        finally:
            constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _set(environment: MutableMapping[str, str], name: str, value: str) -> Iterator[None]:
    """A variable of the environment for the length of the block; processes that are started in it keep it."""
    before = environment.get(name)
    environment[name] = value
    try:
        yield
    finally:
        environment.pop(name)
        if before is not None:
            environment[name] = before


def _keep_credentials() -> None:
    """Keep Ray Tune from passing AWS's credentials on to its trials: Ray writes what it passes on into its logs.

    The processes of a trial find them where those of all other stages do: in the environment of their node.
    """
    passing: Any = importlib.import_module("ray.tune.execution.class_cache")
    passing.ENV_VARS_TO_PROPAGATE = {name for name in passing.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


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
    has = _rooms(nodes)
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


def _rooms(nodes: Iterable[Mapping[str, Any]]) -> list[_Room]:
    """What each node that is alive has in all."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [_Room(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


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
