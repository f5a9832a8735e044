import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.errors import UserError
from cedm_ray.report.figures import figures
from cedm_ray.report.pages import efficiencies
from cedm_ray.report.read_run import read_run
from cedm_ray.report.run import Run
from cedm_ray.report.write import make_report, write_report

Maker = Callable[..., dict[str, Any]]
Writer = Callable[..., Path]
EVERY = [
    "trials.csv",
    "upper_bound.png",
    "score_by_clusters.png",
    "metrics_by_clusters.png",
    "score_by_kimg.png",
    "sample_efficiency.png",
    "samples_by_clusters.png",
    "confidence.png",
    "clusters-C10.png",
    "clusters-C20.png",
    "groupings.csv",
    "groupings.md",
]


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not drawn, for tests of what is written and not of how it looks."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_bytes(b"figure"))


def levels(file: Path) -> set[int]:
    """Grey levels that fill at least one image of the picture."""
    found, counts = np.unique(np.asarray(Image.open(file).convert("L")), return_counts=True)
    return {int(level) for level, count in zip(found, counts, strict=True) if count >= 3000} - {255}


def test_a_whole_run_gives_every_file(written: Writer, tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    assert write_report(read_run(written()), out) == [out / name for name in EVERY]
    assert sorted(path.name for path in out.iterdir()) == sorted(EVERY)
    for path in out.glob("*_*.png"):
        assert Image.open(path).size[0] >= 400
    assert (out / "clusters-C10.png").read_bytes() == b"picture 10"
    assert (out / "clusters-C20.png").read_bytes() == b"picture 20"
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [(row["num_clusters"], row["fid"], row["state"]) for row in rows if row["grouping"] == "temi"] == [
        ("10", "3.03", "complete"),
        ("20", "3.0", "complete"),
        ("90", "9.0", "stopped"),
        ("100", "", "probe"),
    ]


@pytest.mark.usefixtures("unrendered")
def test_samples_of_every_model_and_by_confidence_are_in_their_pictures(written: Writer, tmp_path: Path) -> None:
    write_report(read_run(written()), tmp_path)
    assert levels(tmp_path / "samples_by_clusters.png") == {0, 1, 2, 3, 4}
    assert levels(tmp_path / "confidence.png") == {10, 20, 30}


@pytest.mark.usefixtures("unrendered")
def test_what_a_run_does_not_hold_is_left_out_with_the_reason(result: Maker, tmp_path: Path) -> None:
    tree = result(metrics=["fid"], upper_bound=None, tie_set=None)
    tree["trials"] = [trial for trial in tree["trials"] if trial["grouping"] == "temi"]
    report = make_report(Run.from_tree(tree, tmp_path / "toy-1"), tmp_path)
    assert [file.name for file in report.files] == ["trials.csv", "score_by_clusters.png", "score_by_kimg.png"]
    assert dict(report.left_out) == {
        "upper_bound.png": "C_max was not searched",
        "metrics_by_clusters.png": "fid is the only metric",
        "sample_efficiency.png": "nothing was trained to compare the best C with",
        "samples_by_clusters.png": "no checkpoint holds samples.npy",
        "confidence.png": "the run has no samples ordered by their confidence",
        "clusters-C20.png": "the run names no picture of the clustering with C = 20",
        "groupings.csv": "fewer than two groupings were trained to the end; name other runs beside this one",
        "groupings.md": "fewer than two groupings were trained to the end; name other runs beside this one",
    }


@pytest.mark.usefixtures("unrendered")
def test_a_search_that_has_just_begun_has_its_table(result: Maker, trial: Maker, tmp_path: Path) -> None:
    tree = result([trial("none", 1, {}, state="running", ratio=None)], best=None, final=None, tie_set=None)
    report = make_report(Run.from_tree(tree, tmp_path / "toy-1"), tmp_path)
    assert [file.name for file in report.files] == ["trials.csv", "upper_bound.png"]
    reasons = dict(report.left_out)
    assert reasons["score_by_clusters.png"] == reasons["score_by_kimg.png"] == "no trial has a score yet"
    assert reasons["sample_efficiency.png"] == "the best C is not known yet"
    assert efficiencies(Run.from_tree(tree, tmp_path / "toy-1")) == []


def test_a_trial_without_any_number_stops_no_figure(result: Maker, trial: Maker, written: Writer) -> None:
    failed = trial("temi", 33, {}, state="failed", ratio=None)
    folder = written(result([*result()["trials"], failed]))
    assert [file.name for file in make_report(read_run(folder), folder).files] == EVERY


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("store/none-1/samples.npy", b"\x93NUMPY", "samples.npy is damaged"),
        (
            "store/none-1/manifest.json",
            b'{"files": {"samples.npy": 9}}',
            "samples.npy is damaged: samples.npy has 12,416 bytes instead of 9",
        ),
        ("toy-1/confidence.npz", b"PK\x03\x04", "confidence.npz is damaged: it is cut off"),
    ],
)
def test_a_damaged_file_costs_its_own_page_only(written: Writer, name: str, content: bytes, said: str) -> None:
    folder = written()
    (folder.parent / name).write_bytes(content)
    report = make_report(read_run(folder), folder)
    assert len(report.files) == len(EVERY) - 1
    assert [said in reason for _, reason in report.left_out] == [True]


