import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.errors import UserError
from cedm_ray.report.read_run import read_run
from cedm_ray.report.rows import Row, TieSet
from cedm_ray.report.run import Run

Tree = dict[str, Any]
Maker = Callable[..., Tree]
FOLDER = Path("runs/toy-1")


def test_rows_hold_the_scores_at_the_budget_of_the_search(result: Maker) -> None:
    run = Run.from_tree(result(), FOLDER)
    assert [(r.num_clusters, r.grouping, r.kimg, r.score, r.state) for r in run.rows()] == [
        (1, "none", 200, 4.0, "complete"),
        (10, "labels", 200, 2.5, "complete"),
        (10, "temi", 200, 3.03, "complete"),
        (20, "temi", 200, 3.0, "complete"),  # and not 2.0, of the final training
        (90, "temi", 100, 9.0, "stopped"),
    ]
    assert [row.score for row in run.rows("fdd")] == pytest.approx([40, 25, 30.3, 30, 90])
    assert {row.num_images for row in run.rows()} == {5000}
    assert run.baselines() == {"unconditional": 4.0, "labels (10)": 2.5}
    assert run.baselines("fdd") == {"unconditional": 40.0, "labels (10)": 25.0}


def test_what_is_known_of_the_bound_and_of_ties_is_there(result: Maker) -> None:
    run = Run.from_tree(result(), FOLDER)
    assert (run.c_max, run.interval, run.metrics, run.pareto) == (110, (100, 120), ("fid", "fdd"), (20,))
    assert run.tie_set == TieSet((10, 20), smallest=10, best=20, margin=0.02, low=3.0, high=3.06)
    assert run.probe_rows() == [Row(100, 0.965, 0, None, "probe", "temi", fidelity="full", seed=0)]
    assert run.final is not None and run.final.scores[0].num_sets == 3


def test_a_result_of_an_earlier_version_lacks_what_came_later(result: Maker) -> None:
    tree = result()
    for name in ("metrics", "tie_set", "pareto", "images_sha256"):
        del tree[name]
    run = Run.from_tree({**tree, "upper_bound": None}, FOLDER)
    assert run.metrics == ("fid", "fdd")  # as named in the rungs
    assert (run.tie_set, run.pareto, run.c_max, run.interval, run.mosaics) == (None, None, None, None, {})


def test_tuples_and_unknown_fields_are_taken_as_a_search_passes_them(result: Maker) -> None:
    tree = result()
    tree["trials"] = tuple({**trial, "rungs": tuple(trial["rungs"]), "new": 1} for trial in tree["trials"])
    assert Run.from_tree({**tree, "budget": {"gpu_hours": 2}}, FOLDER) == Run.from_tree(result(), FOLDER)


def test_repeats_have_their_seed_and_stay_out_of_the_firsts(result: Maker, trial: Maker) -> None:
    again = trial("temi", 20, {200: 2.9}, train_seed=5)
    run = Run.from_tree(result([*result()["trials"], again]), FOLDER)
    assert [row.train_seed for row in run.rows()] == [None] * 5 + [5]
    assert len(run.firsts()) == 5
    assert run.best_trial is not None and run.best_trial.rungs[-1].kimg == 400


def test_the_training_that_was_trained_on_may_repeat_the_first_one(result: Maker, trial: Maker) -> None:
    first = trial("temi", 20, {100: 6.0, 200: 3.0}, key="first")
    again = trial("temi", 20, {100: 6.0, 200: 2.9, 400: 2.0}, key="again", train_seed=5)
    run = Run.from_tree(result([first, again]), FOLDER)
    assert run.best_trial is not None and run.best_trial.key == "first"
    assert run.final_trial is not None and run.final_trial.key == "again"
    assert Run.from_tree(result([first, again], final=None), FOLDER).final_trial == run.best_trial
    assert Run.from_tree(result([first, again], best=None, final=None), FOLDER).final_trial is None


def test_of_trials_with_the_best_c_the_complete_one_with_the_lowest_score_is_the_best(
    result: Maker, trial: Maker
) -> None:
    trials = [
        trial("temi", 20, {200: 3.0}, key="worse"),
        trial("temi", 20, {200: 2.0}, key="better"),
        trial("temi", 20, {100: 1.0}, key="stopped", state="stopped"),
        trial("labels", 20, {200: 0.5}, key="labels"),
    ]
    run = Run.from_tree(result(trials), FOLDER)
    assert run.best_trial is not None and run.best_trial.key == "better"
    assert Run.from_tree(result(trials, best=None), FOLDER).best_trial is None


