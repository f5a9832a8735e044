from typing import Any

import pytest
from ray.util.state.exception import RayStateApiException

from cedm_ray.stages.cluster.orphans import LOOK_EVERY_S, Orphans

WORKER = {"CPU": 2.0, "GPU": 1.0}


def group(state: str = "CREATED", bundle: dict[str, float] | None = None, count: int = 2) -> dict[str, Any]:
    return {"state": state, "bundles": dict.fromkeys(range(count), bundle or WORKER)}


class Job:
    """Groups of a job, those that actors are in, and what was given back."""

    def __init__(self, **groups: dict[str, Any]) -> None:
        self.groups, self.taken, self.removed = groups, set[str](), list[str]()
        self.answers, self.error = True, Exception()

    def orphans(self, bundle: dict[str, float] = WORKER) -> Orphans:
        return Orphans(bundle, lambda: self.groups, self.look, self.remove)

    def look(self) -> set[str]:
        if not self.answers:
            raise self.error
        return self.taken

    def remove(self, name: str) -> None:
        self.removed.append(name)
        del self.groups[name]


def test_a_group_without_a_process_at_two_looks_in_a_row_is_given_back_once() -> None:
    job = Job(dead=group(), trains=group())
    job.taken = {"trains"}
    orphans = job.orphans()
    assert [orphans.freed(LOOK_EVERY_S * look) for look in range(4)] == [0, 1, 0, 0]
    assert job.removed == ["dead"] and list(job.groups) == ["trains"]


def test_between_two_looks_nothing_is_asked() -> None:
    job = Job(dead=group())
    orphans = job.orphans()
    assert [orphans.freed(second) for second in range(int(LOOK_EVERY_S))] == [0] * int(LOOK_EVERY_S)
    assert orphans.freed(LOOK_EVERY_S) == 1


def test_a_group_whose_processes_are_about_to_start_is_left_alone() -> None:
    job = Job(starts=group())
    orphans = job.orphans()
    for look in range(6):  # empty at every second look: its processes come and go
        job.taken = {"starts"} if look % 2 else set()
        assert orphans.freed(LOOK_EVERY_S * look) == 0


@pytest.mark.parametrize(
    "other",
    [
        group("PENDING"),
        group("REMOVED"),
        group(bundle={"node:__internal_head__": 0.001}),
        group(bundle={"CPU": 2.0}),
        group(bundle={"CPU": 1.0, "GPU": 1.0}),
    ],
)
def test_groups_of_others_and_those_that_wait_for_room_are_left_alone(other: dict[str, Any]) -> None:
    job = Job(other=other)
    orphans = job.orphans()
    assert [orphans.freed(LOOK_EVERY_S * look) for look in range(4)] == [0] * 4


def test_what_is_asked_for_in_an_amount_of_zero_counts_for_nothing() -> None:
    job = Job(dead=group(bundle={"CPU": 2.0, "GPU": 0.0}))
    orphans = job.orphans({"CPU": 2, "GPU": 0})
    assert [orphans.freed(LOOK_EVERY_S * look) for look in range(2)] == [0, 1]


def test_a_group_that_cannot_be_given_back_is_tried_again_and_keeps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    job, tried = Job(stuck=group(), dead=group()), list[str]()

    def remove(name: str) -> None:
        tried.append(name)
        if name == "stuck" and tried.count(name) == 1:
            raise ConnectionError("away")
        Job.remove(job, name)

    monkeypatch.setattr(job, "remove", remove)
    orphans = job.orphans()
    assert [orphans.freed(LOOK_EVERY_S * look) for look in range(4)] == [0, 1, 1, 0]
    assert sorted(job.removed) == ["dead", "stuck"]


@pytest.mark.parametrize("error", [RayStateApiException("no answer"), ConnectionError("away"), OSError("requests")])
def test_a_cluster_that_does_not_answer_between_two_looks_makes_the_first_one_void(error: Exception) -> None:
    job = Job(dead=group())
    job.error = error
    orphans, found = job.orphans(), []
    for look, answers in enumerate((True, False, True, True)):
        job.answers = answers
        found.append(orphans.freed(LOOK_EVERY_S * look))
    assert found == [0, 0, 0, 1]
