import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from cedm_ray.report.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> Any:
    """What makes results for the tests of the report."""
    spec = importlib.util.spec_from_file_location("report_results", ROOT / "tests" / "report" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(made: Any, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs" / "toy-1"
    yield made.write_run(folder, made.add_pictures(folder, made.run_tree()))


def test_everything_is_made_in_the_folder_of_the_run_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    for name in ("trials.csv", "score_by_clusters.png", "samples_by_clusters.png", "clusters-C10.png", "groupings.md"):
        assert (run / name).is_file()
        assert str(run / name) in said.splitlines()
    assert "left out" not in said
    assert "C = 20 is as good as unconditional at its best (4) with 1.33 times fewer images" in said
    assert "| * 20 |" in said and "C_max 110; interval [100, 120]" in said and "Scores of the final model" in said


def test_what_is_left_out_is_named_with_the_reason(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.write_run(tmp_path / "toy-1", made.run_tree(metrics=["fid"]))
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "left out: metrics_by_clusters.png: fid is the only metric" in said.splitlines()
    assert "left out: samples_by_clusters.png: no checkpoint holds samples.npy" in said.splitlines()
    assert [path.name for path in folder.iterdir()] == ["result.json"]
    assert (tmp_path / "out" / "score_by_clusters.png").is_file()


def test_other_runs_stand_beside_it_in_the_table_of_groupings(
    made: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [made.trial_tree("kmeans", 20, {200: 3.7})]
    other = made.write_run(run.parent / "toy-2", made.run_tree(trials, grouping="kmeans"))
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **__: Path(file).touch())
    assert main([str(run), str(other)]) == 0
    assert "kmeans,,,3.7" in (run / "groupings.csv").read_text().splitlines()
    assert "| kmeans |       |        |    3.7 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "the following arguments are required: run"),
        (["{runs}/nowhere"], "nowhere is no folder; give the folder of a run"),
        (["{runs}"], "holds no result.json; give the folder of a run"),
        (["{run}", "--outt", "x"], "unrecognized arguments: --outt x (--help lists every flag)"),
        (["{run}", "--out", "{run}/result.json"], "result.json cannot be written"),
        (["{run}", "{runs}/other"], "other cannot be compared with {run}: metric is fdd there and fid here"),
        (["{runs}/torn"], "torn/result.json is damaged (it is no JSON)"),
        (["{runs}/begun"], "begun is not finished: it has no result.json yet"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    made: Any, run: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made.write_run(run.parent / "other", made.run_tree(metric="fdd"))
    for name, file in (("torn", "result.json"), ("begun", "config.json")):
        (run.parent / name).mkdir()
        (run.parent / name / file).write_text('{"name": ')
    places = {"run": run, "runs": run.parent}
    status = main([each.format(**places) for each in given])
    out, error = capsys.readouterr()
    assert status == 2 and said.format(**places) in error, error
    assert error.startswith("error: ") and error.count("\n") == 1 and out == ""


def test_help_names_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "python -m cedm_ray.report" in said and "--out" in said and "groupings.csv" in said


def test_an_interruption_is_one_line_and_status_130(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cedm_ray.report.__main__.make_report", stop)
    assert main([str(run)]) == 130
    assert capsys.readouterr().err == "stopped; the same command makes the report anew\n"


def test_it_starts_as_a_module_without_ray_mlflow_or_torch(run: Path) -> None:
    program = f"""
import runpy, sys
for name in ("ray", "mlflow", "torch"):
    sys.modules[name] = None  # importing it raises from here on
sys.argv = ["report", {str(run)!r}]
runpy.run_module("cedm_ray.report", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(run / "score_by_clusters.png") in done.stdout.splitlines()
