import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prdc import compute_prdc

from cedm_ray import evaluate
from cedm_ray.data.digits import digits
from cedm_ray.errors import UserError
from cedm_ray.evaluate import EvaluateSettings, main, write_scores
from cedm_ray.flags import parse_flags
from cedm_ray.metrics.lenet import load_lenet
from cedm_ray.stages.inputs.features import FeatureParts

DIGITS = digits().read(0, 1797)
NUM = 200


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0]).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images to score: real digits with a little noise, and with a lot."""
    place = tmp_path_factory.mktemp("evaluate")
    noise = np.random.default_rng(0).normal(size=DIGITS[:NUM].shape)
    for name, level in (("near", 20.0), ("far", 120.0)):
        noisy = DIGITS[:NUM].astype(float) + level * noise
        write(place / name, noisy.round().clip(0, 255).astype(np.uint8))
    return place


def run(place: Path, images: str, *flags: str) -> list[dict]:  # type: ignore[type-arg]
    out = place / "out.json"
    given = ["--images", str(place / images), "--dataset", "digits", "--detectors", "lenet", "--out", str(out)]
    assert main([*given, "--storage-path", str(place / "runs"), *flags]) == 0
    scores: list[dict] = json.loads(out.read_text())["scores"]  # type: ignore[type-arg]
    return scores


def test_scores_are_printed_kept_and_those_of_the_libraries(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {score["metric"]: score for score in run(place, "near", "--unconditional", str(place / "far"))}
    said = capsys.readouterr().out
    assert set(scores) == {"fd_lenet", "kid", "ufd_lenet", "mss", "precision", "recall", "density", "coverage"}
    assert all(name in said for name in scores) and "200 against 1,797" in said
    assert {score["num_images"] for score in scores.values()} == {NUM}
    weights = next((place / "runs" / "store" / "detectors").glob("*/lenet.safetensors"))
    lenet = load_lenet(weights)
    import torch

    generated = np.stack([np.asarray(Image.open(path)) for path in sorted((place / "near").iterdir())])[:, None]
    expected = compute_prdc(
        lenet(torch.from_numpy(DIGITS)).numpy(), lenet(torch.from_numpy(generated)).numpy(), nearest_k=5
    )
    assert {name: scores[name]["value"] for name in expected} == pytest.approx(expected, abs=0.011)


def test_more_noise_is_worse(place: Path) -> None:
    near, far = ({s["metric"]: s["value"] for s in run(place, name)} for name in ("near", "far"))
    assert near["fd_lenet"] < far["fd_lenet"] and near["kid"] < far["kid"] and near["mss"] > far["mss"]
    assert near["coverage"] > far["coverage"] and near["precision"] > far["precision"]


def test_a_second_evaluation_computes_no_features(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(place, "near")
    monkeypatch.setattr(FeatureParts, "make", None)
    assert run(place, "near") == first
    capsys.readouterr()


def test_a_zip_of_the_same_images_scores_the_same(place: Path) -> None:
    with zipfile.ZipFile(place / "near.zip", "w") as archive:
        for path in sorted((place / "near").iterdir()):
            archive.write(path, path.name)
    assert run(place, "near.zip") == run(place, "near")


def test_only_the_first_images_are_scored_where_so_many_are_asked_for(place: Path) -> None:
    scores = run(place, "near", "--num-images", "100", "--max-real", "500")
    assert {(score["num_images"], score["num_reference"]) for score in scores} == {(100, 500)}


@pytest.mark.parametrize("out", ["near", "near/00000.png/scores.json"])
def test_a_place_where_the_scores_cannot_go_is_refused_before_any_work(
    place: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "try_detectors", None)  # what comes first of the work
    flags = ["--images", str(place / "near"), "--detectors", "lenet", "--out", str(place / out)]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: out {place / out} cannot be written (") and error.count("\n") == 1
    assert error.endswith("; give another file with --out\n")


def test_scores_that_cannot_be_written_after_all_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "evaluations").touch()
    due = r"evaluations/\w+\.json cannot be written \(.+\); give another file with --out"
    with pytest.raises(UserError, match=due):
        write_scores(EvaluateSettings("samples", storage_path=tmp_path / "runs"), [])


@pytest.fixture
def others_may_read() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def test_scores_are_for_their_user_alone(tmp_path: Path, others_may_read: None) -> None:
    file = write_scores(EvaluateSettings("samples", storage_path=tmp_path / "runs"), [])
    assert file.parent == tmp_path / "runs" / "evaluations" and rights(file, file.parent) == [0o600, 0o700]


def test_scores_that_go_to_a_place_of_the_user_s_own_have_that_place_s_rights(
    tmp_path: Path, others_may_read: None
) -> None:
    settings = EvaluateSettings(
        "samples", dataset="gone", storage_path=tmp_path / "runs", out=tmp_path / "new" / "s.json"
    )
    with pytest.raises(UserError):  # after the place was tried out
        evaluate.evaluate(settings)
    assert rights(write_scores(settings, []), tmp_path / "new") == [0o644, 0o755]


def test_where_a_bucket_s_copy_lies_does_not_name_the_scores(tmp_path: Path) -> None:
    one, two = (EvaluateSettings("samples", storage_path=tmp_path, storage_copies=Path(copies)) for copies in "ab")
    assert write_scores(one, []) == write_scores(two, [])


def opened(path: Path) -> None:
    raise UserError(f"opened {path}")


def test_what_a_bucket_holds_lies_in_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Path] = []
    monkeypatch.setattr(evaluate, "keep_file", kept.append)
    monkeypatch.setattr(evaluate, "prepare_storage", opened)
    monkeypatch.chdir(tmp_path)
    storage = parse_flags(
        EvaluateSettings,
        ["--images", "x", "--detectors", "lenet", "--storage-path", "s3://bucket/runs", "--storage-copies", "copies"],
        prog="evaluate",
    )
    copy = tmp_path / "copies" / "s3:" / "bucket" / "runs"
    with pytest.raises(UserError, match=re.escape(f"opened {copy}")):
        evaluate.evaluate(storage)
    file = write_scores(storage, [])
    assert kept == [file] and file.parent == copy / "evaluations"
    assert [each.name for each in tmp_path.iterdir()] == ["copies"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images", "nowhere"], "images 'nowhere' are no folder and no ZIP"),
        (["--images", "{near}", "--num-images", "50"], "50 images are too few for features of 64 dimensions"),
        (["--images", "{near}", "--dataset", "cifar11"], "dataset 'cifar11' is unknown"),
        (["--images", "{big}"], "big/00000.png has 16x16 pixels; 8x8 are due"),
        (["--images", "{near}", "--detectors", "inception", "--detector-weights", "gone.pt"], "gone.pt"),
        (["--images", "{near}", "--detectors", "resnet"], "invalid choice 'resnet'"),
        (["--images", "{near}", "--num-neighbors", "0"], "num_neighbors is 0; it must be at least 1"),
        ([], "--images"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    place: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "big").exists():
        write(place / "big", np.zeros((3, 1, 16, 16), np.uint8))
    given = [flag.format(near=place / "near", big=place / "big") for flag in flags]
    status = main(["--detectors", "lenet", "--storage-path", str(place / "runs"), *given])
    error = capsys.readouterr().err
    assert status == 2 and said in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
