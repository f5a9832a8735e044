"""Checkpoints: torn ones are noticed and set aside, old ones are thinned, and a process may be killed at any point."""

import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.diffusion.state_io import load_state, read_ema, save_state
from cedm_ray.diffusion.train_state import TrainState, new_state
from cedm_ray.stages.checkup.disk import ImageSet, checkpoint_bytes, kept_bytes
from cedm_ray.stages.storage import checkpoints
from cedm_ray.stages.storage.checkpoints import (
    AVERAGED_FILE,
    MANIFEST_FILE,
    RUNGS_FILE,
    SAMPLE_PIXELS_FILE,
    SNAPSHOT_FILE,
    STATE_FILE,
    forget_snapshot,
    intact,
    newest_whole,
    prune,
    weights_file,
    whole_checkpoint,
    write_manifest,
)

NET = NetSettings(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=())


def state_at(nimg: int) -> TrainState:
    with torch.random.fork_rng([]):
        torch.manual_seed(nimg)
        state = new_state(build_net(NET, 8, 1, label_dim=4, augment=False))
        for parameter in state.net.parameters():
            parameter.grad = torch.randn(parameter.shape)
        state.optimizer.step()  # Adam makes its moments
        for parameter in state.ema.parameters():
            parameter.data.normal_()
    state.nimg = nimg
    return state


def write(folder: Path, scores: Sequence[float], manifest: bool = True) -> Path:
    """A checkpoint after so many rungs of 1000 images."""
    folder.mkdir(parents=True)
    nimg = 1000 * len(scores)
    save_state(state_at(nimg), folder / STATE_FILE)
    rungs = [{"kimg": n, "nimg": 1000 * n, "score": score} for n, score in enumerate(scores, 1)]
    (folder / RUNGS_FILE).write_text(json.dumps(rungs))
    np.save(folder / SAMPLE_PIXELS_FILE, np.full((4, 1, 8, 8), len(scores), np.uint8))
    if manifest:
        write_manifest(folder, nimg)
    return folder


