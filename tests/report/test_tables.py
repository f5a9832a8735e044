import csv
import io

import pytest
from rich.console import Console
from rich.table import Table

from cedm_ray.report.rows import Row
from cedm_ray.report.tables import probes_table, to_csv, to_markdown, trials_table

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


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = to_markdown(ROWS, "fid", 100).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert {line.replace("\\|", "").count("|") for line in lines} == {7}
    assert lines[3] == "| **100** | **0.9987** | **200,000** | **1.667** | **complete** | **temi** |"


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
