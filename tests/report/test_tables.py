import csv
import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from cedm_ray.report.rows import Row, ScoreRow
from cedm_ray.report.tables import probes_table, scores_table, to_csv, trials_table

ROWS = (
    Row(1000, 0.72, 0, None, "probe"),
    Row(100, 0.9987, 200_000, 1.6674293, "complete"),
    Row(20, 1.0, 12.5, 2.5, "stopped", "kmeans"),
    Row(100, 0.9987, 1_000, 2.25, "stopped"),
    Row(300, None, 0, None, "failed", "a|b"),
)


def plain(table: Table, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_trials_stand_in_order_with_the_best_marked_once() -> None:
    text = plain(trials_table(ROWS, "fd_lenet", 100))
    body = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert body[0] == ["C", "r_C", "kimg", "FD (lenet)", "state", "grouping"]
    assert body[1:4] == [
        ["20", "1.0000", "12.5", "2.5", "stopped", "kmeans"],
        ["* 100", "0.9987", "200,000", "1.667", "complete", "temi"],
        ["100", "0.9987", "1,000", "2.25", "stopped", "temi"],
    ]
    assert body[4][:5] == ["300", "-", "0", "-", "failed"]
    assert "1000" not in text.replace("1,000", "")


def test_without_a_best_nothing_is_marked() -> None:
    assert "*" not in plain(trials_table(ROWS, "fid", None))


@pytest.mark.parametrize("metric", ["fid", "fd_vit_base_patch16_224_dino"])
def test_tables_fit_80_columns_in_plain_ascii(metric: str) -> None:
    rows = [*ROWS, Row(123_456, 0.5, 200_000_000, 1234.5678, "complete", "temi with a long name of its own")]
    for table in (trials_table(rows, metric, 100), probes_table(rows, utilization_cutoff=0.96, c_max=None)):
        text = plain(table)
        assert text.isascii()
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "123456" in text
        assert "…" not in text
    assert "1,235" in plain(trials_table(rows, metric, 100)) or "1235" in plain(trials_table(rows, metric, 100))


def test_probes_say_on_which_side_of_the_cutoff_they_lie() -> None:
    rows = [Row(5, 0.97, 0, None, "probe"), Row(7, 0.96, 0, None, "probe"), Row(9, None, 1, 2.0, "complete")]
    text = plain(probes_table(rows, utilization_cutoff=0.96, c_max=7))
    body = [cells(line) for line in text.splitlines() if line.startswith("|")][1:]
    assert body == [["5", "0.9700", "above"], ["7", "0.9600", "at or below"]]
    assert "cutoff 0.96; C_max 7" in text
    assert "C_max not found yet" in plain(probes_table(rows, utilization_cutoff=0.96, c_max=None))


def test_csv_keeps_every_digit_and_leaves_the_unknown_empty() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(ROWS, "fid"))))
    assert len(rows) == len(ROWS)
    by_state = {row["state"]: row for row in rows}
    assert float(by_state["complete"]["fid"]) == 1.6674293
    assert by_state["failed"] == {
        "num_clusters": "300",
        "utilization_ratio": "",
        "kimg": "0",
        "fid": "",
        "state": "failed",
        "grouping": "a|b",
    }


PROBES = (
    Row(600, 0.955, 0, None, "probe", fidelity="full", seed=1),
    Row(600, 0.97, 0, None, "probe", fidelity="full", seed=0),
    Row(600, 0.95, 0, None, "probe", fidelity="low", seed=0),
    Row(50, 1.0, 200, 3.0, "complete"),
)


def test_probes_show_fidelity_and_seed_in_order_where_a_row_has_them() -> None:
    text = plain(probes_table(PROBES, utilization_cutoff=0.96, c_max=642))
    head, *body = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert head == ["C", "r_C", "against the cutoff", "fidelity", "seed"]
    assert body == [
        ["50", "1.0000", "above", "-", "-"],
        ["600", "0.9700", "above", "full", "0"],
        ["600", "0.9550", "at or below", "full", "1"],
        ["600", "0.9500", "at or below", "low", "0"],
    ]
    assert text.isascii()


@pytest.mark.parametrize(("given", "due"), [({}, []), ({"fidelity": "low"}, ["fidelity"]), ({"seed": 0}, ["seed"])])
def test_only_columns_that_a_shown_row_fills_are_there(given: dict[str, Any], due: list[str]) -> None:
    rows = [Row(5, 0.9, 0, None, "probe", **given), Row(6, 0.8, 0, None, "probe")]
    text = plain(probes_table(rows, utilization_cutoff=0.96, c_max=5))
    head = next(cells(line) for line in text.splitlines() if line.startswith("|"))
    assert head == ["C", "r_C", "against the cutoff", *due]
    assert next(csv.reader(io.StringIO(to_csv(rows, "fid"))))[6:] == due


@pytest.mark.parametrize(
    ("interval", "due"),
    [
        (None, "cutoff 0.96; C_max 642"),
        ((610, 676), "cutoff 0.96; C_max 642; interval [610, 676]"),
        ((610, None), "cutoff 0.96; C_max 642; interval from 610, open above"),
    ],
)
def test_the_interval_of_c_max_stands_below_the_probes(interval: tuple[int, int | None] | None, due: str) -> None:
    text = plain(probes_table(PROBES, utilization_cutoff=0.96, c_max=642, interval=interval))
    assert text[text.index("cutoff 0.96") :].split() == due.split()


def test_csv_tells_repeats_of_a_probe_apart() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(PROBES, "fid"))))
    found = [(row["num_clusters"], row["utilization_ratio"], row["fidelity"], row["seed"]) for row in rows]
    assert found == [
        ("50", "1.0", "", ""),
        ("600", "0.97", "full", "0"),
        ("600", "0.955", "full", "1"),
        ("600", "0.95", "low", "0"),
    ]


REPEATED = (ROWS[1], Row(100, 0.9987, 200_000, 1.5, "complete", train_seed=8))


def test_a_repeated_training_is_told_by_its_seed_and_never_the_best() -> None:
    text = plain(trials_table(REPEATED, "fd_lenet", 100))
    body = [cells(line) for line in text.splitlines() if line.startswith("|")][1:]
    assert [(row[0], row[4]) for row in body] == [("* 100", "complete"), ("100", "complete, seed 8")]
    rows = list(csv.DictReader(io.StringIO(to_csv(REPEATED, "fid"))))
    assert [row["train_seed"] for row in rows] == ["", "8"]


def test_the_clustering_of_a_repeated_training_counts_once() -> None:
    text = plain(probes_table(REPEATED, utilization_cutoff=0.96, c_max=None))
    assert [line for line in text.splitlines() if line.startswith("|")][1:] == ["| 100 | 0.9987 | above              |"]


def test_the_final_scores_stand_in_their_order_with_what_they_were_made_of() -> None:
    scores = [
        ScoreRow("fid", 2.0123456, 0.0123, "inception", 50_000, 60_000, 3),
        ScoreRow("precision", 0.5, None, "inception", 1_800, 60_000, 1),
    ]
    text = plain(scores_table(scores))
    head, *body = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert head == ["score", "value", "+-", "detector", "images"]
    assert body == [
        ["fid", "2.0123", "0.012", "inception", "3 x 50,000 against 60,000"],
        ["precision", "0.5", "", "inception", "1,800 against 60,000"],
    ]
    assert text.isascii() and max(len(line) for line in text.splitlines()) <= 80
