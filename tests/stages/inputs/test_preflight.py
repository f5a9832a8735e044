from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.data.sources import ArraySource
from cedm_ray.errors import UserError
from cedm_ray.stages.driver import _Subject
from cedm_ray.stages.inputs import preflight
from cedm_ray.stages.inputs.preflight import check_inputs, clip_class_names

PLAIN = ArraySource("plain", "1", digits().read(0, 1797), None, None)


def refused(source: ArraySource, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        check_inputs(load(argv), source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_digits_pass() -> None:
    check_inputs(load([]), digits())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--grouping", "labels", "--score.detector", "backbone"], "grouping is labels, and these images have none"),
        (["--grouping", "clip", "--score.detector", "backbone"], "needs class names, and these images have none"),
        ([], "score.detector is lenet, which is trained on labels, and these images have none"),
    ],
)
def test_what_needs_labels_is_refused_without_them(argv: list[str], said: str) -> None:
    assert said in refused(PLAIN, *argv)


def test_superclasses_are_refused_where_there_is_one_level_of_labels() -> None:
    assert "which cifar100 has and digits has not" in refused(digits(), "--grouping", "superclasses")


def test_too_few_images_for_inception_s_features_are_refused_before_any_work() -> None:
    said = refused(digits(), "--score.detector", "inception", "--score.num-images", "2000")
    assert "score.num_images is 2000; it must be at least 2048, the dimensions of the features of detector" in said


def test_assignments_for_other_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "groups.npy", np.zeros(12, np.int64))
    said = refused(digits(), "--grouping", "file", "--assignments", str(tmp_path / "groups.npy"))
    assert "groups.npy" in said and "12" in said and "1797" in said


def test_clip_takes_the_names_of_a_file_before_the_data_set_s_own(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    config = load(["--grouping", "clip", "--clip.class-names", str(tmp_path / "names.txt")])
    assert clip_class_names(config, ("a", "b", "c")) == ("cat", "dog")
    assert clip_class_names(load(["--grouping", "clip"]), ("a", "b", "c")) == ("a", "b", "c")


def test_a_bound_above_the_number_of_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "load_backbone", lambda *_, **__: Mock(dim=64))
    assert "bound.c_max is 1798; it must be at most" in refused(digits(), "--bound.c-max", "1798")


def test_detector_weights_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    many = ArraySource("many", "1", np.zeros((2100, 1, 8, 8), np.uint8), None, None)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    flags = ["--score.num-images", "2048", "--final.num-images", "2048", "--detector-weights"]
    said = refused(many, "--score.detector", "inception", *flags, str(tmp_path / "other.pt"))
    assert "other.pt" in said and "Inception-v3" in said


def test_a_clip_model_that_cannot_be_fetched_is_refused_with_its_own_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("open_clip.download_pretrained", no_network)
    said = refused(digits(), "--grouping", "clip", "--clip.model", "open_clip:ViT-B-32/openai")
    assert said.startswith("clip: the weights of") and said.endswith("pass a file with them: --clip.weights FILE")


def test_weight_files_may_lie_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "x.pth")
    flags = ["--backbone", "test_vit", "--score.detector", "backbone", "--score.also", "--backbone-weights"]
    monkeypatch.setenv("HOME", str(tmp_path))
    home, plain = (load([*flags, file]) for file in ("~/x.pth", str(tmp_path / "x.pth")))
    check_inputs(home, digits())
    assert _Subject.of(home).key(home) == _Subject.of(plain).key(plain)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "clip.yaml").write_text("clip: {weights: ~/clip.pt, class_names: ~/names.txt}\ngrouping: clip\n")
    (tmp_path / "clip.pt").write_bytes(b"no weights")
    said = refused(digits(), "--search-space", str(tmp_path / "clip.yaml"))
    assert said.startswith(f"clip: backbone weights {tmp_path}/clip.pt") and "not a tensor file" in said
