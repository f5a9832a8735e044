"""Images and weights that are there, that can be fetched, and that are out of reach; the network is this machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.stages.checkup import inputs as checkup_inputs
from cedm_ray.stages.checkup.disk import ImageSet
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.inputs import images_finding, settings_findings, weights_of

DIGITS = ImageSet.of(load([]), digits())
NOWHERE = "http://127.0.0.1:9"  # the port on which nobody listens


@pytest.fixture
def web(web_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that has everything whose path does not hold ``missing``."""
    server = web_server(lambda path: 404 if "missing" in path else 200)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(checkup_inputs, "CIFAR_URL", f"{server.url}/")
    return server


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(checkup_inputs, "CIFAR_URL", f"{NOWHERE}/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch-hub"))


def test_images_that_are_there_are_counted() -> None:
    source, finding = images_finding(load(["--max-images", "300"]))
    assert source is not None and len(source) == 300
    assert finding == Finding("data", "ok", f"{source.name}: 300 images of 8 x 8 pixels, in 10 classes")


def test_a_folder_is_looked_through(tmp_path: Path) -> None:
    flags = ["--dataset", str(tmp_path), "--resolution", "8"]
    source, finding = images_finding(load(flags))
    assert source is None and finding.level == "fail" and finding.fix
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert images_finding(load(flags))[1].text.endswith("1 images of 8 x 8 pixels, without labels")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert "b.png" in images_finding(load(flags))[1].text


def test_cifar_can_be_fetched_or_not(web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["--dataset", "cifar10", "--data-dir", str(tmp_path / "data")])
    source, finding = images_finding(config)
    assert source is None and finding.level == "ok" and finding.text.endswith(f"{web.url}/cifar-10-binary.tar.gz")
    assert web.asked == ["HEAD /cifar-10-binary.tar.gz"] and not (tmp_path / "data").exists()
    monkeypatch.setattr(checkup_inputs, "CIFAR_URL", f"{web.url}/missing/")
    _, finding = images_finding(config)
    assert finding.level == "fail" and "answers with status 404" in finding.text and "--data-dir" in finding.fix
    monkeypatch.setattr(checkup_inputs, "CIFAR_URL", f"{NOWHERE}/")
    assert "does not answer (" in images_finding(config)[1].text


def test_a_damaged_archive_is_not_fetched_again(web: Any, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"half of it")
    _, finding = images_finding(load(["--dataset", "cifar10", "--data-dir", str(tmp_path)]))
    assert finding.level == "fail" and "cifar-10-binary.tar.gz" in finding.text and web.asked == []


def backbone(*flags: str) -> Finding:
    return weights_of(load(list(flags)))[0].finding


def test_pixels_need_no_weights() -> None:
    (weights,) = weights_of(load([]))
    assert weights.present and weights.finding.level == "ok"


NAMES = ["vit_base_patch16_224.dino", "open_clip:ViT-B-32/laion2b_s34b_b79k"]
REPOSITORIES = ["timm/vit_base_patch16_224.dino", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]


@pytest.mark.parametrize(("name", "repository"), zip(NAMES, REPOSITORIES, strict=True))
def test_weights_on_the_hub_are_asked_for_and_not_fetched(name: str, repository: str, web: Any, tmp_path: Path) -> None:
    (weights,) = weights_of(load(["--backbone", name]))
    assert weights.finding.level == "ok" and not weights.present and web.asked == [f"HEAD /{repository}"]
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(("name", "repository"), zip(NAMES, REPOSITORIES, strict=True))
def test_weights_in_the_hub_s_cache_are_enough(name: str, repository: str, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").touch()
    assert not weights_of(load(["--backbone", name]))[0].present  # a settings file is no weight file
    (folder / "snapshots" / "abc" / "model.safetensors").touch()
    (weights,) = weights_of(load(["--backbone", name]))
    assert weights.present and weights.finding.level == "ok"


def test_weights_out_of_reach_are_a_failure_with_the_flag_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = backbone("--backbone", NAMES[0])
    assert finding.level == "fail" and f"{NOWHERE}/{REPOSITORIES[0]} does not answer" in finding.text
    assert finding.fix == "pass a file with them: --backbone-weights FILE"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in backbone("--backbone", NAMES[0]).text


def test_a_hub_without_the_model_is_a_failure(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{web.url}/missing")
    assert "answers with status 404" in backbone("--backbone", NAMES[0]).text


def test_unknown_names_models_on_no_hub_and_models_without_weights_are_failures() -> None:
    assert "is unknown" in backbone("--backbone", "vit_base_patch16_225.dino").text
    assert "on no hub" in backbone("--backbone", "moco_v3_vit_base_patch16").text
    finding = backbone("--backbone", "vit_base_patch16_xp_224")
    assert finding.level == "fail" and "--backbone-weights FILE" in finding.fix


def test_weight_files_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "dino.pth"
    flags = ["--backbone", NAMES[0], "--backbone-weights", str(file)]
    assert "do not exist" in backbone(*flags).text
    file.write_text("<html>404</html>")
    assert "are not a tensor file" in backbone(*flags).text
    torch.save({"weight": torch.zeros(3)}, file)
    (weights,) = weights_of(load(flags))
    assert weights.present and weights.finding.level == "ok" and str(file) in weights.finding.text


def test_the_detectors_of_cifar_are_looked_for_each_by_its_own_flag(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "any.pth")
    flags = ["--dataset", "cifar10", "--backbone-weights", str(tmp_path / "any.pth")]
    found = {each.finding.name: each.finding for each in weights_of(load([*flags, "--detector-weights", "no.pth"]))}
    assert [found[name].level for name in ("backbone", "inception", "dinov2")] == ["ok", "fail", "fail"]
    assert "--detector-weights" in found["inception"].fix and "--dinov2-weights" in found["dinov2"].fix
    flags += ["--dinov2-weights", str(tmp_path / "any.pth"), "--score.detector", "dinov2", "--score.also", "backbone"]
    assert [each.present for each in weights_of(load(flags))] == [True, True]


def test_clip_is_looked_for_where_clusters_come_from_it(web: Any) -> None:
    found = weights_of(load(["--grouping", "clip", "--clip.model", NAMES[1]]))
    assert [each.finding.name for each in found] == ["backbone", "clip"] and web.asked == [f"HEAD /{REPOSITORIES[1]}"]


def test_settings_that_fit_are_well() -> None:
    (finding,) = settings_findings(load([]), digits(), DIGITS, loaded=True)
    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("flags", "text", "fix"),
    [
        (["--num-neighbors", "1797"], "num_neighbors is 1797", "it must be below 1797, the number of images"),
        (["--budget.mimg", "0.01"], "budget.mimg is 0.01; one training", "raise it"),
        (["--assignments", "no.npy", "--grouping", "file"], "assignments no.npy does not exist", "give the path"),
    ],
)
def test_settings_that_do_not_fit_are_failures(flags: list[str], text: str, fix: str) -> None:
    *_, finding = settings_findings(load(flags), digits(), DIGITS, loaded=True)
    assert finding.level == "fail" and finding.text.startswith(text) and finding.fix.startswith(fix)


def test_the_budget_is_looked_at_before_the_images_are_there() -> None:
    config = load(["--dataset", "cifar10", "--budget.mimg", "1"])
    (finding,) = settings_findings(config, None, ImageSet.of(config, None), loaded=False)
    assert finding.level == "fail" and finding.text.startswith("budget.mimg is 1")
