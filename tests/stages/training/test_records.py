from typing import Any

import pytest

from cedm_ray.stages.training.records import TrialRecord


def record(kimg: int, state: Any = "stopped") -> TrialRecord:
    rungs = tuple({"kimg": k, "score": 1.0 / k} for k in (2, 4, 8) if k <= kimg)
    return TrialRecord("key", "C=12", "temi", 12, {"grouping": "temi", "num_clusters": 12}, state, rungs=rungs)


@pytest.mark.parametrize("kimg", [2, 4])
def test_a_record_says_what_was_reached(kimg: int) -> None:
    one = record(kimg)
    reached = one.rung_at(8)
    assert reached is not None and reached["kimg"] == kimg and one.rung_at(1) is None
    again = one.with_rung({"kimg": 2, "score": 0.5})
    assert [rung["kimg"] for rung in again.rungs] == [k for k in (2, 4) if k <= kimg] and again.rungs[0]["score"] == 0.5


def test_a_paused_trial_is_not_over() -> None:
    states = ("running", "paused", "stopped", "complete", "failed")
    assert [state for state in states if record(2, state).over] == ["stopped", "complete", "failed"]
