"""What each node of the cluster lacks, looked at by a task on that very node."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError, first_line
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages.checkup.finding import Finding, merged
from cedm_ray.stages.checkup.gpus import gpu_findings
from cedm_ray.stages.checkup.look import Needs, look, shared_finding
from cedm_ray.stages.checkup.storage import scratch_folder
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.cluster.shares import shares
from cedm_ray.stages.storage.paths import absolute

NODE_TIMEOUT_S = 120.0
LARGE_CHECKPOINT = 100_000_000
"""Bytes from which on a network takes days on CPUs."""
# Settings that fit into any cluster, so that what does not fit is one finding among the others.
_LEAST = {
    "resources.num_workers": 1, "resources.cpus_per_worker": 0.001, "resources.gpus_per_worker": 0.0,
    "resources.cpus_per_probe": 0.001,
}  # fmt: skip


def cluster_findings(config: SearchConfig, checkpoint: int) -> list[Finding]:
    """What there is to say of the cluster that the search would use; it is joined or started for that.

    Args:
        config: The settings.
        checkpoint: Size of a checkpoint, in bytes.
    """
    storage = config.storage_path.expanduser().absolute()
    try:
        with connected(config.with_values(_LEAST)):
            nodes = [node for node in ray.nodes() if node["Alive"]]
            return [
                *_looked_at(nodes, storage, files_of(config), checkpoint),
                *fit_findings(config.resources, nodes, checkpoint),
            ]
    except UserError as error:
        return [Finding.refused("Ray", error)]
    except (OSError, RuntimeError, ValueError) as error:  # it is gone in the middle of it
        text = f"it ended ({first_line(error, named=True)})"
        return [Finding("Ray", "fail", text, "see /tmp/ray/session_latest/logs")]


def files_of(config: SearchConfig) -> tuple[tuple[str, Path], ...]:
    """The weight files that every node reads by itself."""
    given = {
        "--backbone-weights": config.backbone_weights, "--detector-weights": config.detector_weights,
        "--dinov2-weights": config.dinov2_weights, "--clip.weights": config.clip.weights,
    }  # fmt: skip
    return tuple((flag, path) for flag, file in given.items() if (path := absolute(file)) is not None)


def _looked_at(
    nodes: Sequence[Mapping[str, Any]], storage: Path, files: tuple[tuple[str, Path], ...], checkpoint: int
) -> list[Finding]:
    """What tasks on all nodes say; the folder that they write to is gone afterwards."""
    token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    context = ray.get_runtime_context()
    try:
        with scratch_folder(storage) as folder:
            needs = Needs(folder, files, checkpoint, token, context.get_session_name())
            here = context.get_node_id()
            looks = [_Look.start(node, needs, elsewhere=node["NodeID"] != here) for node in nodes]
            return merged([(each.name, each.findings(needs)) for each in looks])
    except OSError:  # the driver itself cannot write, which is told already
        return []


@dataclass(frozen=True)
class _Look:
    """Tasks that look at one node."""

    node: Mapping[str, Any]
    machine: Any
    gpus: Any
    """None where the node has none."""

    @classmethod
    def start(cls, node: Mapping[str, Any], needs: Needs, *, elsewhere: bool) -> _Look:
        gpus = int(node["Resources"].get("GPU", 0))
        machine = _task(node, look, 0, needs, needs.folder / node["NodeID"], elsewhere)
        return cls(node, machine, _task(node, gpu_findings, gpus, gpus) if gpus else None)

    @property
    def name(self) -> str:
        return f"{self.node['NodeManagerHostname']} ({self.node['NodeManagerAddress']})"

    def findings(self, needs: Needs) -> list[Finding]:
        fix = "look at ray status, at ray list nodes, and at the node's logs in /tmp/ray"
        late = Finding("node", "fail", f"it did not answer within {NODE_TIMEOUT_S:g} s", fix)
        found = _answer(self.machine, late)
        if late not in found:
            found = [*found, shared_finding(needs.folder / self.node["NodeID"])]
        if self.gpus is None:
            return found
        text = f"they were not free within {NODE_TIMEOUT_S:g} s, and were not tried"
        busy = Finding("GPUs", "warn", text, "run this again when nothing else is running")
        return [*found, *_answer(self.gpus, busy)]


def _task(node: Mapping[str, Any], function: Any, gpus: int, *args: Any) -> Any:
    """Start a function on a node."""
    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(
        num_cpus=0, num_gpus=gpus, scheduling_strategy=pinned, max_retries=0
    ).remote(*args)  # fmt: skip


def _answer(task: Any, late: Finding) -> list[Finding]:
    """What a task says, or why it says nothing."""
    try:
        found: list[Finding] = ray.get(task, timeout=NODE_TIMEOUT_S)
        return found
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        return [late]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        fix = "install cedm_ray with its constraints.txt on this node too, and see its logs in /tmp/ray"
        return [Finding("node", "fail", f"a task failed ({first_line(cause, named=True)})", fix)]


def fit_findings(settings: ResourceSettings, nodes: Sequence[Mapping[str, Any]], checkpoint: int) -> list[Finding]:
    """Whether one training and one clustering ever fit, and whether a large network has GPUs.

    Args:
        settings: What they ask for.
        nodes: The nodes as ``ray.nodes()`` lists them.
        checkpoint: Size of a checkpoint, in bytes.
    """
    found = []
    gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
    if not gpus:
        text = f"none on {len(nodes)} node{'s' if len(nodes) > 1 else ''}; everything computes on CPUs"
        if checkpoint > LARGE_CHECKPOINT:
            fix = "join a cluster that has some (RAY_ADDRESS), or see to the driver if this machine has"
            found.append(Finding("GPUs", "warn", f"{text}, which is very slow for a network of this size", fix))
        else:
            found.append(Finding("GPUs", "ok", text))
    try:
        fits = shares(settings, nodes)
    except UserError as error:
        return [*found, Finding.refused("one trial", error)]
    each = f"{fits.num_workers} x {fits.cpus_per_worker:g} CPU and {fits.gpus_per_worker:g} GPU"
    text = f"a training takes {each}; {fits.max_trials} fit at once, and {fits.max_probes} clusterings"
    return [*found, Finding("one trial", "ok", text)]
