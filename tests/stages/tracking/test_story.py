import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import _validate_metric_name
from PIL import Image

from cedm_ray.report.run import Run
from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking import links, story
from cedm_ray.stages.tracking.delivery import NOTE_TAG, VIEW_TAG
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE
from cedm_ray.stages.tracking.runs_view import compared_name
from cedm_ray.stages.tracking.tracker import Tracker

MAX_NOTE = 8000  # MLflow's limit for the value of a tag, behind which it cuts


def trial(clusters: int, scores: dict[int, float], grouping: str = "temi", **changed: Any) -> dict[str, Any]:
    label = f"C={clusters}" if grouping == "temi" else "unconditional"
    rungs = [{"kimg": kimg, "score": score, "num_images": 1800} for kimg, score in scores.items()]
    params = {"grouping": grouping, "num_clusters": clusters}
    return {"key": f"{grouping}{clusters}", "label": label, "grouping": grouping, "num_clusters": clusters,
            "params": params, "state": "complete", "utilization_ratio": 0.98, "rungs": rungs} | changed  # fmt: skip


TRIALS = [
    trial(1, {20: 1.117}, "none"),
    trial(128, {15: 2.0}, state="stopped"),
    trial(17, {15: 1.5, 20: 0.45, 30: 0.3}),
    trial(25, {20: 0.46}),
]
TIES = {"clusters": (17, 25), "smallest": 17, "best": 17, "margin": 0.1, "low": 0.45, "high": 0.5}
SCORE = {"metric": "fd_lenet", "value": 0.31, "std": 0.03, "detector": "lenet", "num_images": 1800,
         "num_reference": 1797, "num_sets": 3}  # fmt: skip
PROBES = [{"num_clusters": 150, "ratio": 0.97, "fidelity": "full", "seed": 0}]
DONE = {"best": 17, "tie_set": TIES, "final": {"num_clusters": 17, "kimg": 30, "scores": [SCORE]}}


def run_of(trials: Sequence[dict[str, Any]] = TRIALS, **changed: Any) -> Run:
    bound = {"c_max": 165, "interval": (142, 204), "confidence": 0.95, "probes": PROBES}
    tree = {"name": "digits-1a2b", "grouping": "temi", "metric": "fd_lenet", "num_images": 1800, "total_kimg": 20,
            "cutoff": 0.96, "trials": trials, "upper_bound": bound}  # fmt: skip
    return Run.from_tree(tree | changed, Path("/gone/digits-1a2b"))


def page_of(run: Run, known: Sequence[str] = ()) -> story.Page:
    return story.Page(run, "parent", {key: f"parent/{key}" for key in known})


def test_a_finished_search_says_in_words_what_it_found() -> None:
    assert page_of(run_of(**DONE)).headline() == (
        "**C = 17 is the best of the 3 numbers of clusters that were trained on.** "
        "fd_lenet at 20 kimg, lower is better: C=17: 0.45; unconditional: 1.117. Noise cannot tell C = 25 from it. "
        "Trained on to 30 kimg, it scores 0.31. C_max is 165 (interval [142, 204])."
    )


def test_a_search_that_goes_on_claims_nothing() -> None:
    said = page_of(run_of()).headline()
    assert said.startswith("**No result yet**") and "C_max is 165" in said and "best" not in said


def test_what_was_trained_on_one_given_grouping_is_called_no_search() -> None:
    given = run_of([trial(10, {20: 0.5}, "labels")], grouping="labels", upper_bound=None, best=10,
                   tie_set=TIES | {"clusters": (10,), "best": 10, "smallest": 10})  # fmt: skip
    assert page_of(given).headline().startswith("**Trained on labels (C = 10).** fd_lenet at 20 kimg")


@pytest.mark.parametrize("kimg, name", [(20, "20_kimg/fd_lenet_1800"), (2_000_000, "2000000_kimg/fd_lenet_1800")])
def test_the_name_of_what_compares_comes_first_and_is_one_that_mlflow_takes(kimg: int, name: str) -> None:
    found = compared_name(run_of(total_kimg=kimg))
    assert found == name and min([found, "anmi", "C", "Z", "fd_lenet_1800"]) == found
    _validate_metric_name(found)  # as MLflow does before it writes


def test_the_table_is_in_the_order_of_c_and_leads_to_the_runs_that_are_known() -> None:
    lines = page_of(run_of(**DONE), ["temi17", "temi128"]).table().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in cells] == ["1", "17", "25", "128"]
    assert cells[1][2:] == ["**0.45**", "20", "0.9800", "complete"]
    assert cells[3][2:] == ["2", "15", "0.9800", "stopped"]
    assert cells[1][0] == f"[C=17]({links.page('parent/temi17')})" and cells[2][0] == "C=25"