def training_of(folder: Path, scores: Sequence[float], manifest: bool = True) -> list[Path]:
    return [write(folder / f"checkpoint_{n}", scores[:n], manifest) for n in range(1, len(scores) + 1)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "train"
    training_of(folder, (3.0, 2.0, 1.0))
    return folder


def tear(file: Path, how: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if how == "delete":
        file.unlink()
        return
    if how == "truncate":
        content = content[:at]
    elif how == "flip":
        content[at] ^= 1 << rng.randrange(8)
    else:
        at = min(at, len(content) - 1)
        block = content[at : at + 512]
        content[at : at + 512] = bytes(len(block)) if any(block) else b"\x01" * len(block)
    file.write_bytes(bytes(content))


HOWS = ("truncate", "flip", "zero", "delete")


@pytest.mark.parametrize("name", [STATE_FILE, RUNGS_FILE, MANIFEST_FILE])
def test_a_torn_checkpoint_is_noticed_and_the_one_before_it_is_used(three: Path, tmp_path: Path, name: str) -> None:
    found: Counter[str] = Counter()
    for seed in range(20):
        rng, folder = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(three, folder)
        how = HOWS[seed % 4]
        tear(folder / "checkpoint_3" / name, how, rng)
        chosen, said = newest_whole(folder)
        assert chosen is not None
        if name == MANIFEST_FILE and how == "delete":  # as an earlier version left it: nothing else is wrong
            assert chosen.folder.name == "checkpoint_3" and not said
            continue
        assert chosen.folder.name == "checkpoint_2" and chosen.nimg == 2000
        assert len(said) == 1 and "checkpoint_3 is torn (" in said[0] and name in said[0]
        state = state_at(1000)
        load_state(state, chosen.folder / STATE_FILE)
        assert state.nimg == 2000 and not (folder / "checkpoint_3" / STATE_FILE).exists()
        again, silent = newest_whole(folder)  # it is told once
        assert again == chosen and silent == []
        found[how] += 1
    print(f"{name}: 20 seeds, set aside by kind of damage: {dict(found)}")
    assert sum(found.values()) == (15 if name == MANIFEST_FILE else 20)


def test_damage_to_what_is_only_looked_at_costs_no_training(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "train")
    folder = tmp_path / "train" / "checkpoint_3"
    assert intact(folder, SAMPLE_PIXELS_FILE)
    tear(folder / SAMPLE_PIXELS_FILE, "flip", random.Random(0))
    assert not intact(folder, SAMPLE_PIXELS_FILE) and not intact(folder, "none.png")
    chosen, said = newest_whole(tmp_path / "train")
    assert chosen is not None and chosen.folder == folder and not said


def test_where_none_is_whole_there_is_none_and_each_is_told(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "train")
    for n in (1, 2, 3):
        tear(tmp_path / "train" / f"checkpoint_{n}" / STATE_FILE, HOWS[n], random.Random(n))
    chosen, said = newest_whole(tmp_path / "train")
    assert chosen is None and [line.split(" is torn")[0][-1] for line in said] == ["3", "2", "1"]
    assert newest_whole(tmp_path / "nothing") == (None, [])


def test_a_copy_that_was_cut_off_is_no_checkpoint(three: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "train")
    cut = tmp_path / "train" / "checkpoint_4"
    cut.mkdir()
    chosen, said = newest_whole(tmp_path / "train")
    assert chosen is not None and chosen.folder.name == "checkpoint_3" and not said
    (cut / STATE_FILE).write_bytes((three / "checkpoint_3" / STATE_FILE).read_bytes()[:-100])
    chosen, said = newest_whole(tmp_path / "train")
    assert chosen is not None and chosen.folder.name == "checkpoint_3" and "checkpoint_4 is torn" in said[0]


def test_checkpoints_of_earlier_versions_are_gone_on_from_and_left_as_they_are(tmp_path: Path) -> None:
    old = training_of(tmp_path, (3.0, 2.0, 1.0, 0.5), manifest=False)
    prune(tmp_path)
    assert all((folder / STATE_FILE).is_file() for folder in old)
    assert whole_checkpoint(old[3], 4000) == old[3] and weights_file(old[3]).name == STATE_FILE
    tear(old[3] / STATE_FILE, "truncate", random.Random(0))
    chosen, said = newest_whole(tmp_path)
    assert chosen is not None and chosen.folder == old[2] and len(said) == 1


def held(folders: Sequence[Path]) -> str:
    """S: a state; a: averaged weights alone."""
    return "".join("S" if (folder / STATE_FILE).exists() else "a" for folder in folders)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((3.0,), "S"),
        ((3.0, 2.0), "SS"),
        ((5.0, 4.0, 3.0, 2.0), "aaSS"),
        ((5.0, 1.0, 3.0, 2.0, 4.0), "aSaSS"),
        ((1.0, 2.0, 3.0, 4.0), "SaSS"),
        ((2.0, math.nan, math.nan, math.nan), "SaSS"),
        ((math.nan, math.nan, math.nan), "aSS"),
    ],
)
def test_the_newest_two_and_the_best_keep_their_states(tmp_path: Path, scores: list[float], expected: str) -> None:
    folders = []
    for n in range(1, len(scores) + 1):
        folders.append(write(tmp_path / f"checkpoint_{n}", scores[:n]))
        prune(tmp_path)
    assert held(folders) == expected
    for n, folder in enumerate(folders, 1):  # every rung can be sampled and shown from what is left
        tensors, nimg = read_ema(weights_file(folder))
        wanted = dict(state_at(1000 * n).ema.state_dict())
        assert nimg == 1000 * n and tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        assert whole_checkpoint(folder, nimg) == folder and intact(folder, SAMPLE_PIXELS_FILE)
    chosen, said = newest_whole(tmp_path)
    assert chosen is not None and chosen.folder == folders[-1] and not said


