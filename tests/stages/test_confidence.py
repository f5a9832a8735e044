import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cedm_ray.clustering.head_file import head_probs, load_head
from cedm_ray.data.pack import load_packed
from cedm_ray.diffusion.heun import heun_sample
from cedm_ray.diffusion.model_file import load_model
from cedm_ray.diffusion.sampler import to_uint8
from cedm_ray.diffusion.starts import draw_conditions, initial_noise
from cedm_ray.errors import UserError
from cedm_ray.features.pixels import PixelBackbone, pixel_stats
from cedm_ray.report.samples import confidence_picture, read_confidence
from cedm_ray.settings import DiffusionSettings
from cedm_ray.stages import confidence
from cedm_ray.stages.confidence import Unconditional, make_confidence, rank_samples
from cedm_ray.stages.results.exported import open_exported
from cedm_ray.stages.storage.checkpoints import STATE_FILE
from cedm_ray.stages.storage.store import Store

CPU, SEED, NUM, SHOWN = torch.device("cpu"), 5, 41, 6
MakeExport = Callable[..., Path]


@pytest.fixture(scope="module")
def run(make_export: MakeExport) -> Path:
    return make_export()


@pytest.fixture(scope="module")
def none(make_export: MakeExport) -> Path:
    """The folder of an unconditional model, whose network is not built like that of the other one."""
    return make_export("none", model_channels=12)


@pytest.fixture(scope="module")
def unconditional(none: Path) -> Unconditional:
    facts = json.loads((none / "export" / "model.json").read_text())["diffusion"]
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return Unconditional(none / "checkpoint", DiffusionSettings(**settings))


def ranked(run: Path, out: Path, unconditional: Unconditional | None = None, **more: Any) -> dict[str, np.ndarray]:
    given: dict[str, Any] = {"num_images": NUM, "shown": SHOWN, "seed": SEED, "batch_size": 8, "device": CPU, **more}
    assert rank_samples(run / "export", None, unconditional, out, **given) == out
    with np.load(out, allow_pickle=False) as found:
        return dict(found)


