"""The command that samples from a finished search, on small exported models."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cedm_ray import sample as command
from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.clustering.head_file import head_probs, load_head
from cedm_ray.data.digits import digits
from cedm_ray.data.generated import open_generated
from cedm_ray.data.pack import load_packed
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.starts import draw_conditions
from cedm_ray.features.pixels import PixelBackbone, pixel_stats
from cedm_ray.report.grids import sample_grid
from cedm_ray.sample import main
from cedm_ray.stages.results.exported import open_exported

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
MakeExport = Callable[..., Path]


@pytest.fixture(scope="module")
def run(make_export: MakeExport) -> Path:
    return make_export()


@pytest.fixture(scope="module")
def dropped(make_export: MakeExport) -> Path:
    """A run whose model was trained with label dropout."""
    return make_export(label_dropout=0.1)


@pytest.fixture(scope="module")
def others(make_export: MakeExport) -> dict[str, Path]:
    return {"labels": make_export("labels"), "none": make_export("none")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def expected(run: Path, num: int, seed: int = 0, probs: Tensor | None = None, guidance: float = 0.0) -> np.ndarray:
    model = open_exported(run, device=CPU)
    probs = model.cluster_probs if probs is None else probs
    batches = generate(model.net, seed=seed, indices=range(num), cluster_probs=probs, batch_size=num, num_steps=4,
                       guidance=guidance, device=CPU)  # fmt: skip
    return torch.cat(list(batches)).numpy()


def read(folder: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The images of a written folder in the order of their names, and the rows of its table."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])[:, None]
    with (folder / "samples.csv").open(newline="") as file:
        return images, list(csv.DictReader(file))


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels on the edge of two grey levels, which the order of additions can tip."""
    apart = np.abs(a.astype(int) - b)
    return a.shape == b.shape and int(apart.max()) <= 1 and float((apart > 0).mean()) < 2e-3


def test_a_grid_of_the_models_images_is_written_to_the_present_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(run), "--num", "10", "--seed", "7", "--batch-size", "10", "--device", "cpu"]) == 0
    written = Image.open(tmp_path / "samples-seed7.png")
    assert np.array_equal(np.asarray(written), np.asarray(sample_grid(expected(run, 10, seed=7), columns=4)))
    said = capsys.readouterr()
    assert said.out == f"10 images: {tmp_path / 'samples-seed7.png'}\n" and "generating 10 images" in said.err
    assert [file.name for file in tmp_path.iterdir()] == ["samples-seed7.png"]


def test_a_folder_gets_numbered_files_and_a_table(run: Path, tmp_path: Path) -> None:
    assert main(["--run", str(run / "export"), "--num", "13", "--out", "a/made/", "--batch-size", "5"]) == 0
    images, rows = read(tmp_path / "a" / "made")
    assert alike(images, expected(run, 13)) and images.std() > 10 and len(np.unique(images, axis=0)) == 13
    probs = open_exported(run, device=CPU).cluster_probs
    assert probs is not None
    drawn = draw_conditions(0, range(13), probs).tolist()
    assert [list(row.values()) for row in rows] == [[str(i), f"{i:06d}.png", str(c)] for i, c in enumerate(drawn)]
    assert len(list((tmp_path / "a").iterdir())) == 1 and len(list((tmp_path / "a" / "made").iterdir())) == 14
    like = open_generated(str(tmp_path / "a" / "made"), digits())  # as python -m cedm_ray.evaluate reads it
    assert len(like) == 13 and np.array_equal(like.read(0, 13), images)


def test_one_cluster_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    used = np.flatnonzero(load_clustering(run / "export" / "clustering.safetensors").cluster_probs)
    last = int(used[-1])
    assert main(["--run", str(run), "--num", "6", "--cluster", str(last), "--out", "made"]) == 0
    images, rows = read(tmp_path / "made")
    probs = torch.zeros(40)
    probs[last] = 1
    assert alike(images, expected(run, 6, probs=probs)) and {row["cluster"] for row in rows} == {str(last)}
    assert not alike(images, expected(run, 6))


def test_confidence_ranks_the_images_by_the_heads_largest_probability(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--run", str(run), "--num", "21", "--confidence", "--batch-size"]
    assert main([*given, "8", "--out", "made"]) == 0
    images, rows = read(tmp_path / "made")
    backbone = PixelBackbone(pixel_stats(load_packed(run / "images").images), "cpu")
    sure = head_probs(load_head(run / "export" / "head.safetensors"), backbone(torch.from_numpy(images)).numpy()).max(1)
    ranked = np.argsort(-sure, kind="stable")
    assert [int(row["index"]) for row in rows] == ranked.tolist() and ranked.tolist() != list(range(21))
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], sure[ranked], atol=1e-5)
    best, median, worst = sure.max(), np.median(sure), sure.min()
    assert best - worst > 0.01
    assert f"confidence: best {best:.4f}, median {median:.4f}, worst {worst:.4f}\n" in capsys.readouterr().out
    assert main([*given, "21", "--out", "made.png"]) == 0
    grid = np.asarray(Image.open(tmp_path / "made.png"))
    assert np.array_equal(grid, np.asarray(sample_grid(expected(run, 21)[ranked], columns=5)))


