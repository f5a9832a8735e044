import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cedm_ray.errors import UserError
from cedm_ray.report.groupings import Cell, compare_groupings, groupings_csv, groupings_markdown, groupings_tables
from cedm_ray.report.run import Run

Maker = Callable[..., dict[str, Any]]


def run_of(tree: dict[str, Any], name: str = "toy-1") -> Run:
    return Run.from_tree(tree, Path("runs") / name)


def test_complete_trainings_stand_by_grouping_and_c_over_all_runs(result: Maker, trial: Maker) -> None:
    other = result([trial("kmeans", 10, {200: 3.5}), trial("labels", 10, {100: 5.0, 200: 2.5})], grouping="kmeans")
    found = compare_groupings([run_of(result()), run_of(other, "toy-2")])
    assert found.clusters == [1, 10, 20]  # C = 90 was stopped early
    assert {name: {c: cell.score for c, cell in row.items()} for name, row in found.cells.items()} == {
        "none": {1: 4.0},
        "labels": {10: 2.5},
        "kmeans": {10: 3.5},
        "temi": {10: 3.03, 20: 3.0},
    }
    assert list(found.cells) == ["none", "labels", "kmeans", "temi"]
    assert found.title == "FID of 5,000 images at 200 kimg by grouping and C"


def test_a_training_that_two_runs_share_counts_once(result: Maker) -> None:
    found = compare_groupings([run_of(result()), run_of(result(), "toy-2")])
    assert found.cells["labels"][10] == Cell(2.5, None, 1)


def test_repeats_are_averaged_with_their_deviation(result: Maker, trial: Maker) -> None:
    scores = [3.0, 3.3, 2.7]
    again = [trial("temi", 20, {200: score}, train_seed=seed) for seed, score in enumerate(scores[1:])]
    cell = compare_groupings([run_of(result([trial("temi", 20, {200: 3.0}), *again]))]).cells["temi"][20]
    assert (cell.score, cell.std, cell.count) == (pytest.approx(3.0), pytest.approx(np.std(scores, ddof=1)), 3)
    assert str(cell) == "3 +- 0.3 (3)"


def test_other_settings_compete_and_are_not_averaged(result: Maker, trial: Maker) -> None:
    trials = [
        trial("temi", 20, {200: 3.0}, **{"diffusion.dropout": 0.1}),
        trial("temi", 20, {200: 2.0}, **{"diffusion.dropout": 0.2}),
        trial("temi", 20, {200: 2.2}, **{"diffusion.dropout": 0.2, "train_seed": 1}),
    ]
    cell = compare_groupings([run_of(result(trials))]).cells["temi"][20]
    assert (cell.score, cell.count) == (pytest.approx(2.1), 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "fdd"}, "metric is fdd there and fid here"),
        ({"num_images": 50000}, "num_images is 50000 there and 5000 here"),
        ({"total_kimg": 100}, "total_kimg is 100 there and 200 here"),
        ({"images_sha256": "6b"}, "images is 6b there and 5a here"),
        ({"scored": {"detector": "dinov2"}}, "detector is dinov2 there and inception here"),
    ],
)
def test_runs_on_other_terms_are_refused(result: Maker, changed: dict[str, Any], said: str) -> None:
    message = f"runs/toy-2 cannot be compared with runs/toy-1: {said}; leave it out"
    with pytest.raises(UserError, match=message):
        compare_groupings([run_of(result()), run_of(result(**changed), "toy-2")])


def test_runs_of_unknown_images_are_refused(result: Maker) -> None:
    unknown = run_of(result(images_sha256=None), "toy-2")
    with pytest.raises(UserError, match="runs/toy-2 does not say of which images it is"):
        compare_groupings([run_of(result()), unknown])
    assert compare_groupings([unknown]).clusters == [1, 10, 20]  # alone it is not compared with anything


def test_csv_has_a_line_for_each_grouping_and_empty_fields_where_nothing_is(result: Maker) -> None:
    rows = list(csv.DictReader(io.StringIO(groupings_csv(compare_groupings([run_of(result())])))))
    assert rows == [
        {"grouping": "none", "1": "4.0", "10": "", "20": ""},
        {"grouping": "labels", "1": "", "10": "2.5", "20": ""},
        {"grouping": "temi", "1": "", "10": "3.03", "20": "3.0"},
    ]


def test_markdown_has_as_many_cells_in_every_line(result: Maker) -> None:
    title, empty, *lines = groupings_markdown(compare_groupings([run_of(result())])).splitlines()
    assert title.startswith("FID of 5,000 images") and empty == ""
    assert lines[0] == "| | C = 1 | C = 10 | C = 20 |" and lines[-1] == "| temi |  | 3.03 | 3 |"
    assert {line.count("|") for line in lines} == {5}


def test_the_terminal_gets_every_cell_in_80_columns_of_ascii(result: Maker, trial: Maker) -> None:
    clusters = range(1000, 1025)
    trials = [trial(kind, c, {200: 1e3 + c / 10}) for kind in ("temi", "superclasses") for c in clusters]
    trials += [trial("temi", 1003, {200: 1234.5}, train_seed=1)]
    out = io.StringIO()
    console = Console(file=out, width=80, color_system=None)
    for table in groupings_tables(compare_groupings([run_of(result(trials))])):
        console.print(table)
    text = out.getvalue()
    assert text.isascii() and "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert all(text.count(f"C = {c} ") == 1 for c in clusters)
    assert text.count("superclasses") == 5  # five columns a table, and less where one holds a deviation
    assert text.count(" +- ") == 1
