"""The result of a search: kept and read again, printed, and told to MLflow."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from cedm_ray.errors import UserError
from cedm_ray.granularity.decision import TieSet
from cedm_ray.report.bound_figure import FittedCurve
from cedm_ray.stages.results.bounds import LowerBound, ProbeRecord, UpperBound
from cedm_ray.stages.results.logged import track_result
from cedm_ray.stages.results.printed import show
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.results.result_file import read_result
from cedm_ray.stages.training.records import FinalScore, State, TrialRecord

SCORES = tuple(
    {"metric": metric, "value": value, "std": std, "detector": "lenet", "weights_hash": "ab" * 32, "resize": "none",
     "dtype": "float32", "num_images": 1800, "num_reference": 1797, "num_sets": 3}
    for metric, value, std in (("fd_lenet", 0.31, 0.03), ("kid", 0.002, None))
)  # fmt: skip


def trial(clusters: int, scores: dict[int, float], grouping: str = "temi", state: State = "complete",
          reason: str | None = None) -> TrialRecord:  # fmt: skip
    rungs = tuple(
        {"kimg": k, "nimg": 1000 * k, "score": s, "fd_lenet": s, "num_images": 1800} for k, s in scores.items()
    )
    label = f"C={clusters}" if grouping == "temi" else "unconditional"
    params = {"grouping": grouping, "num_clusters": clusters}
    return TrialRecord(f"{grouping}{clusters}", label, grouping, clusters, params, state, 0.98, rungs, reason)


@pytest.fixture
def result(tmp_path: Path) -> SearchResult:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.json").touch()
    trials = (
        trial(1, {20: 1.117}, "none"), trial(17, {15: 1.5, 20: 0.45, 30: 0.3}), trial(25, {20: 0.46}),
        trial(128, {15: 2.0}, state="stopped"), trial(9, {}, state="failed", reason="loss is [nan]"),
    )  # fmt: skip
    probes = (ProbeRecord(150, 0.97, "low", 0, 2, 60), ProbeRecord(170, 0.95, "full", 1, 4, 60))
    curve = FittedCurve((100.0, 200.0), (0.99, 0.93), (0.98, 0.92), (1.0, 0.94))
    return SearchResult(
        name="digits-1a2b", folder=str(tmp_path), grouping="temi", metric="fd_lenet", metrics=("fd_lenet",),
        scored={"detector": "lenet", "weights_hash": "ab" * 32, "resize": "none", "dtype": "float32", "dim": 64,
                "count": 1797},
        images_sha256="cd" * 32, num_images=1800, total_kimg=20, cutoff=0.96,
        upper_bound=UpperBound(165, (142, 204), 0.95, "found", probes, curve),
        lower_bound=LowerBound(((250, 33), (330, 35))), searched=(2, 204),
        trials=trials, best=17, tie_set=TieSet(17, (17, 25), 17, 0.1, 0.45, 0.5, 0.015, None), pareto=None,
        final=FinalScore(17, 30, 0.31, 0.03, 3, 1800, str(tmp_path / "export"), SCORES),
        mosaics={17: "/store/clusters.png"}, confidence=None,
        costs={"spent_mimg": 0.1, "grid_mimg": 0.3, "device_hours": 1.25, "energy_kwh": None},
        tracking_uri="sqlite:///mlflow.db", ui_command="mlflow server", run_id="run",
    )  # fmt: skip


NOTHING_SEARCHED = {"upper_bound": None, "lower_bound": None, "searched": None}


@pytest.mark.parametrize("changed", [{}, {**NOTHING_SEARCHED, "pareto": (9, 17)}], ids=["searched", "given"])
def test_what_is_kept_as_json_is_read_as_it_was(result: SearchResult, changed: dict[str, Any], tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    wanted = replace(result, **changed)
    (tmp_path / "result.json").write_text(json.dumps(asdict(wanted)))
    assert read_result(tmp_path) == wanted


def without(*path: str | int) -> Callable[[Any], Any]:
    """Removes what stands at a place in a tree."""

    def remove(tree: Any) -> Any:
        held = tree
        for part in path[:-1]:
            held = held[part]
        del held[path[-1]]
        return tree

    return remove


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda _: [], "it holds no map"),
        (without("metric"), "metric: field required"),
        (without("best"), "best: field required"),
        (without("trials", 1, "state"), r"trials\.1\.state: field required"),
        (without("upper_bound", "probes", 0, "ratio"), r"upper_bound\.probes\.0\.ratio: field required"),
        (lambda tree: {**tree, "best": "many"}, "best: input should be a valid integer"),
    ],
    ids=["no map", "no metric", "no best", "no state", "no ratio", "no number"],
)
def test_a_damaged_result_is_refused_in_one_line(
    result: SearchResult, damage: Callable[[Any], Any], why: str, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text(json.dumps(damage(json.loads(json.dumps(asdict(result))))))
    with pytest.raises(UserError, match=f"the result of {tmp_path} is damaged .{why}.*; remove that file and run"):
        read_result(tmp_path)


def printed(result: SearchResult) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    show(result, console)
    return cast(io.StringIO, console.file).getvalue()


def test_everything_that_was_found_is_printed(result: SearchResult) -> None:
    said = printed(result)
    assert "C_max 165; interval [142, 204]" in said and "C=9 failed: loss is [nan]" in said
    pairs = [line.strip() for line in said.splitlines()[-11:]]
    assert pairs == [
        "best C  17",
        "fd_lenet at 20 kimg  C=17: 0.45",
        "unconditional: 1.117",
        "tie set  C = 17, 25 within the noise of 10.0%; the smallest is 17",
        "cost  0.1 Mimg (a full grid: 0.3 Mimg), 1.25 device-hours",
        "lower bound  at gamma 1 TEMI uses 34 clusters (deviation 1.4) when it is given 250, 330",
        "final  The best of the tried numbers of clusters in [2, 204) is 17: fd_lenet 0.31 +- 0.03 at 30 kimg "
        "(3 x 1,800 images).",
        "score  Fréchet distance on 64 features of lenet, 1,800 generated against 1,797 real images; not comparable "
        "with FID or FDD",
        f"artifacts  {result.folder}",
        f"model  {result.final.export}",
        "MLflow UI  mlflow server",
    ]


def test_a_search_over_nothing_and_a_capped_one_say_so(result: SearchResult) -> None:
    given = printed(replace(result, **NOTHING_SEARCHED, page="http://there"))
    assert "C_max" not in given and "Trained on temi (17 groups): fd_lenet 0.31" in given
    assert given.endswith("its page  http://there\n")
    assert result.upper_bound is not None
    capped = replace(result, upper_bound=replace(result.upper_bound, outcome="capped"))
    assert "C_max is the number of images." in printed(capped) and "C_max is the number" not in printed(result)


class Told:
    """What MLflow's run is told."""

    parent_key = "key"

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}
        self.files: list[tuple[str | None, str]] = []

    def points(self, run: str, values: dict[str, float], step: int = 0) -> None:
        assert run == self.parent_key
        self.values |= {(name, step): value for name, value in values.items()}

    def artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        self.files.append((folder, path.name))


