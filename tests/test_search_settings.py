"""The command line of the search, as far as it needs no search: help, the list of runs, errors, what is kept."""

import io
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cedm_ray.config import SearchConfig, fingerprint_tree, load
from cedm_ray.report import read_run
from cedm_ray.search import main
from cedm_ray.stages.driver import settings_of
from cedm_ray.stages.show import run_list
from cedm_ray.stages.show.run_list import list_runs, runs_table
from cedm_ray.usage import EXAMPLES, GROUPS, Flag, short_help

ROOT = Path(__file__).parent.parent
FLAGS = [flag for flags in GROUPS.values() for flag in flags]
OF_THE_COMMAND = ("--list-runs", "--plain", "--json", "--help-all")
HEAVY = ("torch", "ray", "mlflow", "pandas", "tyro")


def test_what_is_kept_of_the_settings_holds_no_password() -> None:
    config = SearchConfig(tracking_uri="https://me:secret@mlflow.example.org:5000/base")
    kept = settings_of(config)
    assert kept["tracking_uri"] == "https://mlflow.example.org:5000/base" and "secret" not in str(kept)
    assert settings_of(SearchConfig())["tracking_uri"] is None
    assert (
        settings_of(SearchConfig(tracking_uri="sqlite:////runs/mlflow.db"))["tracking_uri"]
        == "sqlite:////runs/mlflow.db"
    )


