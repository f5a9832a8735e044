"""What the cluster holds at present: the trainings that fit side by side, and what is waited for that nothing holds."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.connection import usable_nodes
from cedm_ray.stages.cluster.orphans import Orphans
from cedm_ray.stages.cluster.shares import Shares, times_held
from cedm_ray.stages.show.progress import duration

LOOK_EVERY_S = 5.0
SAY_EVERY_S = 60.0

Node = Mapping[str, Any]
Bundle = Mapping[str, float]


class Says(Protocol):
    """Where lines are written for a person."""

    def line(self, text: str, style: str = "") -> None: ...


class Places:
    """How many trainings may run side by side now: it follows the nodes that the cluster has, or can start.

    There is always one: its demand is what nodes come for.

    Args:
        shares: What a training asks for.
        most: What the settings allow (None: as many as fit).
        nodes: Lists the nodes; they are looked at once in ``LOOK_EVERY_S``.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        shares: Shares,
        most: int | None,
        nodes: Callable[[], Iterable[Node]] = usable_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shares, self._most, self._nodes, self._clock = shares, most, nodes, clock
        self._held, self._looked_s = shares.max_trials, clock()

    def __call__(self) -> int:
        if self._clock() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = self._clock()
            with suppress(RayError, ConnectionError):  # the last answer stands until there is a new one
                self._held = self._shares.trials_on(self._nodes())
        return max(1, min(self._held, self._most or self._held))


@contextmanager
def watched(terminal: Says, board: Board, shares: Shares) -> Iterator[None]:
    """Until the block ends, pass on what processes say on the board, and say what is waited for that no node holds.

    What dead trainings hold is given back.

    Args:
        terminal: Where it is said.
        board: The search's.
        shares: What a training asks for.
    """
    done = threading.Event()

    def watch() -> None:
        wait, orphans = Wait(), Orphans(shares.worker)
        while not done.wait(LOOK_EVERY_S):
            for line in board.said():
                terminal.line(f"  {line}")
            what = waited_for()
            said = "" if what is None else wait.said(what, time.monotonic())
            if said:
                terminal.line(f"  {said}", "yellow")
            if orphans.freed(time.monotonic()):
                terminal.line("  gave back what a training held whose processes are dead")

    watcher = threading.Thread(target=watch, daemon=True, name="waiting")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=LOOK_EVERY_S)


class Wait:
    """Since when something has been waited for, and when that was said last."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._said_s = 0.0

    def said(self, what: str, now_s: float) -> str:
        """What is to be said now, which is mostly nothing.

        Args:
            what: That is waited for; empty where nothing is.
            now_s: The time in seconds.
        """
        if self._since_s is None:
            self._since_s = self._said_s = now_s
        if not what:
            told = self._said_s > self._since_s
            waited_s, self._since_s = now_s - self._since_s, None
            return f"the cluster holds again what is asked for, after {duration(waited_s)}" if told else ""
        if now_s - self._said_s < SAY_EVERY_S:
            return ""
        self._said_s = now_s
        return f"{what}: waiting for {duration(now_s - self._since_s)}; ray status shows what is asked for"


def waited_for() -> str | None:
    """What is waited for that no node holds, as :func:`unheld` says it; None where the cluster does not answer."""
    try:
        return unheld(pending(), ray.nodes())
    except Exception:  # of several kinds, by what is in its way
        return None


def pending() -> list[list[Bundle]]:
    """What the cluster is asked for and has not given: groups of bundles that are wanted at once.

    Raises:
        Exception: Of several kinds, where the cluster does not answer.
    """
    # Only the driver asks, and the module takes a while to import.
    from ray.autoscaler.v2.sdk import get_cluster_status

    asked = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands
    groups = [
        [each.bundle for each in demand.bundles_by_count for _ in range(each.count)]
        for demand in asked.placement_group_demand
    ]
    return groups + [[each.bundle] for demand in asked.ray_task_actor_demand for each in demand.bundles_by_count]


def unheld(groups: Iterable[Sequence[Bundle]], nodes: Iterable[Node]) -> str:
    """The first of the groups that the nodes, were they idle, would not hold, as a sentence; empty where they hold all.

    Args:
        groups: Bundles that are wanted at once.
        nodes: The nodes as ``ray.nodes()`` lists them, with ``Alive`` and ``Resources``.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    for group in groups:
        for names, count in Counter(tuple(sorted(bundle.items())) for bundle in group).items():
            bundle = dict(names)
            found = sum(times_held(bundle, node) for node in there)
            if not found:
                return f"no node of the cluster holds {_text(bundle)}"
            if found < count:
                return f"the cluster holds {found} of {count} times {_text(bundle)}"
    return ""


def _text(bundle: Bundle) -> str:
    """For example ``1 CPU and 1 GPU``."""
    return " and ".join(f"{much:g} {name}" for name, much in sorted(bundle.items()))
