import random
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import ray.exceptions
import torch
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from cedm_ray.stages.storage.disk_faults import StorageError
from cedm_ray.stages.training import trial
from cedm_ray.stages.training.interruptions import MOST_IN_A_ROW, Failure, Interruptions
from cedm_ray.stages.training.records import TrialRecord, write_record
from cedm_ray.stages.training.trials import DeathsInARow

OWN, OOM = Failure("own", "ValueError: it cannot"), Failure("own", "OutOfMemoryError: CUDA out of memory", True)
KILLED, WAITING = Failure("killed", "ActorDiedError: the actor died"), Failure("waiting", "no room for all workers")
GONE = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


def dead() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.ActorDiedError())


def group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("several", dict(enumerate(errors)))


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


@pytest.mark.parametrize(("gone_after", "within_s", "lost"), [(1, 5, True), (18, 30, True), (18, 5, False)])
def test_whether_a_node_is_lost_is_waited_for(
    gone_after: int, within_s: float, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = [0.0]
    monkeypatch.setattr(trial.time, "sleep", lambda seconds: passed.append(passed[-1] + seconds))
    monkeypatch.setattr(trial, "_nodes", lambda: {"head"} if passed[-1] >= gone_after else {"head", "a"})
    assert trial._lost({"head", "a"}, within_s) is lost
    assert passed[-1] == (max(trial.PAUSE_S, gone_after) if lost else within_s)


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


class Trained:
    """A training that fails as it is told to, and the record that the driver keeps of it."""

    def __init__(self, path: Any, monkeypatch: pytest.MonkeyPatch, *course: Exception | int) -> None:
        self.job = cast(Any, SimpleNamespace(path=path, label="C=7"))
        self.course, self.board, self.pauses = list(course), Mock(), Mock()
        self.nodes = {"head", "a", "b"}
        monkeypatch.setattr(trial.time, "sleep", self.pauses)
        monkeypatch.setattr(trial, "_nodes", lambda: set(self.nodes))

    def train(self) -> None:
        while self.course:
            step = self.course.pop(0)
            if isinstance(step, int):
                rungs = ({"kimg": step, "score": 1.0},)
                write_record(self.job.path, TrialRecord("k", "C=7", "temi", 7, {}, "running", rungs=rungs))
            elif isinstance(step, ray.exceptions.NodeDiedError):
                self.nodes = {"head", f"new{len(self.course)}"}
                raise step
            else:
                raise step

    def run(self) -> str | None:
        return trial._keep_on(self.job, self.board, self.train)

    @property
    def said(self) -> list[str]:
        return [call.args[0] for call in self.board.say.call_args_list]


def test_a_training_goes_on_by_itself_and_what_happened_is_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ray.exceptions.NodeDiedError("gone")
    training = Trained(tmp_path, monkeypatch, group(dead()), 2, *[lost] * 20, group(GONE, dead()), 4, ValueError("x"))
    assert training.run() is None
    assert training.said[0] == "C=7: a process was killed; goes on from 0 kimg"
    assert training.said[1:21] == ["C=7: a node was lost; goes on from 2 kimg"] * 20
    assert training.said[-1] == "C=7: ValueError: x; goes on from 4 kimg"
    # Whether it was the node is waited for where only a process is known to be dead, and not for its own exception.
    waited_s = sum(call.args[0] for call in training.pauses.call_args_list)
    assert len(training.said) == 23 and waited_s == 2 * trial.NODE_S + 20 * trial.PAUSE_S + trial.PAUSE_S


def test_a_training_that_cannot_go_on_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Trained(tmp_path, monkeypatch, 2, ValueError("x"), ValueError("x"), 4)
    assert own.run() == "ValueError: x" and own.course == [4] and len(own.said) == 1
    killed = Trained(tmp_path / "other", monkeypatch, *[group(dead())] * 9)
    assert str(killed.run()).startswith("killed from outside 5 times without reaching a rung (memory?)")
    assert len(killed.course) == 4
    full = Trained(tmp_path / "full", monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):  # the driver ends the search for it
        full.run()
    said = Trained(tmp_path / "said", monkeypatch, group(StorageError("the storage /a is full")))
    with pytest.raises(WorkerGroupError):
        said.run()


def test_waiting_for_room_is_not_told_as_an_interruption(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Trained(tmp_path, monkeypatch, *[ControllerError(WorkerGroupStartupTimeoutError(2))] * 50)
    assert waits.run() is None and waits.said == []


def test_deaths_of_a_trials_process_are_counted_anew_when_it_has_got_further() -> None:
    board = Mock()
    planner = SimpleNamespace(job=lambda params: SimpleNamespace(label=f"C={params['num_clusters']}"))
    callback = DeathsInARow(board, cast(Any, planner))
    one = SimpleNamespace(trial_id="t", config={"num_clusters": 7}, run_metadata=SimpleNamespace(num_failures=0))
    for kimg, counted in ((2, 0), (2, 1), (1, 1), (4, 0)):  # old rungs are reported again
        one.run_metadata.num_failures += 1
        callback.on_trial_recover(0, [], one)
        before = one.run_metadata.num_failures
        callback.on_trial_result(0, [], one, {"kimg": kimg})
        assert one.run_metadata.num_failures == (before if counted else 0)
    callback.on_trial_result(0, [], one, {"failed": "no"})
    assert board.say.call_args.args[0] == "C=7: its process on the head was killed; goes on from 2 kimg"
