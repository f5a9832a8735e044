import random

import pytest
import ray.exceptions
import torch
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from cedm_ray.stages.training.interruptions import MOST_IN_A_ROW, Failure, Interruptions
from helpers.failures import GONE, dead, group

OWN, OOM = Failure("own", "ValueError: it cannot"), Failure("own", "OutOfMemoryError: CUDA out of memory", True)
KILLED, WAITING = Failure("killed", "ActorDiedError: the actor died"), Failure("waiting", "no room for all workers")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (group(dead()), "killed", "ActorDiedError: The actor died"),
        (group(GONE, dead()), "killed", "ActorDiedError: The actor died"),
        (group(ValueError("no"), dead()), "killed", "ActorDiedError: The actor died"),
        # The other process's death is not known yet.
        (group(GONE), "killed", "RuntimeError: [../third_party/gloo"),
        (group(torch.distributed.DistNetworkError("recvBytes failed")), "killed", "DistNetworkError: recvBytes"),
        (group(ValueError("no\nmore"), GONE), "own", "ValueError: no"),
        (group(GONE, ValueError("no")), "own", "ValueError: no"),
        (group(RuntimeError("CUDA error: an illegal memory access")), "own", "RuntimeError: CUDA error"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "waiting", "no room for all workers"),
        (ControllerError(WorkerGroupStartupFailedError("died at the start")), "killed", "WorkerGroupStartupFailed"),
        (ControllerError(ray.exceptions.ActorDiedError()), "killed", "ActorDiedError"),
        (ControllerError(KeyError("a")), "own", "KeyError: 'a'"),
        (ray.exceptions.WorkerCrashedError(), "killed", "WorkerCrashedError: The worker died"),
        (ray.exceptions.NodeDiedError("gone"), "killed", "NodeDiedError: gone"),
        (ray.exceptions.ActorUnavailableError("away", None), "killed", "ActorUnavailableError"),
        (ray.exceptions.OutOfMemoryError("the node's memory"), "killed", "OutOfMemoryError: the node's memory"),
        (ray.exceptions.RayTaskError("fit", "traceback", ValueError("heads")), "own", "ValueError: heads"),
        (ray.exceptions.RayTaskError("fit", "traceback", ValueError("heads")).as_instanceof_cause(), "own", "ValueEr"),
        (ray.exceptions.RayTaskError("run", "traceback", dead()), "killed", "ActorDiedError: The actor died"),
        (ValueError(), "own", "ValueError"),
    ],
)  # fmt: skip
def test_whose_fault_a_failure_is(error: Exception, kind: str, text: str) -> None:
    found = Failure.of(error)
    assert (found.kind, found.out_of_memory) == (kind, False) and found.text.startswith(text)


def test_want_of_a_devices_memory_is_told_from_want_of_the_machines() -> None:
    assert Failure.of(group(GONE, torch.OutOfMemoryError("CUDA out of memory"))) == OOM
    assert not Failure.of(ray.exceptions.OutOfMemoryError("the node's")).out_of_memory


def test_lost_nodes_and_waiting_end_nothing_however_often_they_come() -> None:
    many = Interruptions(0)
    assert all(many.ends(KILLED, 0, node_lost=True) is None for _ in range(1000))
    assert all(many.ends(WAITING, 0) is None for _ in range(1000))
    assert many.ends(KILLED, 0) is None and many.ends(OWN, 0) is None


def test_a_training_that_is_killed_again_and_again_at_the_same_place_ends_with_that_reason() -> None:
    kills = Interruptions(8)
    said = [kills.ends(KILLED, 8) for _ in range(MOST_IN_A_ROW)]
    assert said[:-1] == [None] * 4
    assert said[-1] == "killed from outside 5 times without reaching a rung (memory?): ActorDiedError: the actor died"


def test_whatever_interrupts_a_training_that_gets_further_each_time_it_goes_on() -> None:
    for kinds in ([KILLED], [OWN], [OOM], [OWN, KILLED, WAITING]):
        going = Interruptions(0)
        draw = random.Random(0)
        assert all(going.ends(draw.choice(kinds), kimg) is None for kimg in range(1, 200))


def test_its_own_exception_ends_it_the_second_time_it_comes_without_a_rung_between() -> None:
    own = Interruptions(2)
    assert [own.ends(OWN, 2), own.ends(OWN, 2)] == [None, "ValueError: it cannot"]
    between = Interruptions(2)
    assert [between.ends(each, kimg) for each, kimg in ((OWN, 2), (KILLED, 2), (WAITING, 2))] == [None] * 3
    assert between.ends(OWN, 4) is None and between.ends(OWN, 4) == "ValueError: it cannot"


def test_want_of_memory_ends_it_at_once_when_what_is_computed_at_once_was_halved_before() -> None:
    first = Interruptions(0)
    assert first.ends(OOM, 0) is None and first.ends(OOM, 0, halved=True) == OOM.text
    later = Interruptions(4)
    assert later.ends(OOM, 8, halved=True) == OOM.text  # also with a rung between
