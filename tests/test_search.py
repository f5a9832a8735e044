"""The whole search, small, on the real digits with a real Ray, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors import safe_open

from cedm_ray.report.__main__ import main as report
from cedm_ray.report.read_run import read_run
from cedm_ray.sample import main as sample
from cedm_ray.search import main
from cedm_ray.stages.storage.paths import database_uri
from helpers.results import result_of

pytestmark = pytest.mark.ray

SMALL_SETTINGS = {
    "temi": {"epochs": 8, "warmup-epochs": 1},
    "bound": {"c-start": 150, "precision": 2.0, "low-heads": 2, "low-spread": 0.6, "lower-clusters": 250},
    "granularity": {
        "rule": "fitted",
        "num-trials": 3,
        "share": 0.2,
        "total-kimg": 4,
        "grace-kimg": 2,
        "startup-trials": 2,
    },
    "score": {"num-images": 200, "num-steps": 4, "also": "backbone", "num-sets": 2},
    "final": {"total-kimg": 5, "num-images": 150, "num-sets": 2},
}
SMALL = [f"--{group}.{name}={value}" for group, values in SMALL_SETTINGS.items() for name, value in values.items()]
SMALL.append("--bound.lower")
FIGURES = (
    "score_by_clusters.png", "metrics_by_clusters.png", "score_by_kimg.png", "sample_efficiency.png",
    "samples_by_clusters.png", "confidence.png",
)  # fmt: skip


def command(storage: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "cedm_ray.search", "--storage-path", str(storage), *flags]


def search(storage: Path, *flags: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(storage, *flags), capture_output=True, text=True, timeout=timeout_s, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search whose driver is killed in the middle of its trials: the storage and what it had printed."""
    storage = tmp_path_factory.mktemp("search") / "runs"
    log = storage.parent / "first.log"
    with open(log, "w") as out:
        driver = subprocess.Popen(command(storage, *SMALL), stdout=out, stderr=out, start_new_session=True)
        deadline_s = time.monotonic() + 300
        while "labels (10): starts" not in log.read_text() and driver.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.2)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    return storage, log.read_text()


