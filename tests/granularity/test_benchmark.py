import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cedm_ray.settings import GranularitySettings

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "granularity.py"
CLUSTERS = np.array([2, 3, 5, 8, 13, 22, 36, 60, 100, 170])
KIMG = np.array([12.5, 25, 37.5, 50, 75, 100])
FIGURES = ("success_rate", "mimg_share", "mimg_share_max", "regret_median", "regret_95", "success_rate_with_luck")
Figures = Callable[..., dict[str, Any]]
SEARCHED = ["GP + fitted curves", "TPE + promotion ASHA", "random + ASHA"]


def run(*arguments: str | float | Path) -> subprocess.CompletedProcess[str]:
    """The benchmark as a program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module: starting a program takes seconds."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    spec = importlib.util.spec_from_file_location("granularity_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def figures(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Figures:
    """What the benchmark finds, given its flags."""

    def found(*arguments: str | float | Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
        benchmark.main()
        record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return dict(record["figures"])

    return found


def bowls(best: float, seeds: int = 3) -> NDArray[np.float64]:
    """Scores of shape (S, M, R), lowest at so many clusters."""
    rng = np.random.default_rng(0)
    final = 0.1 * (np.log(CLUSTERS) - np.log(best)) ** 2
    scores = np.exp(final[:, None] + 0.4 * ((KIMG / 100) ** -0.4 - 1) + rng.normal(0, 0.005, (seeds, 10, 6)))
    return np.asarray(2.3 * scores)


def write(file: Path, **changes: Any) -> Path:
    arrays = {"num_clusters": CLUSTERS, "kimg": KIMG, "score": bowls(40), **changes}
    np.savez(file, allow_pickle=True, **{name: values for name, values in arrays.items() if values is not None})
    return file


def test_the_built_in_curves_give_figures_for_every_method_and_the_default_is_the_settings_one(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    done = run("--seeds", 6, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert json.loads(out.read_text())["figures"] == found
    settings = GranularitySettings()
    names = {"gp": "GP", "tpe": "TPE", "random": "random"}
    rules = {"fitted": "fitted curves", "promotion": "promotion ASHA", "asha": "ASHA"}
    assert found["default"] == f"{names[settings.sampler_name()]} + {rules[settings.rule_name()]}"
    assert {found["default"], "full grid", "golden section", *SEARCHED} < set(found["methods"])
    for name, method in found["methods"].items():
        assert set(FIGURES) == set(method) and 0 <= method["success_rate"] <= 1 and method["regret_median"] >= 0
        if " + " in name:
            assert 0 < method["mimg_share"] <= method["mimg_share_max"] <= settings.share + 1e-9
        for key in ("success_rate", "mimg_share"):
            assert method[key] == pytest.approx(np.mean([family[name][key] for family in found["families"].values()]))
    assert found["methods"]["full grid"]["mimg_share"] == 1
    default, chance = found["methods"][found["default"]], found["methods"]["random + ASHA"]
    assert default["success_rate"] >= 0.8 and default["regret_95"] < chance["regret_95"]


def test_on_a_file_the_full_grid_never_fails_and_what_is_known_to_be_free_of_luck_decides(
    tmp_path: Path, figures: Figures
) -> None:
    methods = ("--methods", "full grid", "golden section", *SEARCHED)
    found = figures("--curves", write(tmp_path / "a.npz"), *methods)
    (family,) = found["families"].values()
    assert list(found["families"]) == ["a.npz"] and family["full grid"]["seeds"] == 3
    grid = found["methods"]["full grid"]
    assert (grid["success_rate"], grid["mimg_share"], grid["regret_95"]) == (1, 1, 0)
    assert found["methods"]["GP + fitted curves"]["success_rate"] == 1
    # The scores are free of luck at another place than where they are lowest.
    expected = np.tile(np.exp(np.abs(np.log(CLUSTERS / 3))), (3, 1))
    other = figures("--curves", write(tmp_path / "b.npz", expected=expected), *methods)
    assert all(other["methods"][name]["success_rate"] == 0 for name in ("full grid", *SEARCHED))
    assert other["methods"]["full grid"]["regret_median"] == pytest.approx(36 / 3 - 1)


def test_figures_follow_the_curves_and_the_budget(tmp_path: Path, figures: Figures) -> None:
    methods = ("--methods", *SEARCHED)
    files = [
        write(tmp_path / f"{n}.npz", score=scores) for n, scores in enumerate((bowls(40), bowls(2), bowls(7) ** 4))
    ]
    found = [figures("--curves", file, *methods)["methods"] for file in files]
    found.append(figures("--curves", files[0], "--share", 0.6, *methods)["methods"])
    for name in SEARCHED:
        assert len({json.dumps(each[name]) for each in found}) > 2
    assert found[3]["random + ASHA"]["mimg_share"] > 0.3 > found[0]["random + ASHA"]["mimg_share"]


def test_neither_the_order_of_the_clusters_nor_the_unit_of_kimg_matters(tmp_path: Path, figures: Figures) -> None:
    methods, order = ("--methods", *SEARCHED), np.random.default_rng(1).permutation(10)
    plain = figures("--curves", write(tmp_path / "a.npz"), *methods)["methods"]
    shuffled = write(tmp_path / "b.npz", num_clusters=CLUSTERS[order], score=bowls(40)[:, order], kimg=KIMG / 50)
    assert figures("--curves", shuffled, *methods)["methods"] == plain


def test_a_file_may_hold_few_seeds_and_only_so_many_are_taken(tmp_path: Path, figures: Figures) -> None:
    file = write(tmp_path / "a.npz", unconditional=bowls(40)[:, 0])
    (family,) = figures("--curves", file, "--seeds", 2, "--methods", "full grid")["families"].values()
    assert family["full grid"]["seeds"] == 2


def nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    values = values.copy()
    values.flat[3] = np.nan
    return values


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"score": None}, "lacks score"),
        ({"kimg": None, "num_clusters": None}, "lacks kimg, num_clusters"),
        ({"score": bowls(40)[0]}, r"score in .* is float64 \(10, 6\); it must be"),
        ({"score": nan(bowls(40))}, "score in .*; it must be .* finite and above 0"),
        ({"score": -bowls(40)}, "score in .* above 0"),
        ({"score": np.array([{"a": 1}], dtype=object)}, "is no readable .npz file"),
        ({"score": bowls(40).astype(str)}, "score in .* is <U"),
        ({"kimg": KIMG[::-1]}, "kimg in .* must ascend"),
        ({"num_clusters": CLUSTERS.clip(5)}, "num_clusters in .* must be different whole numbers"),
        ({"num_clusters": CLUSTERS + 0.5}, "num_clusters in .* must be different whole numbers"),
        ({"expected": bowls(40)}, r"expected in .* it must be \(3, 10\)"),
        ({"unconditional": KIMG}, r"unconditional in .* it must be \(3, 6\)"),
    ],
)
def test_arrays_that_are_no_curves_are_refused(
    tmp_path: Path, benchmark: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.read_curves(write(tmp_path / "bad.npz", **changes))


def test_a_bad_file_ends_with_one_line_and_status_2(
    tmp_path: Path, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, text = write(tmp_path / "bad.npz", score=None), tmp_path / "text.npz"
    text.write_text("no curves\n")
    done = run("--curves", bad)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {bad} lacks score\n")
    for file in (text, tmp_path / "absent.npz"):
        with pytest.raises(SystemExit) as caught:
            figures("--curves", file)
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and line.startswith(f"error: {file} is no readable .npz file: ")


@pytest.mark.parametrize("flags", [("--seeds", 0), ("--at-once", 0), ("--share", 0), ("--share", 1.5)])
def test_flags_out_of_their_bounds_are_refused(
    flags: tuple[str, float], figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        figures(*flags)
    assert caught.value.code == 2
    assert "must be at least 1, and --share must lie in (0, 1]" in capsys.readouterr().err


GRIDS = {
    "V, luck of every rung": 24,
    "left, exponential": 20,
    "anywhere": 16,
    "logarithmic": 12,
    "three rungs": 10,
    "best C moves": 20,
}


@pytest.fixture
def expected_curves(benchmark: Any) -> Callable[[str], list[tuple[NDArray[np.int64], NDArray[np.float64]]]]:
    """Numbers of clusters and ln(score) free of luck (M, R), of forty seeds of a hard family."""
    import learning_curves

    def made(name: str) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        family = benchmark.HARD[name]
        found = [learning_curves.without_luck(family, np.random.default_rng(seed)) for seed in range(40)]
        return [(clusters, scores) for clusters, _, scores in found]

    return made


def test_the_hard_families_have_the_grids_and_rungs_that_they_are_described_with(
    benchmark: Any, expected_curves: Any
) -> None:
    assert set(benchmark.HARD) == set(GRIDS)
    for name, count in GRIDS.items():
        assert {len(clusters) <= count < 1.3 * len(clusters) for clusters, _ in expected_curves(name)} == {True}
        curves, again = (benchmark.hard(benchmark.HARD[name], 3) for _ in range(2))
        assert np.array_equal(curves.score, again.score) and curves.regret(int(curves.expected.argmin())) == 0
        shares = [0.2, 0.45, 1] if name == "three rungs" else [0.125, 0.25, 0.5, 1]
        assert (curves.kimg / curves.kimg[-1]).tolist() == shares and curves.rungs() == list(range(len(shares)))


def test_the_best_c_of_the_hard_families_lies_and_moves_as_described(expected_curves: Any) -> None:
    ends, moves = {}, {}
    for name in GRIDS:
        found = [(np.log(clusters), scores.argmin(0)) for clusters, scores in expected_curves(name)]
        ends[name] = np.array([(u[best[-1]] - u[0]) / np.ptp(u) for u, best in found])
        moves[name] = np.array([abs(u[best[-1]] - u[best[0]]) for u, best in found])
    assert ends["left, exponential"].max() < 0.45 < np.median(ends["logarithmic"])
    assert ends["anywhere"].min() < 0.2 and ends["anywhere"].max() > 0.8
    assert moves.pop("best C moves").min() >= 1
    assert all(np.median(each) < 0.5 for each in moves.values())


def test_the_hard_families_have_the_shapes_that_they_are_described_with(expected_curves: Any) -> None:
    for clusters, scores in expected_curves("V, luck of every rung"):
        steepness = np.diff(scores[:, -1]) / np.diff(np.log(clusters))
        assert np.unique(steepness.round(6)).size <= 3  # left, right, and across the tip
    for _, scores in expected_curves("left, exponential"):  # of x, x^2, x^4 and x^8
        first, second, third = -np.diff(scores).T
        x = np.sqrt(second / first + 0.25) - 0.5
        assert third / second == pytest.approx(x**2 * (1 + x**2)) and np.all((x > 0) & (x < 1))
    for _, scores in expected_curves("logarithmic"):
        first, second, third = -np.diff(np.exp(scores)).T
        assert first == pytest.approx(second) and third == pytest.approx(second)


def test_luck_is_alike_at_neighbouring_rungs_but_for_the_family_of_independent_luck(
    benchmark: Any, expected_curves: Any
) -> None:
    for name, wanted in (("V, luck of every rung", 0), ("anywhere", 0.9 * np.exp(-np.log(2) / 1.5))):
        luck = []
        for seed, (_, scores) in enumerate(expected_curves(name)):
            luck.append(np.log(benchmark.hard(benchmark.HARD[name], seed).score) - scores)
        all_luck = np.concatenate(luck)
        assert np.corrcoef(all_luck[:, :2].T)[0, 1] == pytest.approx(wanted, abs=0.08)
        assert all_luck.std() == pytest.approx(np.hypot(0.015, 0.005), rel=0.1)


def test_the_hard_families_are_replayed_where_asked_for(figures: Figures) -> None:
    found = figures("--families", "hard", "--seeds", 1, "--methods", "full grid", "golden section")
    assert set(found["families"]) == set(GRIDS)


def test_where_seeds_differ_by_luck_alone_their_mean_is_what_is_expected(benchmark: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    luck = bowls(40, seeds=1) * np.exp(rng.normal(0, 0.02, (60, 10, 6)))
    known = benchmark.read_curves(write(tmp_path / "luck.npz", score=luck))
    assert all(np.allclose(curves.expected, luck[:, :, -1].mean(0)) for curves in known)
    shapes = np.concatenate([bowls(best, seeds=1) for best in np.geomspace(5, 100, 60)])
    unlike = benchmark.read_curves(write(tmp_path / "shapes.npz", score=shapes))
    assert all(curves.expected is None for curves in unlike)
    assert all(curves.expected is None for curves in benchmark.read_curves(write(tmp_path / "few.npz", score=luck[:5])))
