"""docs/run-folder.md names everything that a search writes down of its result."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.granularity.decision import TieSet
from cedm_ray.report.bound_figure import FittedCurve
from cedm_ray.stages.lower_bound import LowerBound
from cedm_ray.stages.probes import ProbeRecord
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.training.ledger import RUNG_NAMES
from cedm_ray.stages.training.records import FinalScore, TrialRecord
from cedm_ray.stages.upper_bound import UpperBound

PAGE = (Path(__file__).parents[1] / "docs" / "run-folder.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")]


def rows_of(*names: str) -> str:
    """The rows of tables that begin with one of these names."""
    begin = [line for line in ROWS if any(f"`{name}`" in line.split("|")[1] for name in names)]
    assert begin, names
    return "\n".join(begin)


def names_of(kind: Any) -> list[str]:
    assert is_dataclass(kind)
    return [field.name for field in fields(kind)]


@pytest.mark.parametrize("name", names_of(SearchResult))
def test_every_key_of_a_result_begins_a_row(name: str) -> None:
    assert rows_of(name)


@pytest.mark.parametrize("name", [*RUNG_NAMES, "checkpoint_path"])
def test_every_field_of_a_rung_begins_a_row(name: str) -> None:
    assert rows_of(name)


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        ("upper_bound", (UpperBound, ProbeRecord, FittedCurve)),
        ("lower_bound", (LowerBound,)),
        ("tie_set", (TieSet,)),
        ("final", (FinalScore,)),
    ],
)
def test_every_field_of_what_a_result_holds_is_in_its_row(key: str, kinds: tuple[Any, ...]) -> None:
    said = rows_of(key)
    assert [name for kind in kinds for name in names_of(kind) if f"`{name}`" not in said] == []


def test_every_field_of_a_trial_s_record_is_named() -> None:
    (said,) = re.findall(r"A trial's record .*?\n\n", PAGE, re.DOTALL)
    assert [name for name in names_of(TrialRecord) if f"`{name}`" not in said] == []