def test_a_page_of_many_trainings_stays_below_what_mlflow_keeps() -> None:
    trials = [trial(c, {20: 2.0 - c / 1000}) for c in range(1001, 1101)]
    ties = TIES | {"best": 1100, "clusters": tuple(range(1076, 1101))}
    run = run_of(trials, **DONE | {"best": 1100, "tie_set": ties})
    keys = [each.key for each in run.trials]
    text = page_of(run, keys).text([("a fact", "x" * 100)] * 7, list(story.FIGURES))
    shown = [int(c) for c in re.findall(r"\[C=(\d+)\]", text)]
    assert shown == list(range(1077, 1101)) and "76 more" in text  # the best ones, in the order of C
    assert len(links.filled(text, "123456789", lambda key: "f" * 32)) < MAX_NOTE


def test_only_what_the_run_has_is_shown_and_a_bar_in_a_fact_breaks_no_table() -> None:
    text = page_of(run_of(**DONE)).text([("score", "a | b")], ["upper_bound.png"])
    assert "| score | a   b |" in text and "page/upper_bound.png" in text and "score_by_kimg.png" not in text
    assert "[parallel" not in text  # nothing to compare: MLflow has none of the trainings


def test_small_copies_are_made_of_the_figures_of_the_page_alone(tmp_path: Path) -> None:
    sizes = {"upper_bound.png": (1140, 600), "confidence.png": (900, 10), "score_by_kimg.png": (300, 40)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    made = story.small_copies(sorted(tmp_path.iterdir()), tmp_path / "page")
    assert {file.name: Image.open(file).size for file in made} == {
        "upper_bound.png": (760, 400),
        "score_by_kimg.png": (300, 40),
    }


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two empty stores; a database takes seconds to make, a copy of it none."""
    made = [tmp_path_factory.mktemp("story") for _ in range(2)]
    assert tracker(made[0], tmp_path_factory.mktemp("scratch")).close() == 0
    shutil.copyfile(made[0] / "mlflow.db", made[1] / "mlflow.db")
    return made


def tracker(store: Path, folder: Path) -> Tracker:
    return Tracker(database_uri(store), "cedm_ray/story", store / "artifacts", folder)


def search_that_tells(store: Path, folder: Path, run: Run, times: int = 1) -> str:
    """A process of a search: it has all trainings but the unconditional one, and writes its pages; returns its id."""
    track = tracker(store, folder)
    parent = track.start("search", "digits-1a2b", {}, {})
    for each in run.trials[1:]:
        track.child(each.key, each.label, {"C": each.num_clusters}, {"stage": "granularity"})
    for _ in range(times):
        story.tell(track, run, [("cost", "1 Mimg")], ["upper_bound.png"])
    assert track.known("none1") is None and track.close() == 0
    run_id = track.run_id(parent)
    assert run_id is not None
    return run_id


def runs_of(store: Path) -> dict[str, Any]:
    found = MlflowClient(tracking_uri=database_uri(store)).search_runs(["1"])
    return {run.info.run_name: run for run in found}


def test_pages_lead_to_the_runs_of_the_store_that_they_are_in_and_scores_compare(
    stores: list[Path], tmp_path: Path
) -> None:
    run = run_of(**DONE)
    parents = {store: search_that_tells(store, tmp_path, run, times=2) for store in stores}  # the second one is new
    told = [line for line in (tmp_path / OUTBOX_FILE).read_text().splitlines() if '"kind":"note"' in line]
    assert len(told) == 2 * 4  # saying the same again is not worth an operation
    assert len(set(parents.values())) == 2
    for store, parent in parents.items():
        runs = runs_of(store)
        note = runs["digits-1a2b"].data.tags[NOTE_TAG]
        assert "~" not in note and runs["digits-1a2b"].info.run_id == parent
        linked = dict(re.findall(r"\[(C=\d+)\]\(#/experiments/1/runs/(\w+)\?", note))
        assert linked == {name: each.info.run_id for name, each in runs.items() if name.startswith("C=")}
        assert f"/runs/{parent}?" in runs["C=17"].data.tags[NOTE_TAG]
        scores = {name: each.data.metrics.get("20_kimg/fd_lenet_1800") for name, each in runs.items()}
        assert scores == {"digits-1a2b": None, "C=17": 0.45, "C=25": 0.46, "C=128": None}
        assert {name: each.data.metrics.get("num_clusters") for name, each in runs.items()} == {
            "digits-1a2b": None, "C=17": 17, "C=25": 25, "C=128": 128,
        }  # fmt: skip
        tags = MlflowClient(tracking_uri=database_uri(store)).get_experiment("1").tags
        assert parent in json.loads(tags[f"{VIEW_TAG}digits-1a2b"])["searchFilter"]


def test_a_link_makes_no_run_in_a_store_that_has_none(stores: list[Path], tmp_path: Path) -> None:
    track = tracker(stores[0], tmp_path)
    track.start("links", "links", {}, {})
    child = track.child("trial", "C=7", {}, {})
    assert track.close() == 0
    other = tracker(stores[1], tmp_path)
    other.start("links", "links", {}, {})
    other.describe("links", f"[here]({links.page('links')}) [there]({links.page(child)})")
    own = other.run_id("links")
    assert other.close() == 0 and own not in (None, track.run_id("links"))
    runs = runs_of(stores[1])
    note = runs["links"].data.tags[NOTE_TAG]
    assert f"/runs/{own}?" in note and f"/runs/~run/{child}~?" in note and "C=7" not in runs