@pytest.fixture(scope="module")
def finished(interrupted: tuple[Path, str]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same command again."""
    storage, _ = interrupted
    time.sleep(5)  # the killed Ray's processes notice that their driver is gone
    return storage, search(storage, *SMALL)


def test_the_killed_search_had_got_to_its_trials(interrupted: tuple[Path, str]) -> None:
    storage, said = interrupted
    assert "C_max is" in said and "unconditional: 4 kimg" in said
    (folder,) = storage.glob("digits-*")
    assert read_run(folder).best is None and report([str(folder)]) == 0  # what there is so far can be looked at


def test_the_same_command_goes_on_and_repeats_nothing(
    interrupted: tuple[Path, str], finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    first, second = interrupted[1], finished[1]
    assert second.returncode == 0, second.stdout + second.stderr
    assert (
        "unconditional: starts" in first and "unconditional" not in second.stdout.split("C in [2")[1].split("Trials")[0]
    )
    for line in re.findall(r"C=\d+: \d+ clusters used.*", first):
        assert line in second.stdout
    assert "clustering into" not in second.stdout.split("C_max is")[0]


def test_everything_that_was_promised_is_printed(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    storage, done = finished
    result = result_of(storage)
    said = done.stdout
    bound = result["upper_bound"]
    lower, upper = bound["interval"]
    assert f"C_max {bound['c_max']}; interval [{lower}, {upper}]" in said
    assert f"C_max is {bound['c_max']}, 95% interval [{lower}, {upper}]" in said
    assert lower <= bound["c_max"] <= upper
    for probe in bound["probes"]:
        row = (
            rf"\| +{probe['num_clusters']} \| {probe['ratio']:.4f} \| .* \| {probe['fidelity']} +\| +{probe['seed']} \|"
        )
        assert re.search(row, said), row
    ((given, used),) = result["lower_bound"]["used"]
    assert given == 250 and 2 <= used < 250 and f"at gamma 1 TEMI uses {used} clusters" in said
    for trial in result["trials"]:
        assert re.search(rf"{trial['num_clusters']} \| .*\| {trial['state']} ", said), trial
    assert re.search(rf"best C +{result['best']}\n", said)
    assert "unconditional: " in said and "labels (10): " in said and "mlflow" in said and "fd_lenet" in said
    assert "Traceback" not in said + done.stderr and done.stderr == ""


def test_the_table_holds_the_trials_the_baselines_and_nothing_at_or_above_c_max(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    result = result_of(finished[0])
    temi = [trial for trial in result["trials"] if trial["grouping"] == "temi"]
    assert len({trial["num_clusters"] for trial in temi}) == len(temi) and 2 <= len(temi) <= 3
    assert sum(trial["rungs"][-1]["kimg"] for trial in temi if trial["num_clusters"] != result["best"]) <= 0.2 * 12 * 4
    assert {trial["state"] for trial in temi} <= {"complete", "stopped"}
    upper = result["upper_bound"]["interval"][1]
    assert result["searched"] == [2, upper]
    assert all(2 <= trial["num_clusters"] < upper for trial in temi)
    assert {t["grouping"]: t["state"] for t in result["trials"] if t["grouping"] != "temi"} == {
        "none": "complete", "labels": "complete",
    }  # fmt: skip
    complete = {t["num_clusters"]: t["rungs"] for t in temi if t["state"] == "complete"}
    at_the_end = {c: next(r["score"] for r in rungs if r["kimg"] == 4) for c, rungs in complete.items()}
    assert result["best"] == min(at_the_end, key=lambda c: at_the_end[c])
    assert result["best"] in result["tie_set"]["clusters"] and result["tie_set"]["smallest"] <= result["best"]
    for rungs in complete.values():
        (end,) = (rung for rung in rungs if rung["kimg"] == 4)
        assert len(end["score_sets"]) == 2 and end["score"] == pytest.approx(sum(end["score_sets"]) / 2)
    spent = sum(trial["rungs"][-1]["kimg"] for trial in result["trials"]) / 1000
    assert result["costs"]["spent_mimg"] == pytest.approx(spent) and result["costs"]["grid_mimg"] > spent
    assert result["costs"]["device_hours"] > 0
    assert result["final"]["kimg"] == 5 and result["final"]["num_sets"] == 2 and result["final"]["mean"] > 0


def test_the_final_model_is_scored_by_every_detector_and_each_score_says_its_terms(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    final = result_of(finished[0])["final"]
    scores = {(score["detector"], score["metric"]): score for score in final["scores"]}
    shared = {"kid", "mss", "precision", "recall", "density", "coverage"}
    for detector in ("lenet", "pixels"):
        assert {metric for name, metric in scores if name == detector} == {
            f"fd_{detector}", f"ufd_{detector}", *shared
        }  # fmt: skip
    own = scores["lenet", "fd_lenet"]
    assert (own["value"], own["std"], own["num_sets"]) == (final["mean"], final["std"], 2)
    assert all((score["num_images"], score["num_reference"]) == (150, 1797) for score in scores.values())
    assert all(len(score["weights_hash"]) > 5 or score["detector"] == "pixels" for score in scores.values())
    assert "Scores of the final model" in finished[1].stdout and "coverage" in finished[1].stdout


def test_what_is_exported_can_be_used(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    result = result_of(finished[0])
    export = Path(result["final"]["export"])
    facts = json.loads((export / "model.json").read_text())
    assert facts["label_dim"] == result["best"] and facts["img_resolution"] == 8
    with safe_open(export / "model.safetensors", framework="pt") as file:
        assert any(name.endswith("weight") for name in file.keys())  # noqa: SIM118
    picture = Image.open(export / "samples.png")
    assert picture.width == picture.height > 300
    assert len(picture.getcolors(1 << 16) or []) > 20


def test_mlflow_holds_one_parent_and_one_child_per_trial_and_no_point_twice(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    storage, _ = finished
    result = result_of(storage)
    bound = result["upper_bound"]
    client = MlflowClient(tracking_uri=database_uri(storage))
    experiment = client.get_experiment_by_name("cedm_ray/digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_id for run in parents] == [result["run_id"]]
    assert parents[0].info.status == "FINISHED" and parents[0].data.metrics["c_max"] == bound["c_max"]
    assert [parents[0].data.metrics[f"c_max_{end}"] for end in ("lower", "upper")] == bound["interval"]
    children = [run for run in runs if run.data.tags.get("stage") == "granularity"]
    assert len(children) == len(result["trials"])
    for trial in result["trials"]:
        (run,) = [run for run in children if run.info.run_name == trial["label"]]
        for metric in ("fd_lenet", "fd_pixels"):
            points = client.get_metric_history(run.info.run_id, f"{metric}_200")  # the count is part of the name
            assert [(p.step, p.value) for p in points] == [(rung["kimg"], rung[metric]) for rung in trial["rungs"]]
        assert run.data.params["fd_lenet.count"] == "1797" and len(run.data.params["fd_lenet.weights_hash"]) == 64
        assert run.data.metrics["device_hours"] > 0
        assert run.data.metrics["utilization_ratio"] == trial["utilization_ratio"]
        assert ("anmi" in run.data.metrics) == (trial["grouping"] != "none")
        assert run.data.tags["state"] == trial["state"] and run.data.tags["grouping"] == trial["grouping"]
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert "samples.png" in names and ("clustering" in names) == (trial["grouping"] != "none")
        assert ("clusters.png" in names) == (trial["grouping"] != "none")
        losses = client.get_metric_history(run.info.run_id, "head_loss")
        assert [point.step for point in losses] == ([0, 1, 2, 3] if trial["grouping"] == "temi" else [])
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    assert {*FIGURES, "upper_bound.png", "trials.csv", "groupings.md", "export"} <= names
    assert parents[0].data.metrics["spent_mimg"] == result["costs"]["spent_mimg"]
    assert parents[0].data.metrics["tie_set_smallest"] == result["tie_set"]["smallest"]
    probes = [run for run in runs if run.data.tags.get("stage") == "upper_bound"]
    assert sorted(int(run.data.tags["C"]) for run in probes) == sorted(p["num_clusters"] for p in bound["probes"])
    assert {"low", "full"} == {probe["fidelity"] for probe in bound["probes"]}
    for run in probes:
        quality = {"utilization_ratio", "mean_utilization_ratio", "num_used", "kl_from_uniform", "anmi", "accuracy"}
        assert quality <= set(run.data.metrics)
        heads = client.get_metric_history(run.info.run_id, "head_utilization_ratio")
        assert len(heads) == int(run.data.params["heads"])
        assert abs(sum(h.value for h in heads) / len(heads) - run.data.metrics["mean_utilization_ratio"]) < 1e-9
        assert "clusters.png" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert 0.9 < parents[0].data.metrics["knn_accuracy_20"] < 1


def test_the_report_command_makes_every_figure_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (folder,) = finished[0].glob("digits-*")
    assert report([str(folder), "--out", str(tmp_path / "report")]) == 0
    made = {file.name for file in (tmp_path / "report").iterdir()}
    assert made >= set(FIGURES) and all((folder / name).is_file() for name in FIGURES)


def test_samples_of_the_finished_run_are_those_of_its_export(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (folder,) = finished[0].glob("digits-*")
    picture = tmp_path / "samples.png"
    assert sample(["--run", str(folder), "--num", "64", "--seed", "0", "--out", str(picture)]) == 0
    made, kept = (np.asarray(Image.open(file)).astype(int) for file in (picture, folder / "export" / "samples.png"))
    assert made.shape == kept.shape and np.abs(made - kept).max() <= 1  # sums in another order, at most


def test_a_search_that_is_done_says_so_and_prints_the_same_table_without_ray(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    storage, first = finished
    again = search(storage, *SMALL)
    assert again.returncode == 0 and "all is done" in again.stdout and "starting Ray" not in again.stdout
    assert "starting Ray" in first.stdout
    assert again.stdout.split("Share of clusters used")[1] == first.stdout.split("Share of clusters used")[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "cifar1000"], "dataset 'cifar1000' is unknown; it must be one of digits, cifar10, cifar100"),
        (["--backbone", "pixel"], "backbone 'pixel' is unknown; did you mean pixels"),
        (["--num-neighbors", "1797"], "num_neighbors is 1797; it must be below 1797"),
        (["--score.num-images", "63"], "score.num_images is 63; it must be at least 64"),
        (["--diffusion.channel-mult", "1", "2", "2", "2", "2"], "diffusion: "),
        (["--budget.mimg", "0.01"], "budget.mimg is 0.01"),
        (["--granularity.multi-objective"], "granularity.multi_objective is given, but lenet is the only score"),
        (["--dataset", "cifar10", "--data-dir", "{file}"], "cifar10 is not in {file} and https://"),
    ],
)
def test_a_mistake_ends_before_any_work_with_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    file = tmp_path / "file"  # no folder, so that nothing is downloaded into it where the network allows
    file.touch()
    status = main(["--storage-path", str(tmp_path / "runs"), *(flag.format(file=file) for flag in flags)])
    error = capsys.readouterr().err
    assert status == 2 and said.format(file=file) in error, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not list((tmp_path / "runs").glob("store/embeddings"))


def test_a_training_that_can_never_fit_is_refused_by_the_program(tmp_path: Path) -> None:
    done = search(tmp_path / "runs", "--resources.num-workers", "64")  # known when Ray has started, in its own process
    assert done.returncode == 2 and "resources.num_workers is 64" in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "runs").glob("store/embeddings"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "{folder} holds no image; PNG, JPEG and WebP files are looked for in it and in its subfolders"),
        ([("a.png", "broken")], "{folder}/a.png"),
        ([("a.png", 4)], "{folder}/a.png"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_the_name_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[tuple[str, object]], said: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, what in files:
        if isinstance(what, int):
            Image.new("RGB", (what, what)).save(folder / name)
        else:
            (folder / name).write_text(str(what))
    flags = ["--storage-path", str(tmp_path / "runs"), "--dataset", str(folder), "--resolution", "8"]
    assert main([*flags, "--backbone", "pixels"]) == 2
    error = capsys.readouterr().err
    assert said.format(folder=folder) in error and error.count("\n") == 1, error
