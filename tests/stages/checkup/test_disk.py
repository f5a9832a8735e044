"""The estimate of what a search stores, against files that are really written and sizes worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.data.subset import FirstImages
from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.diffusion.state_io import save_state
from cedm_ray.diffusion.train_state import new_state
from cedm_ray.stages.checkup import disk as checkup_disk
from cedm_ray.stages.checkup.disk import (
    AROUND,
    ImageSet,
    checkpoint_bytes,
    disk_finding,
    disk_needed,
    embedding_dim,
    stored_bytes,
    trials_of,
)
from cedm_ray.stages.checkup.quick import quick_findings
from cedm_ray.stages.storage.storage_errors import bytes_in_words

DIGITS = ImageSet(1797, 8, 1, True)
CIFAR = ImageSet(50_000, 32, 3, True)


def test_a_checkpoint_has_the_size_that_is_reckoned_with(tmp_path: Path) -> None:
    settings = load([]).diffusion
    state = new_state(build_net(settings, 8, 1, label_dim=20, augment=True))
    for parameter in state.net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()  # Adam makes its moments
    save_state(state, tmp_path / "state.safetensors")
    written = (tmp_path / "state.safetensors").stat().st_size
    assert checkpoint_bytes(settings, DIGITS) == pytest.approx(written, rel=0.02)


def test_the_network_of_cifar_has_the_published_number_of_parameters() -> None:
    # DDPM++ of arXiv 2206.00364: 55.7 million.
    assert checkpoint_bytes(NetSettings(), CIFAR) / 16 == pytest.approx(55.7e6, rel=0.005)


def test_every_part_is_what_it_is_made_of() -> None:
    config = load(["--final.num-images", "3000", "--bound.max-probes", "9"])
    parts = dict(disk_needed(config, DIGITS, 6).parts)
    checkpoint = checkpoint_bytes(config.diffusion, DIGITS)
    assert parts == {
        "images": 1797 * 64,
        "embeddings": 1797 * (2 * 64 * 4 + 50 * 4),
        "clusterings": 1797 * 12 * (6 + 9),
        "features": (1797 + 3000) * 64 * 4 + 2 * 64 * 64 * 8,
        "checkpoints": checkpoint * (6 * 2 + 2),  # two rungs, both of which stay whole
        "the exported model": checkpoint // 4 + 1797 * 12,
        "figures and logs": AROUND,
    }
    need = disk_needed(config, DIGITS, 6)
    assert need.total == sum(parts.values()) and str(need).startswith(
        f"{bytes_in_words(need.total)}, 100.0 MB of them fig"
    )


def test_checkpoints_are_most_of_it_for_a_real_network() -> None:
    # Four rungs: the newest two and the best stay whole, one is thinned to a quarter; at the least two are.
    for least, states in ((False, 10 * (3 + 1 / 4) + 2), (True, 10 * (2 + 2 / 4) + 2)):
        need = disk_needed(load(["--dataset", "cifar10"]), CIFAR, 10, least=least)
        assert "of them checkpoints" in str(need)
        assert dict(need.parts)["checkpoints"] == pytest.approx(states * 0.892e9, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # 12 points of 20 kimg each: 0.42 of the grid are five whole trainings; without and with labels two more.
        ([], (3 + 2, 5 + 2)),
        (["--granularity.num-trials", "4"], (3 + 2, 4 + 2)),
        (["--granularity.no-baselines"], (3, 5)),
        # Each may end at its first rung: 100.8 kimg hold six of 15 kimg.
        (["--granularity.rule", "fitted"], (3 + 2, 6 + 2)),
        (["--confirm", "2"], (3 + 2, 5 + 2 + 6)),
        (["--grouping", "labels"], (2, 2)),
        (["--budget.gpu-hours", "9"], (3 + 2, 12 + 2)),
    ],
)
def test_how_many_trainings_there_are_at_least_and_at_most(flags: list[str], expected: tuple[int, int]) -> None:
    assert trials_of(load(flags), DIGITS) == expected


@pytest.mark.parametrize(
    ("backbone", "dim"),
    [
        ("pixels", 3072),
        ("vit_base_patch16_224.dino", 768),
        ("moco_v3_vit_base_patch16", 768),
        ("resnet50.a1_in1k", 2048),
        ("mobilenetv3_large_100", 1280),
        ("open_clip:ViT-B-32/openai", 512),
    ],
)
def test_the_dimensions_of_embeddings_are_known_without_weights(backbone: str, dim: int) -> None:
    assert embedding_dim(backbone, 3072) == dim


def test_what_is_known_of_the_images() -> None:
    assert ImageSet.of(load([]), FirstImages(digits(), 300)) == ImageSet(300, 8, 1, True)
    assert ImageSet.of(load(["--dataset", "cifar10"]), None) == CIFAR
    assert ImageSet.of(load(["--dataset", "ffhq64", "--max-images", "1000"]), None) == ImageSet(1000, 64, 3, False)
    assert ImageSet.of(load(["--dataset", "/no/where", "--resolution", "32"]), None) is None


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_disk_that_is_too_small_is_told_with_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage = load([]), tmp_path / "not" / "there"
    fewest, all_trials = trials_of(config, DIGITS)
    least, most = disk_needed(config, DIGITS, fewest, least=True).total, disk_needed(config, DIGITS, all_trials).total
    levels = {}
    for free in (least - 1, least, most - 1, most):
        with_free(monkeypatch, free)
        levels[free] = disk_finding(config, DIGITS, storage).level
    assert levels == {least - 1: "fail", least: "warn", most - 1: "warn", most: "ok"}
    with_free(monkeypatch, 10**6)
    finding = disk_finding(config, DIGITS, storage)
    assert finding.text.startswith(f"1.0 MB free under {storage}; the search needs at least {bytes_in_words(least)}")
    assert "--storage-path" in finding.fix


def test_what_is_stored_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([])
    most = disk_needed(config, DIGITS, trials_of(config, DIGITS)[1]).total
    (tmp_path / "store" / "trials").mkdir(parents=True)
    np.save(tmp_path / "store" / "trials" / "some.npy", np.zeros(10**6, np.uint8))
    stored = stored_bytes(tmp_path / "store")
    assert 10**6 < stored < 10**6 + 10_000
    with_free(monkeypatch, most - stored)
    finding = disk_finding(config, DIGITS, tmp_path)
    assert finding.level == "ok" and "and 1.0 MB stored" in finding.text
    with_free(monkeypatch, most - stored - 1)
    assert disk_finding(config, DIGITS, tmp_path).level == "warn"


def test_the_store_is_walked_once_at_every_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Path] = []
    monkeypatch.setattr(checkup_disk, "stored_bytes", lambda folder: walked.append(folder) or 0)
    quick_findings(load(["--storage-path", str(tmp_path)]), digits())
    assert walked == [tmp_path / "store"]


@pytest.mark.parametrize(("size", "said"), [(999, "1 kB"), (2_500_000, "2.5 MB"), (1_234_567_890_123, "1,234.6 GB")])
def test_bytes_in_words(size: int, said: str) -> None:
    assert bytes_in_words(size) == said