def test_guidance_moves_the_images_of_a_model_that_knows_an_answer_without_a_cluster(
    dropped: Path, tmp_path: Path
) -> None:
    for out, guidance in (("plain", "0"), ("guided", "1.5")):
        assert main(["--run", str(dropped), "--num", "6", "--guidance", guidance, "--out", out]) == 0
    plain, guided = read(tmp_path / "plain")[0], read(tmp_path / "guided")[0]
    assert alike(plain, expected(dropped, 6)) and alike(guided, expected(dropped, 6, guidance=1.5))
    assert not alike(plain, guided)


def test_a_model_without_a_condition_is_sampled_too(others: dict[str, Path], tmp_path: Path) -> None:
    assert main(["--run", str(others["none"]), "--num", "4", "--out", "made"]) == 0
    images, rows = read(tmp_path / "made")
    assert alike(images, expected(others["none"], 4)) and {row["cluster"] for row in rows} == {""}


def test_more_steps_give_other_images(run: Path, tmp_path: Path) -> None:
    assert main(["--run", str(run), "--num", "4", "--num-steps", "9", "--out", "made"]) == 0
    assert not alike(read(tmp_path / "made")[0], expected(run, 4))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    status = main([str(each) for each in argv])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cluster", "40"], "cluster is 40; it must lie in [0, 40)"),
        (["--cluster", "-1"], "cluster is -1; it must lie in [0, 40)"),
        (["--guidance", "1"], "trained without label dropout and knows no answer without a cluster; leave it out, or"),
        (["--guidance", "-0.5"], "guidance is -0.5; it must be a finite number, at least 0"),
        (["--guidance", "nan"], "guidance is nan; it must be a finite number"),
        (["--guidance", "inf"], "guidance is inf; it must be a finite number"),
        (["--num", "0"], "num is 0; it must be at least 1"),
        (["--seed", "-1"], "seed is -1; it must lie in [0, 2^64)"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--num-steps", "1"], "num_steps is 1; it must be at least 2"),
        (["--device", "tpu"], "invalid choice 'tpu'"),
        (["--out", "made.jpg"], "ends in .jpg; PNG files are written"),
        (
            ["--confidence", "--backbone-weights", "x.pt"],
            "backbone pixels has no weights; leave out --backbone-weights",
        ),
        (["--run", "nowhere"], "run nowhere is no folder; give that of a finished search"),
        (["--run", "."], "run . holds no exported model"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "--run", run, *flags)
    assert not list(tmp_path.iterdir())


def test_a_cluster_without_images_is_refused_with_those_that_have_some(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probs = load_clustering(run / "export" / "clustering.safetensors").cluster_probs
    empty, used = np.flatnonzero(probs == 0), np.flatnonzero(probs)
    said = refusal(capsys, "--run", run, "--cluster", str(empty[0]))
    head, _, ranges = said.strip().partition("give one of ")
    assert f"cluster is {empty[0]}, which holds no training image" in head
    bounds = [part.split("-") for part in ranges.split(", ")]
    assert [i for part in bounds for i in range(int(part[0]), int(part[-1]) + 1)] == used.tolist()


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("none", ["--cluster", "0"], "the model was trained without a condition; leave it out"),
        ("none", ["--guidance", "1"], "the model has no condition to guide to; leave it out"),
        ("none", ["--confidence"], "the model's grouping is none; leave it out"),
        ("labels", ["--confidence"], "the model's grouping is labels; leave it out"),
        ("labels", ["--cluster", "10"], "cluster is 10; it must lie in [0, 10)"),
    ],
)
def test_what_a_grouping_cannot_do_is_refused(
    others: dict[str, Path], kind: str, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "--run", others[kind], *flags)


