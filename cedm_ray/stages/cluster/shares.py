"""How a cluster is divided among trainings and clusterings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings


@dataclass(frozen=True)
class Shares:
    """What one training and one clustering ask for, and how many of each fit."""

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
        return sum(times_held(self.worker, node["Resources"]) for node in nodes if node["Alive"]) // self.num_workers


def times_held(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How often a node, were it idle, holds a bundle; 1 of a bundle that asks for nothing.

    Args:
        bundle: What is asked for, by Ray's names.
        node: What the node has in all.
    """
    return min((_times(name, much, node.get(name, 0.0)) for name, much in bundle.items() if much), default=1)


def _times(name: str, asked: float, there: float) -> int:
    if name != "GPU":
        return _units(there) // max(1, _units(asked))
    if asked >= 1:
        return int(there) // math.ceil(asked)
    # A share is of one GPU: what is left over of two GPUs makes none together.
    return int(there) * (_units(1) // max(1, _units(asked)))


def _units(resource: float) -> int:
    """In the units of 1/10000 in which Ray counts, so that three tenths hold one tenth three times."""
    return round(resource * 10_000)


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

    @property
    def bundle(self) -> dict[str, float]:
        """The same in Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    def times_held(self, asked: _Room) -> int:
        """How many of these fit in here at once."""
        return times_held(asked.bundle, self.bundle)


def _rooms(nodes: Iterable[Mapping[str, Any]]) -> list[_Room]:
    """What each node that is alive has in all."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [_Room(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]


def _fitting(asked: _Room, nodes: Sequence[_Room], what: str, flags: str) -> int:
    """How many of something fit on all nodes at once.

    Raises:
        UserError: If it fits on none.
    """
    found = sum(node.times_held(asked) for node in nodes)
    if not found:
        largest = max(nodes, key=lambda node: (node.gpus if asked.gpus else 0, node.cpus), default=_Room(0, 0))
        raise UserError(f"{what} asks for {asked} of one node, but the largest has {largest}; lower {flags}")
    return found
