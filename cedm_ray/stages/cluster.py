"""The Ray cluster: joining or starting it, what it holds, and whether the search can ever fit."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages import RAY_ENVIRONMENT


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
        UserError: If one training can never fit into the cluster.
    """
    ours = not ray.is_initialized()
    if ours:
        _start()
    try:
        yield shares(config.resources, ray.cluster_resources())
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


def shares(settings: ResourceSettings, total: dict[str, float]) -> Shares:
    """What one training and one clustering take of a cluster with these resources in all.

    Raises:
        UserError: If one training asks for more than the whole cluster has.
    """
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    gpus_per_worker = settings.gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus else 0.0
    fits = cpus / (settings.num_workers * settings.cpus_per_worker)
    if gpus_per_worker:
        fits = min(fits, gpus / (settings.num_workers * gpus_per_worker))
    if fits < 1:
        raise UserError(
            f"resources.num_workers is {settings.num_workers} with {settings.cpus_per_worker:g} CPU and "
            f"{gpus_per_worker:g} GPU each, but the cluster has {cpus:g} CPU and {gpus:g} GPU in all; "
            f"lower --resources.num-workers or --resources.cpus-per-worker"
        )
    cpus_per_probe, gpus_per_probe = min(settings.cpus_per_probe, cpus), min(1.0, gpus)
    probes_fit = cpus / cpus_per_probe if not gpus else min(cpus / cpus_per_probe, gpus / gpus_per_probe)
    return Shares(
        num_workers=settings.num_workers,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        cpus_per_probe=cpus_per_probe,
        gpus_per_probe=gpus_per_probe,
        max_trials=int(fits),
        max_probes=max(1, int(probes_fit)),
    )
