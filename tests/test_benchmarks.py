"""The benchmarks: their tables, their command lines, and, marked slow, a tiny run of each."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cedm_ray.data.sources import ArraySource
from cedm_ray.diffusion.model_file import load_model
from cedm_ray.metrics.detectors import FunctionDetector

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
MACHINE = {"processor": "x86_64, Some CPU", "cores": 2, "threads": 2, "gpus": []}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of the folder as a module, which imports the modules beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)  # dataclasses look their module up
        spec.loader.exec_module(made)
        return made

    return load


@pytest.fixture
def tables(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("tables")


def record(figures: Mapping[str, Any], **others: Any) -> str:
    facts = {"machine": MACHINE, "date": "2026-01-02", "command": "python benchmarks/x.py --json a/b.json --seed 1"}
    return json.dumps({**facts, "versions": {}, "figures": figures, **others})


@pytest.fixture
def results(tmp_path: Path, tables: ModuleType) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "frechet.json").write_text(record({"seconds_2048": 0.4567}))
    (folder / "neighbors.json").write_text(record({"seconds": {"exact": {"2000": 0.1, "10000": 2.5}}}))
    changes = {"bf16": {"fid_change_in_scatters": 0.5}, "fp16": {"fid_change_in_scatters": 0.0211}}
    (folder / "precision.json").write_text(record({"by_precision": changes}))
    sizes = [{"images": 10_000, "peak_mib": 837}, {"images": 50_000, "peak_mib": 863}]
    (folder / "embed_memory.json").write_text(record({"by_size": sizes}))
    (folder / "ray_overhead.json").write_text(record({"overhead_share": 0.00123}))
    gpu = {**MACHINE, "gpus": ["NVIDIA H200", "NVIDIA H200"]}
    (folder / "frechet-h200.json").write_text(record({"seconds_2048": 0.1}, machine=gpu))
    (tmp_path / "README.md").write_text(f"Before.\n\n{tables.BEGIN}\n{tables.END}\n\nAfter.\n")
    return folder


def flags(results: Path) -> list[str]:
    return ["--results", str(results), "--readme", str(results.parent / "README.md")]


def test_the_readme_says_what_the_results_say(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_tables_are_written_between_the_markers_and_nothing_else_is_changed(tables: ModuleType, results: Path) -> None:
    assert tables.main(["--check", *flags(results)]) == 1
    assert tables.main(flags(results)) == 0
    text = (results.parent / "README.md").read_text()
    assert text.startswith(f"Before.\n\n{tables.BEGIN}\n") and text.endswith(f"\n{tables.END}\n\nAfter.\n")
    assert "| `frechet` | Fréchet distance, 2,048 features | below 1 s | 0.457 s | A | 2026-01-02 |" in text
    assert "| 0.1 s | B |" in text and "- B: x86_64, Some CPU, 2 cores, 2 x NVIDIA H200" in text
    assert "exact: 2,000: 0.1, 10,000: 2.5" in text and "| 0.123 % |" in text and "| bf16: 0.5, fp16: 0.0211 |" in text
    assert "| flat | 10,000: 837, 50,000: 863 |" in text
    assert "Not measured: `train`, `sample`, `embed`, `workers`, `cifar10_real`." in text
    assert "    python benchmarks/x.py --seed 1\n" in text and "on a GPU: none" not in text
    assert tables.main(["--check", *flags(results)]) == 0


def test_a_figure_that_has_changed_is_noticed(
    tables: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tables.main(flags(results)) == 0
    (results / "frechet.json").write_text(record({"seconds_2048": 0.5}))
    assert tables.main(["--check", *flags(results)]) == 1
    assert "differs from the results; run: python benchmarks/tables.py" in capsys.readouterr().err


def test_without_a_gpu_the_tables_say_so(tables: ModuleType, results: Path) -> None:
    (results / "frechet-h200.json").unlink()
    assert "Nothing here has been measured on a GPU" in tables.section(tables.read_results(results))


def test_the_real_run_has_a_table_of_its_own(tables: ModuleType, results: Path) -> None:
    rows = [
        {"label": "no condition", "num_clusters": 1, "fid": {"5": 200.123, "10": 150.0}},
        {"label": "assignments, C = 100", "num_clusters": 100, "fid": {"5": 190.0}},
    ]
    figures = {"num_images": 2048, "num_real": 5000, "metric": "fid", "kimg": [5, 10], "terms": "small",
               "conditions": rows}  # fmt: skip
    (results / "cifar10_real.json").write_text(record(figures))
    text = tables.section(tables.read_results(results))
    assert "| condition | C | 5 kimg | 10 kimg |\n|---|---:|---:|---:|\n| no condition | 1 | 200.12 | 150.00 |" in text
    assert "| assignments, C = 100 | 100 | 190.00 | - |" in text and "2,048 generated against 5,000 training" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.json", "{", "train.json is no benchmark's result"),
        ("train.json", "[]", "train.json is no benchmark's result"),
        ("sample.json", record({"seconds_per_50k": 3}), "sample.json has no figure speedup_over_baseline"),
        ("../README.md", "no markers", "the README must hold <!-- benchmarks: begin --> and then"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tables: ModuleType, results: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    (results / name).write_text(content)
    assert tables.main(flags(results)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000123, "0.000123"), (0.4567, "0.457"), (12, "12"), (99.96, "100"), (1234.5, "1,230"), (None, "-"), (0, "0")],
)
def test_numbers_have_three_digits_and_no_exponent(tables: ModuleType, value: float | None, shown: str) -> None:
    assert tables.number(value) == shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and f"benchmarks/{name}.py" in said and "usage:" in said


class Real:
    """The real run on images that take no time, with a detector of 16 dimensions."""

    def __init__(self, script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script, self.folder, self._monkeypatch = script, folder, monkeypatch
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (120, 3, 8, 8), dtype=np.uint8)
        source = ArraySource("cifar10", "1", pixels, np.arange(120) % 10, 10)
        np.save(folder / "groups.npy", random.integers(0, 7, 120))

        def features(images: Tensor) -> Tensor:
            return images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((1, 4, 5)).flatten(1)

        detector = FunctionDetector("blocks", 16, features, resize="none", weights_hash="0" * 64)
        monkeypatch.setattr(script, "open_cifar", lambda layout, data_dir: source)
        monkeypatch.setattr(script, "load_inception", lambda weights, device: detector)

    def __call__(self, *flags: str) -> int:
        small = ["--device", "cpu", "--channels", "8", "--channel-mult", "1", "1", "--blocks", "1", "--attn", "--batch",
                 "250", "--images", "40", "--real", "100", "--steps", "2", "--sample-batch", "20", "--first-kimg", "1",
                 "--kimg", "2", "--sample-precision", "float32", "--precision", "float32"]  # fmt: skip
        paths = ["--assignments", str(self.folder / "groups.npy"), "--work", str(self.folder / "work")]
        self._monkeypatch.setattr(sys, "argv", ["cifar10_real.py", *small, *paths, *flags])
        return int(self.script.main())

    @property
    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        content = json.loads((self.folder / "work" / "scores.json").read_text())
        return content["scores"]  # type: ignore[no-any-return]


@pytest.fixture
def real(module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Real:
    return Real(module("cifar10_real"), tmp_path, monkeypatch)


def fids(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, list[float]]:
    return {name: [rung["fid"] for rung in rungs.values()] for name, rungs in scores.items()}


def test_the_real_run_takes_turns_and_scores_every_rung(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    assert real() == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.rsplit(":", 1)[0] for line in lines if " kimg: fd_blocks" in line]
    names = ["no condition", "labels", "assignments, C = 7"]
    assert told == [f"{name}, {kimg} kimg" for kimg in (1, 2) for name in names]
    found = json.loads(lines[-1])["figures"]
    assert found["kimg"] == [1, 2] and [each["num_clusters"] for each in found["conditions"]] == [1, 10, 7]
    assert len({value for values in fids(real.scores).values() for value in values}) == 6
    work = real.folder / "work"
    assert (work / "curves.png").stat().st_size > 1000
    for name, label_dim in (("none", 0), ("labels", 10), ("file", 7)):
        assert load_model(work / name).label_dim == label_dim and (work / name / "samples.png").is_file()


def test_a_real_run_that_is_killed_goes_on_and_comes_to_the_same(
    real: Real, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Real(real.script, tmp_path, monkeypatch)
    assert whole() == 0
    expected = fids(whole.scores)
    (tmp_path / "work").rename(tmp_path / "whole")
    train, steps = real.script.train, []

    def stopping(*args: Any, **named: Any) -> Any:
        for progress in train(*args, **named):
            steps.append(progress)
            yield progress
            if len(steps) == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(real.script, "train", stopping)
    monkeypatch.setattr(real.script, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        real()
    assert list(real.scores) == ["none"]
    assert real() == 0
    assert len(steps) == 3 * 8  # each was saved: no step twice
    found = fids(real.scores)
    assert found == {name: pytest.approx(values, rel=1e-9) for name, values in expected.items()}


def test_time_bounds_the_real_run(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    assert real("--kimg", "1000000", "--minutes", "0.001") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["kimg"] == [1]


def test_a_real_run_is_not_gone_on_with_under_other_settings(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    assert real("--kimg", "1") == 0
    assert real("--steps", "3") == 2
    assert "was begun with steps 2, and now it is 3: give another --work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"), [("--images", "images is 15; it must be at least 16"), ("--real", "real is 15; it must lie in")]
)
def test_too_few_images_for_a_score_are_refused(
    real: Real, capsys: pytest.CaptureFixture[str], flag: str, said: str
) -> None:
    assert real(flag, "15") == 2
    assert said in capsys.readouterr().err


def test_overhead_is_taken_apart(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("ray_overhead")
    monkeypatch.setattr(script, "copy_s", lambda: 0.5)
    start, rung, resume, own = 10.0, 2.0, 20.0, 0.25
    course = {
        "bare": script.Course(3 * own, (0.030, 0.010), ()),
        "one": script.Course(start + rung + own, (0.001,), ()),
        "leg": script.Course(start + 3 * (rung + own), (0.013, 0.015), ()),
        "legs": script.Course(start + 3 * (rung + own) + 2 * resume, (0.011, 0.013), ()),
        "bare again": script.Course(3 * own, (0.012,), ()),
    }
    found = script.figures([course], {})
    assert (found["start_s"], found["per_rung_s"], found["per_resume_s"]) == (start, rung, resume)
    assert found["per_step_s"] == pytest.approx(0.001)
    steps = 100_000_000 / 1024
    assert found["overhead_s"] == pytest.approx(start + 3 * resume + 4 * (rung + 0.5) + steps * 0.001, abs=0.1)
    assert found["overhead_share"] == pytest.approx(found["overhead_s"] / 86_400, abs=1e-5)


def test_scores_that_differ_end_the_overhead_benchmark(module: Callable[[str], ModuleType]) -> None:
    script = module("ray_overhead")
    script.agree(script.Course(0, (), (1.0, 2.0)), script.Course(0, (), (1.0, 2.0001)))
    with pytest.raises(SystemExit, match=r"differ by 5\.0e-02"):
        script.agree(script.Course(0, (), (1.0, 2.1)), script.Course(0, (), (1.0, 2.0)))


TINY: dict[str, tuple[str, list[str]]] = {
    "train": (
        "--channels 8 --mult 1 1 --num-blocks 1 --clusters 4 --batch 4 --images 50 --rounds 2 --precision float32",
        ["speedup_over_baseline", "matmul_share", "images_per_s", "peak_memory_gb"],
    ),
    "sample": (
        "--channels 8 --mult 1 1 --blocks 1 --attention --steps 2 --images 4 --baseline-images 4 --rounds 1 "
        "--precisions float32",
        ["speedup_over_baseline", "seconds_per_50k"],
    ),
    "frechet": ("--dims 32 64 --repeats 1 --batch 2", ["seconds_64", "speedup_over_baseline"]),
    "neighbors": ("--sizes 500 1000 --approximate 1000 --dim 16", ["seconds"]),
    "embed": (
        "--backbone vit_tiny_patch16_224 --images 32 --resolution 8 --batch 8 --rounds 1",
        ["share_of_bare_loop"],
    ),
    "embed_memory": ("--images 200 400 --object-store 100", ["by_size"]),
    "workers": (
        "--channels 8 --blocks 1 --batch 8 --steps 1 --rounds 1 --workers 1 2",
        ["images_per_s", "efficiency", "efficiency_same_cores"],
    ),
    "ray_overhead": ("--rounds 1 --kimg 1 --images 64", ["overhead_share", "per_rung_s"]),
}
"""By script: flags of a run that takes no time, and figures that it must end with."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run_ends_with_its_figures(name: str, tmp_path: Path) -> None:
    flags, wanted = TINY[name]
    file = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *flags.split(), "--json", str(file)],
        capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(file.read_text()) and set(wanted) <= set(last["figures"])
    assert last["machine"]["gpus"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