def test_cuda_is_refused_where_there_is_none(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA device here" in refusal(capsys, "--run", run, "--device", "cuda")


def test_nothing_that_exists_is_overwritten_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--run", str(run), "--num", "2"]
    (tmp_path / "empty").mkdir()
    assert main([*few, "--out", "empty"]) == 0 and main([*few, "--out", "one.png"]) == 0
    before = (tmp_path / "one.png").read_bytes()
    capsys.readouterr()
    assert "exists; give another file, or --overwrite to replace it" in refusal(capsys, *few, "--out", "one.png")
    for more in ([], ["--overwrite"]):  # a folder never is
        assert "exists and is not an empty folder" in refusal(capsys, *few, "--out", "empty", *more)
    assert "exists and is not an empty folder" in refusal(capsys, *few, "--out", "empty/samples.csv")
    assert (tmp_path / "one.png").read_bytes() == before
    assert main([*few, "--seed", "5", "--out", "one.png", "--overwrite"]) == 0
    assert (tmp_path / "one.png").read_bytes() != before
    capsys.readouterr()
    assert "cannot be written" in refusal(capsys, *few, "--out", "one.png/below/it.png")


@pytest.mark.parametrize("out", ["made.png", "made"])
def test_what_is_interrupted_leaves_nothing(
    run: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **given: object) -> object:
        yield from generate(*_, **{**given, "indices": range(3)})  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", stopped)
    assert main(["--run", str(run), "--out", out]) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was written\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "clustering.safetensors", "head.safetensors",
                                  "pixels.safetensors"])  # fmt: skip
def test_a_damaged_or_missing_file_is_named(
    run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "export", tmp_path / "copy")
    path = tmp_path / "copy" / name
    given = ["--run", "copy", "--num", "2", "--confidence", "--out", "made.png"]
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1 if name != "model.json" else len(whole) - 3):
        path.write_bytes(whole[:length])
        assert str(path.relative_to(tmp_path)) in refusal(capsys, *given)
    torch.save({"a": torch.zeros(2)}, path)
    assert str(path.relative_to(tmp_path)) in refusal(capsys, *given)
    path.unlink()
    assert "copy" in refusal(capsys, *given)
    path.write_bytes(whole)
    assert main(given) == 0


def test_files_of_another_model_are_refused(
    run: Path, others: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "export", tmp_path / "copy")
    for name, said in (
        ("clustering.safetensors", "a clustering into 10 and a model of 40 clusters"),
        ("model.safetensors", "have another shape for model.map_label.weight"),
    ):
        shutil.copyfile(others["labels"] / "export" / name, tmp_path / "copy" / name)
        assert said in refusal(capsys, "--run", "copy")
        shutil.copyfile(run / "export" / name, tmp_path / "copy" / name)
    facts = json.loads((tmp_path / "copy" / "model.json").read_text())
    for key, said in (("num_steps", "lacks 'num_steps'"), ("embedding", "does not name the backbone")):
        less = {name: value for name, value in facts.items() if name != key}
        (tmp_path / "copy" / "model.json").write_text(json.dumps(less))
        assert said in refusal(capsys, "--run", "copy", "--confidence")


def test_confidence_wants_the_very_weights_that_the_search_was_given(
    make_export: MakeExport, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / f"{seed}.pt")
    run = make_export(backbone="test_vit", weights=tmp_path / "0.pt")
    given = ["--run", str(run), "--num", "2", "--confidence", "--out", "made"]
    said = refusal(capsys, *given)
    assert "confidence needs the weights of backbone test_vit that the search was given (SHA-256 " in said
    assert "give their file with --backbone-weights" in said
    said = refusal(capsys, *given, "--backbone-weights", "1.pt")
    assert "backbone weights 1.pt (SHA-256 " in said and "are not those of the search" in said
    assert "backbone weights gone.pt do not exist" in refusal(capsys, *given, "--backbone-weights", "gone.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*given, "--backbone-weights", "~/0.pt"]) == 0
    assert len(read(tmp_path / "made")[1]) == 2


def start(run: Path, *flags: str, program: str = "") -> subprocess.Popen[str]:
    # Importing either library raises from here on: sampling needs neither.
    program = f"import sys; sys.modules['ray'] = sys.modules['mlflow'] = None\n{program}\n" + (
        f"from cedm_ray.sample import main; sys.exit(main({['--run', str(run), *flags]!r}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ray_and_mlflow_are_not_needed(run: Path, tmp_path: Path) -> None:
    process = start(run, "--num", "4", "--confidence")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert (tmp_path / "samples-seed0.png").is_file() and "4 images" in out


def test_control_c_ends_the_command_with_130_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    # A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(run, "--num", "100000", "--out", "made")
    signal.signal(signal.SIGINT, ours)
    deadline_s = time.monotonic() + 120
    while not list(tmp_path.glob(".made.*/*.png")) and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error.endswith("stopped; nothing was written\n"), error
    assert not list(tmp_path.iterdir())


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(flag in said for flag in ("--run", "--confidence", "--guidance", "--out"))