def test_what_is_kept_takes_as_much_as_is_reckoned_with(tmp_path: Path) -> None:
    for folder in training_of(tmp_path, (1.0, 5.0, 4.0, 3.0, 2.0)):  # the best is the oldest: three states stay
        (folder / SAMPLE_PIXELS_FILE).unlink()
        write_manifest(folder, int(folder.name[-1]) * 1000)
    prune(tmp_path)
    taken = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    state = (tmp_path / "checkpoint_5" / STATE_FILE).stat().st_size
    assert taken == pytest.approx(kept_bytes(state, 5, 3), rel=0.02)
    assert state == pytest.approx(checkpoint_bytes(NET, ImageSet(9, 8, 1, False)), rel=0.1)


class Killed(BaseException):
    pass


def dying(function: Callable[..., object], after: int, calls: list[int]) -> Callable[..., object]:
    """The function, which works so often and then ends the process before it does anything."""

    def called(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] > after:
            raise Killed
        return function(*args, **kwargs)

    return called


def test_a_process_that_is_killed_while_it_prunes_leaves_every_checkpoint_usable(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = 0
    for after in range(6):
        folder = tmp_path / str(after)
        shutil.copytree(three, folder)
        write(folder / "checkpoint_4", (3.0, 2.0, 1.0, 0.5))
        calls = [0]
        with monkeypatch.context() as patched:
            for where, name in ((checkpoints, "save_ema"), (checkpoints, "write_json"), (os, "replace"),
                                (Path, "unlink")):  # fmt: skip
                patched.setattr(where, name, dying(getattr(where, name), after, calls))
            try:
                prune(folder)
            except Killed:
                deaths += 1
        for n in range(1, 5):
            assert whole_checkpoint(folder / f"checkpoint_{n}", 1000 * n) == folder / f"checkpoint_{n}"
            assert read_ema(weights_file(folder / f"checkpoint_{n}"))[1] == 1000 * n
        newest, said = newest_whole(folder)
        assert newest is not None and newest.nimg == 4000 and not said
        prune(folder)  # the next one ends what was begun
        assert held([folder / f"checkpoint_{n}" for n in range(1, 5)]) == "aaSS"
    print(f"pruning was cut off at {deaths} points; no checkpoint was lost")
    assert deaths >= 4


def test_a_torn_state_is_not_thinned_into_averaged_weights_that_look_whole(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(three, folder)
    write(folder / "checkpoint_4", (3.0, 2.0, 1.0, 0.5))
    tear(folder / "checkpoint_1" / STATE_FILE, "flip", random.Random(1))
    prune(folder)
    assert held([folder / f"checkpoint_{n}" for n in range(1, 5)]) == "aaSS"
    assert (
        not (folder / "checkpoint_1" / AVERAGED_FILE).exists()
        and whole_checkpoint(folder / "checkpoint_1", 1000) is None
    )


def test_what_a_record_names_is_replaced_by_another_of_the_same_images_only(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(three, folder)
    named = folder / "checkpoint_3"
    assert whole_checkpoint(named, 3000) == named
    tear(named / STATE_FILE, "zero", random.Random(3))
    assert whole_checkpoint(named, 3000) is None
    again = write(folder / "checkpoint_5", (3.0, 2.0, 1.0))  # the rung was trained again
    assert whole_checkpoint(named, 3000) == again
    assert whole_checkpoint(folder / "gone", 3000) == again and whole_checkpoint(folder / "gone", 4000) is None


def test_ray_train_s_notes_are_forgotten(tmp_path: Path) -> None:
    forget_snapshot(tmp_path / "train")  # nothing there yet
    (tmp_path / SNAPSHOT_FILE).write_text('{"ray_version": "2.6')
    forget_snapshot(tmp_path)
    assert not (tmp_path / SNAPSHOT_FILE).exists()