def test_mlflow_is_told_every_figure_under_a_name_that_says_its_terms(result: SearchResult, tmp_path: Path) -> None:
    told = Told()
    track_result(cast(Any, told), result, [tmp_path / "trials.csv"])
    assert told.files == [(None, "trials.csv"), ("export", "model.json")]
    efficiency = told.values.pop(("sample_efficiency_against_unconditional", 0))
    assert efficiency > 1
    assert told.values == {
        ("best_num_clusters", 0): 17, ("final_kimg", 0): 30, ("tie_set_smallest", 0): 17, ("tie_set_size", 0): 2,
        ("spent_mimg", 0): 0.1, ("grid_mimg", 0): 0.3, ("device_hours", 0): 1.25,
        ("c_max", 0): 165, ("c_max_lower", 0): 142, ("c_max_upper", 0): 204,
        ("final_fd_lenet_1800", 0): 0.31, ("final_fd_lenet_1800_std", 0): 0.03, ("final_kid_lenet_1800", 0): 0.002,
        ("fd_lenet_1800_by_clusters", 17): 0.45, ("fd_lenet_1800_by_clusters", 25): 0.46,
        ("fd_lenet_1800_by_clusters", 128): 2.0,
        ("utilization_ratio_by_clusters_low_fidelity", 150): 0.97, ("utilization_ratio_by_clusters", 170): 0.95,
    }  # fmt: skip