@pytest.mark.usefixtures("unrendered")
def test_values_that_make_no_sense_cost_their_own_page_only(result: Maker, written: Writer) -> None:
    tree = result()
    tree["upper_bound"]["confidence"] = 95.0
    folder = written(tree)
    report = make_report(read_run(folder), folder)
    assert len(report.files) == len(EVERY) - 1
    assert report.left_out == (("upper_bound.png", "confidence is 95.0; it must lie in (0, 1)"),)


@pytest.mark.usefixtures("unrendered")
def test_samples_at_the_budget_of_the_search_come_before_later_ones(result: Maker, written: Writer) -> None:
    folder = written()
    early = folder.parent / "store" / "early"
    early.mkdir()
    np.save(early / "samples.npy", np.full((64, 3, 8, 8), 99, np.uint8))
    changed = (folder / "result.json").read_text().replace('"checkpoint_path": null', f'"checkpoint_path": "{early}"')
    (folder / "result.json").write_text(changed)
    write_report(read_run(folder), folder)
    # The final training's samples (3) give way; the others' newest are those of the budget.
    assert levels(folder / "samples_by_clusters.png") == {0, 1, 2, 99, 4}


@pytest.mark.usefixtures("unrendered")
def test_a_report_can_be_made_again_over_its_own_files(written: Writer) -> None:
    folder = written()
    assert write_report(read_run(folder), folder) == write_report(read_run(folder), folder)


@pytest.mark.usefixtures("unrendered")
def test_a_storage_folder_that_was_moved_still_gives_every_file(written: Writer, tmp_path: Path) -> None:
    folder = written()
    folder.parent.rename(tmp_path / "moved")
    assert len(write_report(read_run(tmp_path / "moved" / folder.name), tmp_path / "out")) == len(EVERY)


def test_the_star_is_at_the_c_that_was_decided_for_and_at_the_lowest_score_before(result: Maker) -> None:
    """Retrainings, or several scores together, may decide for another C than the lowest first score."""
    for best, label in ((10, "best: C = 10, 3.03"), (20, "best: C = 20, 3"), (None, "best: C = 20, 3")):
        run = Run.from_tree(result(best=best, tie_set=None), Path("toy-1"))
        axes = figures(run)["score_by_clusters"].axes[0]
        assert [str(c.get_label()) for c in axes.collections if str(c.get_label()).startswith("best")] == [label]


def test_the_efficiency_is_that_of_the_whole_training(result: Maker) -> None:
    unconditional, labels = efficiencies(Run.from_tree(result(), Path("toy-1")))
    # 6 at 100 and 3 at 200 kimg: on that line 4 is reached at 150; 2.5 lies between 3 at 200 and 2 at 400.
    assert unconditional.factor == pytest.approx(200 / 150)
    share = np.log(3 / 2.5) / np.log(3 / 2)
    assert labels.factor == pytest.approx(200 / (200 * 2**share))


def test_the_efficiency_is_that_of_the_training_that_was_trained_on(result: Maker, trial: Maker) -> None:
    """After retrainings that need not be the first one, which ends with the search."""
    first = trial("temi", 20, {100: 6.0, 200: 3.0})
    again = trial("temi", 20, {100: 6.0, 200: 3.0, 400: 2.0}, train_seed=5)
    trials = [each for each in result()["trials"] if each["num_clusters"] != 20]
    run = Run.from_tree(result([*trials, first, again]), Path("toy-1"))
    assert efficiencies(run) == efficiencies(Run.from_tree(result(), Path("toy-1")))
    assert efficiencies(run)[1].own_kimg is not None  # reached after the end of the search


def test_a_folder_that_cannot_be_written_is_refused(result: Maker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; give another folder with --out"):
        write_report(Run.from_tree(result(), tmp_path), tmp_path / "file" / "out")


def test_runs_on_other_terms_leave_nothing_behind(result: Maker, tmp_path: Path) -> None:
    runs = [Run.from_tree(result(num_images=count), tmp_path / "toy-1") for count in (5000, 50000)]
    with pytest.raises(UserError, match="num_images is 50000 there and 5000 here"):
        make_report(runs[0], tmp_path / "out", runs[1:])
    assert not (tmp_path / "out").exists()
