"""The Ray cluster: joining it, or starting one on this machine that is for this machine and user alone."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError, first_line
from cedm_ray.stages import RAY_ENVIRONMENT
from cedm_ray.stages.cluster.autoscaling import possible_nodes
from cedm_ray.stages.cluster.joining import knock, token_file
from cedm_ray.stages.cluster.shares import Shares, shares

DASHBOARD_S = 30
"""How long the dashboard may take to answer."""


@contextmanager
def connected(config: SearchConfig) -> Iterator[Shares]:
    """Join the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start one on this machine.

    A Ray that the process has already started is used and left running.

    Yields:
        The shares of the cluster that the stages ask for.

    Raises:
        UserError: If the cluster or its dashboard does not answer, or if one training or one clustering can never fit
            into it.
    """
    _keep_credentials()
    ours = not ray.is_initialized()
    if ours:
        _start()
    try:
        joined = not ours or "RAY_ADDRESS" in os.environ
        if joined and _on_head():  # where the dashboard is; it may listen there alone
            _check_dashboard()
        yield shares(config.resources, usable_nodes())
    finally:
        if ours:
            ray.shutdown()


def _on_head() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def _check_dashboard() -> None:
    """Train asks the dashboard whether the controller of a stopped training is dead, whose room it gives back then.

    Raises:
        UserError: If the dashboard was never started, or is gone. Jupyter interrupts all processes of its kernel, those
            of a dashboard that was started from there too.
    """
    try:
        list_actors(address=ray.get_runtime_context().gcs_address, limit=1, timeout=DASHBOARD_S)
    except RayStateApiException as error:
        fix = "end this Ray (ray.shutdown() where Python started it, else ray stop), and start it with its dashboard"
        raise UserError(
            f"Ray's dashboard does not answer, and no training's room would be given back without it; {fix}"
        ) from error


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
    _keep_private(token_file(os.environ))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    """What an error says, inside a line whose parts a semicolon divides."""
    return first_line(error).replace("; ", ", ")


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
