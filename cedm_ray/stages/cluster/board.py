"""The board on which processes of the cluster write how far they are, and from which the driver reads it."""

from __future__ import annotations

import time

import ray
from ray.exceptions import RayError

from cedm_ray.stages.cluster.gpu_use import gpu_use
from cedm_ray.stages.show.progress import TICK_S, Work


class _Works:
    """The state of the board, in an actor."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}
        self._closed: set[str] = set()
        self._said: list[str] = []

    def say(self, line: str) -> None:
        self._said.append(line)

    def said(self) -> list[str]:
        lines, self._said = self._said, []
        return lines

    def open(self, key: str) -> None:
        self._closed.discard(key)

    def update(self, key: str, label: str, done: float, total: float, unit: str, gpu: str = "") -> None:
        if key in self._closed:  # a worker that was stopped may still send a last word
            return
        old = self._works.get(key)
        started = (old.started_s, old.started_done) if old and old.done <= done else (time.time(), done)
        self._works[key] = Work(label, done, total, unit, *started, gpu)

    def add(self, key: str, label: str, more: float, total: float, unit: str) -> None:
        old = self._works.get(key)
        self.update(key, label, more + (old.done if old else 0), total, unit)

    def remove(self, key: str) -> None:
        self._works.pop(key, None)
        self._closed.add(key)

    def works(self) -> list[Work]:
        return list(self._works.values())


class Board:
    """A handle to the board, which may travel to any process; writing to it never waits and never fails."""

    def __init__(self) -> None:
        # On the head, which a search does not survive, while other nodes come and go.
        self._actor = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(_Works).remote()

    def say(self, line: str) -> None:
        """Say something that the driver passes on to the terminal."""
        self._actor.say.remote(line)

    def said(self) -> list[str]:
        """What has been said since this was asked last; nothing where the cluster does not answer."""
        try:
            found: list[str] = ray.get(self._actor.said.remote(), timeout=5)
        except RayError:
            return []
        return found

    def open(self, key: str) -> None:
        """Take what is said of a piece of work from now on, also if it was taken off before."""
        self._actor.open.remote(key)

    def update(self, key: str, label: str, done: float, total: float, unit: str, gpu: str = "") -> None:
        """Say how far a piece of work is, and how busy its GPU."""
        self._actor.update.remote(key, label, done, total, unit, gpu)

    def add(self, key: str, label: str, more: float, total: float, unit: str) -> None:
        """Say that a piece of work, shared by several processes, is so much further."""
        self._actor.add.remote(key, label, more, total, unit)

    def remove(self, key: str) -> None:
        """Take a piece of work off the board; what late processes still say of it is not heard."""
        self._actor.remove.remote(key)

    def works(self) -> list[Work]:
        """All pieces of work; none where the cluster does not answer."""
        try:
            found: list[Work] = ray.get(self._actor.works.remote(), timeout=5)
        except RayError:
            return []
        return found


class Beat:
    """Tells the board how far one piece of work is, at most once a second, without waiting for an answer."""

    def __init__(self, board: Board, key: str, label: str, total: float, unit: str) -> None:
        self._board, self._key, self._label, self._total, self._unit = board, key, label, total, unit
        self._next_s = 0.0
        board.open(key)

    def __call__(self, done: float) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + TICK_S
            self._board.update(self._key, self._label, done, self._total, self._unit, gpu_use())

    def close(self) -> None:
        self._board.remove(self._key)