def test_the_best_score_stands_beside_those_of_baselines_that_have_come_as_far(result: Maker, trial: Maker) -> None:
    assert Run.from_tree(result(), FOLDER).compared() == {"C=20": 3.0, "unconditional": 4.0, "labels (10)": 2.5}
    behind = trial("labels", 10, {100: 2.7}, state="failed")
    repeat = trial("temi", 20, {200: 2.9}, train_seed=5)
    trials = [each for each in result()["trials"] if each["grouping"] != "labels"]
    run = Run.from_tree(result([*trials, behind, repeat]), FOLDER)
    assert run.compared() == {"C=20": 3.0, "unconditional": 4.0}
    assert Run.from_tree(result(best=None), FOLDER).compared() == {}


def test_a_score_that_is_no_number_is_no_score(result: Maker, trial: Maker) -> None:
    diverged = trial("temi", 30, {100: 5.0, 200: math.nan})
    run = Run.from_tree(json.loads(json.dumps(result([*result()["trials"], diverged]))), FOLDER)
    assert run.rows()[-1].score is None
    assert run.trials[-1].curve("fid", 30, 5000).points == ((100, 5.0),)


def test_several_sets_of_images_belong_to_the_deciding_metric(result: Maker) -> None:
    tree = result()
    tree["trials"][3]["rungs"][1]["score_sets"] = [2.9, 3.0, 3.1]
    run = Run.from_tree(tree, FOLDER)
    assert run.rows()[3].sets == (2.9, 3.0, 3.1)
    assert run.rows("fdd")[3].sets == ()


def test_files_of_a_storage_folder_that_was_moved_are_found(result: Maker, tmp_path: Path) -> None:
    run = Run.from_tree(result(), tmp_path / "new" / "toy-1")
    assert run.place(Path("/gone/runs/store/x.npy")) == tmp_path / "new" / "store" / "x.npy"
    assert run.place(Path("/elsewhere/x.npy")) == Path("/elsewhere/x.npy")
    here = tmp_path / "x.npy"
    here.touch()
    assert run.place(here) == here


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.pop("metric"), "metric: field required"),
        (lambda tree: tree.pop("trials"), "trials: field required"),
        (lambda tree: tree.pop("num_images"), "num_images: field required"),
        (lambda tree: tree.update(trials=5), "it holds no map of trials and their rungs"),
        (lambda tree: tree.update(trials=[7]), "it holds no map of trials and their rungs"),
        (lambda tree: tree["trials"][0].pop("label"), "trials.0.label: field required"),
        (lambda tree: tree["trials"][1].update(state="lost"), "trials.1.state: input should be 'complete', 'stopped'"),
        (lambda tree: tree["trials"][1]["rungs"][0].update(kimg="x"), "trials.1.rungs.0.kimg: input should be a valid"),
        (lambda tree: tree.update(tie_set={"clusters": [1]}), "tie_set.smallest: field required"),
        (lambda tree: tree["upper_bound"].update(interval=[1]), "upper_bound.interval.1: field required"),
    ],
)
def test_a_damaged_result_is_refused_in_one_line(
    result: Maker, tmp_path: Path, change: Callable[[Tree], object], said: str
) -> None:
    tree = result()
    change(tree)
    (tmp_path / "result.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    message = str(caught.value)
    assert f"the result of {tmp_path} is damaged ({said}" in message and "\n" not in message
    assert message.endswith("remove that file and run the same search again, which reads what is stored")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b'{"a": ', "it is no JSON"), (b"\xff\xfe\x00", "it is no JSON"), (b"[1]", "it holds no map")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"result\.json is damaged \({said}\)"):
        read_run(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no result\.json; give the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="nowhere is no folder; give the folder of a run"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not finished: it has no result\.json yet; run the same search to its end"):
        read_run(tmp_path)


def test_a_search_that_goes_on_is_read_as_far_as_it_is(result: Maker, written: Callable[..., Path]) -> None:
    tree = result(best=None, final=None, tie_set=None, pareto=None)
    folder = written(tree, pictures=False)
    (folder / "result.json").rename(folder / "so_far.json")
    run = read_run(folder)
    assert (run.best, run.final, run.best_trial, len(run.trials)) == (None, None, None, 5)


def test_the_images_are_read_from_the_export_where_the_result_does_not_say(
    result: Maker, written: Callable[..., Path]
) -> None:
    tree = result()
    del tree["images_sha256"]
    folder = written(tree, pictures=False)
    assert read_run(folder).images_sha256 is None
    (folder / "export").mkdir()
    (folder / "export" / "model.json").write_text('{"images_sha256": "77"}')
    assert read_run(folder).images_sha256 == "77"
