"""What a search would do, printed as a user asks for it: in a process of its own, which must leave nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cedm_ray.config import load
from cedm_ray.search import main

DIGITS = ["--dataset", "digits", "--dry-run"]
# The command, and then whether Ray was started or MLflow imported by it.
PROGRAM = """
import runpy, sys
try:
    runpy.run_module("cedm_ray.search", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    import ray
    print("ray started" if ray.is_initialized() else "no ray", "mlflow" in sys.modules)
    raise
"""


def dry_run(folder: Path, *flags: str, program: bool = False) -> subprocess.CompletedProcess[str]:
    command = ["-c", PROGRAM] if program else ["-m", "cedm_ray.search"]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *command, *DIGITS, *flags], capture_output=True, text=True, timeout=120, check=False,
        cwd=folder, env={**os.environ, "PYTHONPATH": root, "RAY_TMPDIR": str(folder / "ray"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_dry_run_prints_the_plan_writes_nothing_and_starts_no_ray(tmp_path: Path) -> None:
    done = dry_run(tmp_path, program=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "no ray False"
    assert lines[0] == "plan for digits, 1,797 images (nothing is started)"
    said = dict(line.strip().split("  ", 1) for line in lines[1:] if "  " in line.strip())
    config = load(["--dataset", "digits"])
    grid, total = config.granularity.grid_points, config.granularity.total_kimg
    allowed_kimg = config.granularity.share * grid * total
    around_kimg = (
        2 * total + config.final.total_kimg - total
    )  # without a condition, on the labels, and the best goes on
    assert said["grid"].startswith(f"{grid} numbers of clusters") and f": {grid * total / 1000:g} Mimg" in said["grid"]
    assert f"at most {allowed_kimg / 1000:.4g} Mimg" in said["search"]
    assert f"at most {(allowed_kimg + around_kimg) / 1000:.4g} Mimg" in said["in all"]
    assert f"{(grid * total + around_kimg) / 1000:.4g} Mimg with the full grid" in said["in all"]
    assert said["time"].startswith("unknown") and "--budget.images-per-s" in said["time"]
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "--budget.mimg", "0.01")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    # 20 kimg each for one C, without a condition and on the labels, and 10 more for the best.
    assert line.startswith("error: budget.mimg is 0.01; ") and "0.07 Mimg" in line and "raise it" in line
    assert list(tmp_path.iterdir()) == []


def test_a_speed_gives_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, "--budget.mimg", "0.13", "--budget.images-per-s", "130"]) == 0
    # 130,000 images at 130 a second are 1,000 s, on 2 workers.
    assert (
        "about 0.556 device-hours, 0.278 hours of the clock (one training after another), at 130 images/s (as given)"
        in (capsys.readouterr().out)
    )
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_still_to_be_fetched_are_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dataset", "cifar10", "--data-dir", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan for cifar10, the images are not there yet (nothing is started)")
    assert list(tmp_path.iterdir()) == []
    assert main(["--dataset", str(tmp_path / "none"), "--resolution", "8", "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget.gpu-hours", "0.01", "--budget.images-per-s", "100"], "budget.gpu_hours is 0.01; "),
        (["--budget.wall-hours", "0.01", "--budget.images-per-s", "100"], "budget.wall_hours is 0.01; "),
        (["--budget.mimg", "0"], "mimg is 0.0; it must be above 0"),
    ],
)
def test_limits_that_hold_nothing_are_refused(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*DIGITS, *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert message in said.err
    assert list(tmp_path.iterdir()) == []
