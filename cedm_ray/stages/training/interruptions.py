"""What ends a training before its time: whose fault it is, and whether the training goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from cedm_ray.errors import first_line

FAILED = "failed"
"""In what a training reports: why it ends before its time; such a report has no rung."""
MOST_IN_A_ROW = 5
"""Times that a process may be killed before a training has got any further."""
PEER_IS_GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|remote process", re.I)
"""In errors of processes whose peer has died while they computed something together."""

Kind = Literal["own", "killed", "waiting"]


@dataclass(frozen=True)
class Failure:
    """One interruption of a training.

    ``own`` is an exception of the training itself; ``killed`` is the death of a process, perhaps with its node;
    ``waiting`` says only that the cluster has not had room for all workers at once.
    """

    kind: Kind
    text: str
    """In one line."""
    out_of_memory: bool = False
    """Whether a device, not the machine, had too little memory."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What an exception that came out of a Ray task or of a trainer's ``fit()`` says."""
        causes = list(_causes(error))
        if any(isinstance(cause, WorkerGroupStartupTimeoutError) for cause in causes):
            return cls("waiting", "no room for all workers")
        own = [cause for cause in causes if not _from_outside(cause) and not _peer_is_gone(cause)]
        # Where a process died, the exceptions of the others are what they saw of it.
        if not own or any(map(_from_outside, causes)):
            dead = [cause for cause in causes if _from_outside(cause) and not isinstance(cause, ActorUnavailableError)]
            return cls("killed", first_line((dead or causes)[0], 300, named=True))
        return cls("own", first_line(own[0], 300, named=True), isinstance(own[0], torch.OutOfMemoryError))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exceptions behind the wrappings of Ray and Ray Train."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        for failure in error.worker_failures.values():
            yield from _causes(failure)
    elif isinstance(error, ControllerError):
        yield from _causes(error.controller_failure)
    elif isinstance(error, WorkerHealthCheckFailedError):
        yield from _causes(error.health_check_failure)
    elif isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        yield from _causes(error.cause)
    else:
        yield error


def _from_outside(cause: BaseException) -> bool:
    """Whether it tells of the death of a process, or of a node with its processes and what they held."""
    died = isinstance(cause, RayError) and not isinstance(cause, (RayTaskError, GetTimeoutError))
    return died or isinstance(cause, (WorkerGroupStartupFailedError, WorkerHealthCheckTimeoutError))


def _peer_is_gone(cause: BaseException) -> bool:
    lost = isinstance(cause, RuntimeError) and PEER_IS_GONE.search(str(cause)) is not None
    return lost or isinstance(cause, torch.distributed.DistNetworkError)


class Interruptions:
    """Decides after each interruption of one training whether it goes on.

    It goes on after the loss of a node, and whenever it has got further since the last interruption. Otherwise its own
    exception may come twice, want of memory once after what is computed at once was halved, and its processes may be
    killed ``MOST_IN_A_ROW`` times: where that happens, the training itself takes too much of a node.

    Args:
        reached: How far the training was when it was started here; anything that grows with every rung.
    """

    def __init__(self, reached: int) -> None:
        self._reached, self._own, self._killed = reached, 0, 0

    def ends(self, failure: Failure, reached: int, *, node_lost: bool = False, halved: bool = False) -> str | None:
        """Why the training ends here; None where it goes on.

        Args:
            failure: What has happened.
            reached: How far the training is.
            node_lost: Whether a node of the cluster has gone since the training was started or went on.
            halved: Whether what is computed at once had been halved before for want of memory.
        """
        if reached > self._reached:
            self._reached, self._own, self._killed = reached, 0, 0
        if failure.kind == "waiting" or (failure.kind == "killed" and node_lost):
            return None
        if failure.kind == "killed":
            self._killed += 1
            if self._killed < MOST_IN_A_ROW:
                return None
            return f"killed from outside {self._killed} times without reaching a rung (memory?): {failure.text}"
        self._own += 1
        if self._own > 1 or (failure.out_of_memory and halved):
            return failure.text
        return None
