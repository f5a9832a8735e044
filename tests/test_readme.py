"""Every command of the README is run by a test: most of them here, the others where RUN_BY says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.report.__main__ import main as report
from cedm_ray.sample import main as sample
from cedm_ray.search import main as search

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = re.compile(r"(make|python|ray|\.venv/bin/\w+) ")
RUN_BY = {
    "make search": "tests/test_readme.py::test_make_calls_the_program",
    "make test": "tests/test_readme.py::test_make_calls_the_program",
    "python -m cedm_ray.search --dataset /path/to/images --resolution": "tests/test_readme.py::test_a_plan_is_printed",
    "python -m cedm_ray.search --dataset cifar100": "tests/test_readme.py::test_a_plan_is_printed",
    "python -m cedm_ray.search --dataset /path/to/images --search-space": "tests/test_readme.py::test_from_a_folder_on",
    "python -m cedm_ray.search --list-runs": "tests/test_readme.py::test_from_a_folder_on",
    "python -m cedm_ray.sample": "tests/test_readme.py::test_from_a_folder_on",
    "python -m cedm_ray.report": "tests/test_readme.py::test_from_a_folder_on",
    "python -m cedm_ray.doctor": "tests/test_readme.py::test_the_doctor_answers",
    "mlflow ui": "tests/ui/test_mlflow_pages.py",
    "ray ": "tests/cluster/test_ray_up.py",
    "python benchmarks/": "tests/test_benchmarks.py",
}
"""Beginnings of commands, the longest that fits counts, and what runs them."""


def commands() -> list[str]:
    """The commands in indented blocks: lines joined, comments and the path of the environment left out."""
    joined = README.replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in joined.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+", " ", line).removeprefix(".venv/bin/") for line in lines if PROGRAM.match(line)]


def begin(command: str) -> str | None:
    return max((each for each in RUN_BY if command.startswith(each)), key=len, default=None)


def command(start: str) -> list[str]:
    """The one command of the README that is looked up by this beginning, without its program."""
    (found,) = {each for each in commands() if begin(each) == start}
    return shlex.split(found)[3:]


def test_every_command_of_the_readme_is_run_by_a_test_and_every_such_test_exists() -> None:
    found = commands()
    assert len(found) > 20 and {each: begin(each) for each in found if begin(each) is None} == {}
    assert {begin(each) for each in found} == set(RUN_BY)
    for place in RUN_BY.values():
        file, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), place


def test_make_calls_the_program() -> None:
    for target, said in (("search", "-m cedm_ray.search --dataset digits"), ("test", "-m pytest")):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert said in done.stdout


def test_a_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = command("python -m cedm_ray.search --dataset cifar100")
    assert search(flags) == 0 and "nothing is started" in capsys.readouterr().out
    images(tmp_path / "images", 20)
    flags = command("python -m cedm_ray.search --dataset /path/to/images --resolution")
    flags[flags.index("/path/to/images")] = "images"
    assert search([*flags, "--dry-run"]) == 0 and "20 images" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"images"}


def test_the_doctor_answers(tmp_path: Path) -> None:
    flags = command("python -m cedm_ray.doctor")
    flags[flags.index("/mnt/runs")] = str(tmp_path / "runs")
    program = [sys.executable, "-m", "cedm_ray.doctor", *flags]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1) and "versions" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_a_submitted_search_has_flags_that_exist() -> None:
    submitted = [each for each in commands() if "job submit" in each]
    assert submitted
    for each in submitted:
        flags = shlex.split(shlex.split(each)[-1].split("cedm_ray.search ")[1])
        assert load(flags).dataset == "cifar10"


@pytest.mark.slow
@pytest.mark.ray
def test_from_a_folder_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own: search, the list of runs, samples of the best model, the report."""
    images(tmp_path / "images", 850)
    (tmp_path / "search_spaces").symlink_to(ROOT / "search_spaces")
    flags = command("python -m cedm_ray.search --dataset /path/to/images --search-space")
    flags[flags.index("/path/to/images")] = "images"
    done = subprocess.run(
        [sys.executable, "-m", "cedm_ray.search", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=1500,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(tmp_path)
    (run,) = Path("runs").glob("images-*")
    assert search(command("python -m cedm_ray.search --list-runs")) == 0 and run.name in capsys.readouterr().out

    made = [shlex.split(each)[3:] for each in commands() if begin(each) == "python -m cedm_ray.sample"]
    assert len(made) == 2
    for flags in made:
        assert sample([str(run) if flag.startswith("runs/") else flag for flag in flags]) == 0
    assert len(list(Path("samples").glob("**/*.png"))) == 1000
    flags = [flag for flag in command("python -m cedm_ray.report") if not flag.startswith("[") and flag != "RUNS...]"]
    assert report([str(run) if flag.startswith("runs/") else flag for flag in flags]) == 0
    assert (Path("report") / "score_by_clusters.png").is_file()


def images(folder: Path, count: int) -> None:
    """So many handwritten digits as PNG files of 32 x 32 pixels."""
    folder.mkdir()
    for number, pixels in enumerate(digits().read(0, count)):
        Image.fromarray(np.kron(pixels[0], np.ones((4, 4), np.uint8))).save(folder / f"{number:04d}.png")