def command(*flags: str) -> tuple[subprocess.CompletedProcess[str], float]:
    program = (
        "import runpy, sys\ntry:\n    runpy.run_module('cedm_ray.search', run_name='__main__', alter_sys=True)\n"
        f"finally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done, time.monotonic() - started_s


def test_help_is_short_grouped_and_there_at_once_and_ends_with_three_examples() -> None:
    done, spent_s = command("--help")
    assert done.returncode == 0 and done.stdout == short_help() and done.stderr == "[]\n"
    lines = done.stdout.splitlines()
    assert len(lines) <= 60 and all(f"{group}:" in lines for group in GROUPS)
    assert max(map(len, lines)) <= 101
    examples = lines[lines.index("examples:") + 1 :]
    assert len(examples) == 3 and all(each.startswith("  python -m cedm_ray.search --dataset ") for each in examples)
    print(f"--help took {spent_s:.2f} s, {len(lines)} lines")


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_of_the_short_help_is_one_and_its_default_is_the_setting_s(flag: Flag) -> None:
    if flag.name in OF_THE_COMMAND:
        return
    value: Any = SearchConfig()
    for part in flag.name.removeprefix("--").split("."):
        value = getattr(value, part.replace("-", "_"))
    if flag.default and value is not None:
        assert flag.default == str(value)
    else:  # said in words what happens, or nothing
        assert value is None or value is False


def test_the_examples_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in EXAMPLES.splitlines()[1:]:
        config = load(shlex.split(line)[3:])
        assert config.dataset in line


def test_all_settings_are_in_the_long_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help-all", "--dataset", "cifar100"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--temi.num-heads" in said and "cifar100" in said


def test_flags_of_the_view_are_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert not {"plain", "json"} & set(fingerprint_tree(SearchConfig()))
    assert main(["--dataset", "digits", "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main(["--dataset", "digits", "--plain", "--dry-run"]) == 0
    assert capsys.readouterr().out == dry


def test_json_says_plans_and_errors_and_nothing_else_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    grid = "12 numbers of clusters, log-spaced from 2 to the upper end of C_max's interval, 0.02 Mimg each: 0.24 Mimg"
    assert main(["--json", "--dataset", "digits", "--dry-run"]) == 0
    plan = json.loads(capfd.readouterr().out)  # one object
    assert plan["event"] == "plan" and ["grid", grid] in plan["plan"]
    assert main(["--json", "--dataset", "digits", "--temi.gamma", "3"]) == 2
    error = json.loads(capfd.readouterr().out)
    assert (error["event"], error["status"]) == ("error", 2)
    assert "gamma is 3.0; it must lie in (0, 1]" in error["text"]
    print("standard output is what it was")
    assert capfd.readouterr().out == "standard output is what it was\n"


def trial(grouping: str, clusters: int, *scores: float) -> dict[str, Any]:
    rungs = [{"kimg": 5 * (n + 1), "score": score} for n, score in enumerate(scores)]
    return {"grouping": grouping, "num_clusters": clusters, "rungs": rungs}


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage folder with a run in every state, and with what is no run."""

    def write(name: str, **files: Any) -> None:
        (tmp_path / name).mkdir()
        for file, value in {"config": {"dataset": "digits", "grouping": "temi"}, **files}.items():
            text = value if isinstance(value, str) else json.dumps(value)
            (tmp_path / name / (f"{file}.json" if file != "driver" else "driver.lock")).write_text(text)

    trials = [
        trial("none", 1, 1.0, 1.0),
        trial("temi", 4, 9.0),
        trial("temi", 3, 9.5, math.nan),  # diverged: not the best of those at 10 kimg
        trial("temi", 17, 11.0, 8.5),
        trial("temi", 9, 8, 8.75),
    ]
    so_far = {"metric": "fid", "grouping": "temi", "trials": trials}
    host, gone = socket.gethostname(), subprocess.Popen(["true"])
    gone.wait()
    write("done", result={**so_far, "best": 9, "final": {"mean": 7.25}})
    write("broken-off", so_far=so_far, driver={"host": host, "pid": gone.pid, "since": "x"})
    write("at-work", so_far={**so_far, "trials": trials[:1]}, driver={"host": host, "pid": os.getpid(), "since": "x"})
    write("elsewhere", driver={"host": "node-7", "pid": 1, "since": "x"})
    write("torn", result='{"best": 9, "tri')
    write("odd", so_far={"trials": 3}, driver="[]")
    write("deep", config="[" * 100_000)
    (tmp_path / "store").mkdir()
    (tmp_path / "mlflow.db").touch()
    return tmp_path


def test_the_list_of_runs_tells_state_best_and_score(storage: Path) -> None:
    found = {row.name: row for row in list_runs(storage)}
    told = {name: (row.state, row.best, row.score, row.trials) for name, row in found.items()}
    assert told == {
        "done": ("complete", 9, 7.25, 5),
        "broken-off": ("interrupted", 17, 8.5, 5),  # of those at 10 kimg
        "at-work": ("running", None, None, 1),
        "elsewhere": ("on node-7", None, None, 0),
        "torn": ("unreadable", None, None, 0),
        "odd": ("unreadable", None, None, 0),
        "deep": ("unreadable", None, None, 0),
    }
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row.changed or "") for row in found.values())
    console = Console(width=79, record=True, file=io.StringIO())
    console.print(runs_table(list(found.values())))
    lines = console.export_text().splitlines()
    assert any("fid 7.25" in line for line in lines) and max(map(len, lines)) <= 79
    assert list_runs(storage / "gone") == []


def test_the_list_of_runs_is_there_at_once(storage: Path) -> None:
    done, spent_s = command("--list-runs", "--storage-path", str(storage))
    assert done.returncode == 0 and done.stderr == "[]\n" and len(done.stdout.splitlines()) == 8
    done, _ = command("--list-runs", "--json", f"--storage-path={storage}")
    (line,) = done.stdout.splitlines()
    assert {row["name"] for row in json.loads(line)["runs"]} >= {"done", "torn"}
    done, _ = command("--list-runs", "--storage-path", str(storage / "gone"))
    assert done.returncode == 0 and "no runs in" in done.stdout
    print(f"--list-runs took {spent_s:.2f} s")


def test_the_list_of_runs_is_that_of_the_folder_named_last_or_of_a_bucket_s_copy(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--list-runs", "--storage-path", "gone", f"--storage_path={storage}"]) == 0
    assert "broken-off" in capsys.readouterr().out
    copies = tmp_path / "copies"
    (copies / "s3:").mkdir(parents=True)
    (copies / "s3:" / "bucket").symlink_to(storage)
    assert main(["--list-runs", "--storage-path", "s3://bucket", "--storage-copies", str(copies)]) == 0
    assert "broken-off" in capsys.readouterr().out


def test_a_storage_path_that_is_none_is_one_line_and_status_2_in_the_list_of_runs_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    due = "has the scheme 'gs'; it must be a folder, file:///... or s3://..."
    assert main(["--list-runs", "--storage-path", "gs://bucket/runs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: storage path ") and due in error and error.count("\n") == 1


def test_what_is_wrong_with_a_list_of_runs_is_an_object_for_programs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-runs", "--json", "--storage-path", "gs://bucket/runs"]) == 2
    told = json.loads(capfd.readouterr().out)
    assert (told["event"], told["status"]) == ("error", 2) and "has the scheme 'gs'" in told["text"]


def test_files_are_called_as_their_owners_call_them() -> None:
    assert (run_list.RESULT_FILE, run_list.SO_FAR_FILE) == (read_run.RESULT_FILE, read_run.SO_FAR_FILE)
    assert run_list.CONFIG_FILE == read_run.CONFIG_FILE