def one_by_one(folder: Path, indices: list[int], probs: Tensor | None) -> np.ndarray:
    """The images of these indices, without the batches of the function that generates them everywhere else."""
    net, found = load_model(folder), []
    for index in indices:
        noise = initial_noise(SEED, [index], (1, 8, 8), CPU)
        cluster = None if probs is None else draw_conditions(SEED, [index], probs)
        found.append(to_uint8(heun_sample(net, noise, cluster, num_steps=4)))
    return torch.cat(found).numpy()


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels on the edge of two grey levels, which the order of additions can tip."""
    apart = np.abs(a.astype(int) - b)
    return a.shape == b.shape and int(apart.max()) <= 1 and float((apart > 0).mean()) < 2e-3


def test_the_ends_are_those_of_all_images_sorted_by_the_heads_largest_probability(run: Path, tmp_path: Path) -> None:
    found = ranked(run, tmp_path / "a.npz")
    images = one_by_one(run / "export", list(range(NUM)), open_exported(run, device=CPU).cluster_probs)
    backbone = PixelBackbone(pixel_stats(load_packed(run / "images").images), "cpu")
    probs = head_probs(load_head(run / "export" / "head.safetensors"), backbone(torch.from_numpy(images)).numpy())
    sure = [float(row.max()) for row in probs]
    assert max(sure) - min(sure) > 0.2
    for name, wanted in (("high", sorted(sure, reverse=True)[:SHOWN]), ("low", sorted(sure)[:SHOWN])):
        indices = found[f"{name}_indices"].tolist()
        assert len(set(indices)) == SHOWN and alike(found[name], images[indices]) and found[name].dtype == np.uint8
        # A pixel that is tipped by one grey level moves a probability a little.
        np.testing.assert_allclose(found[f"{name}_probs"], wanted, rtol=0, atol=3e-3)
        np.testing.assert_allclose([sure[index] for index in indices], wanted, rtol=0, atol=3e-3)
    assert "unconditional" not in found


def test_the_unconditional_images_start_from_the_noise_of_the_surest_in_their_order(
    run: Path, none: Path, unconditional: Unconditional, tmp_path: Path
) -> None:
    found = ranked(run, tmp_path / "a.npz", unconditional)
    wanted = one_by_one(none / "export", found["high_indices"].tolist(), None)
    assert alike(found["unconditional"], wanted) and len(np.unique(wanted, axis=0)) == SHOWN
    assert not alike(found["unconditional"], found["high"]) and not alike(found["unconditional"][::-1], wanted)


def test_images_of_equal_confidence_stand_at_one_end_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confidence, "open_confidence", lambda *_, **__: lambda images: np.ones(len(images), np.float32))
    found = ranked(run, tmp_path / "a.npz", num_images=12)
    assert sorted([*found["high_indices"], *found["low_indices"]]) == list(range(12))


def test_the_report_draws_the_file(run: Path, unconditional: Unconditional, tmp_path: Path) -> None:
    found = ranked(run, tmp_path / "a.npz", unconditional)
    read = read_confidence(tmp_path / "a.npz")
    assert read.unconditional is not None and np.array_equal(read.unconditional, found["unconditional"])
    assert read.high_probs.dtype == read.low_probs.dtype == np.float64
    assert read.high_probs[0] >= read.high_probs[-1] > read.low_probs[-1] >= read.low_probs[0]
    assert confidence_picture(read).height > 3 * 56


@pytest.mark.parametrize("grouping", ["labels", "none"])
def test_a_model_without_a_head_is_refused(make_export: MakeExport, grouping: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"confidence is that of a TEMI head, but the model's grouping is {grouping}"):
        ranked(make_export(grouping), tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_an_unconditional_model_that_is_not_there_or_is_another_one_is_refused(
    run: Path, unconditional: Unconditional, tmp_path: Path
) -> None:
    wide = replace(unconditional, diffusion=replace(unconditional.diffusion, model_channels=16))
    with pytest.raises(UserError, match=r"state\.safetensors have another shape for .*without a condition, of"):
        ranked(run, tmp_path / "a.npz", wide)
    with pytest.raises(UserError, match=r"state\.safetensors have unknown .*without a condition, of these settings"):
        ranked(run, tmp_path / "a.npz", replace(unconditional, checkpoint=run / "checkpoint"))
    for content in (None, b"", b"\x80\x04K\x01."):
        if content is not None:
            (tmp_path / STATE_FILE).write_bytes(content)
        with pytest.raises(UserError, match=r"unconditional model .* cannot be read .*remove its trial's folder"):
            ranked(run, tmp_path / "a.npz", replace(unconditional, checkpoint=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize("shown", [0, 21])
def test_ends_that_would_overlap_are_refused(run: Path, tmp_path: Path, shown: int) -> None:
    with pytest.raises(ValueError, match=rf"shown is {shown}; it must lie in \[1, 20\], half of the images"):
        ranked(run, tmp_path / "a.npz", shown=shown)


def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file: Path, **_: Any) -> None:
        file.write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.npz").write_bytes(b"old")
    monkeypatch.setattr(confidence.np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ranked(run, tmp_path / "a.npz", num_images=12)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.npz", b"old")]


class Search:
    """What the driver knows of a search, with Ray's tasks run at once and written down."""

    def __init__(self, folder: Path, unconditional: Unconditional, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(confidence.ray, "remote", lambda function: SimpleNamespace(options=self._options(function)))
        monkeypatch.setattr(confidence.ray, "get", lambda found: found)
        monkeypatch.setattr(confidence.torch, "set_num_threads", lambda _: None)
        monkeypatch.setattr(confidence.torch.cuda, "is_available", lambda: False)
        self.job = SimpleNamespace(grouping="temi", key="ab", rungs_kimg=(1, 3), seed=SEED,
                                   score=SimpleNamespace(batch_size=64))  # fmt: skip
        self.ctx = SimpleNamespace(store=Store(folder), config=SimpleNamespace(backbone_weights=None),
                                   shares=SimpleNamespace(cpus_per_probe=1.0, gpus_per_probe=0.5))  # fmt: skip
        rungs = ({"kimg": 3, "nimg": 3000, "checkpoint_path": str(unconditional.checkpoint)},)
        record = SimpleNamespace(grouping="none", state="complete", rungs=rungs, key="cd", params={"grouping": "none"})
        stopped = SimpleNamespace(grouping="none", state="stopped", rungs=rungs, key="ef", params={})
        jobs = {"none": SimpleNamespace(diffusion=unconditional.diffusion)}
        planner = SimpleNamespace(job=lambda params: jobs[params["grouping"]])
        self.ledger = SimpleNamespace(records=[stopped, record], planner=planner)

    def _options(self, function: Callable[..., None]) -> Callable[..., Any]:
        def options(**asked: Any) -> Any:
            self.asked.append(asked)
            return SimpleNamespace(remote=function)

        return options

    def make(self, export: Path) -> Path | None:
        return make_confidence(cast(Any, self.ctx), cast(Any, self.ledger), cast(Any, self.job), export)


def test_a_search_ranks_once_and_again_when_either_model_was_trained_on(
    run: Path, none: Path, unconditional: Unconditional, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(tmp_path, unconditional, monkeypatch)
    first = search.make(run / "export")
    assert first is not None and search.asked == [{"num_cpus": 1.0, "num_gpus": 0.5}]
    found = read_confidence(first)
    assert found.unconditional is not None and found.high.shape == found.unconditional.shape == (32, 1, 8, 8)
    with np.load(first) as arrays:
        indices = arrays["high_indices"].tolist()
    assert alike(found.unconditional, one_by_one(none / "export", indices, None))
    assert search.make(run / "export") == first and len(search.asked) == 1
    search.job.rungs_kimg = (1, 4)
    second = search.make(run / "export")
    search.ledger.records = []
    third = search.make(run / "export")
    assert len({first, second, third}) == len(search.asked) == 3 and third is not None
    assert read_confidence(third).unconditional is None


def test_without_a_checkpoint_of_the_unconditional_training_the_other_models_images_are_left_out(
    run: Path, unconditional: Unconditional, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(tmp_path, unconditional, monkeypatch)
    record = search.ledger.records[-1]
    record.rungs = ({name: value for name, value in record.rungs[0].items() if name != "checkpoint_path"},)
    made = search.make(run / "export")
    assert made is not None and read_confidence(made).unconditional is None


def test_a_search_without_a_head_ranks_nothing(
    run: Path, unconditional: Unconditional, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(tmp_path, unconditional, monkeypatch)
    for search.job.grouping in ("kmeans", "labels", "none"):
        assert search.make(run / "export") is None
    assert not search.asked and not list(tmp_path.iterdir())
