"""Checkpoints of a training: whole or set aside, and thinned when they are old."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cedm_ray.diffusion.state_io import read_ema, read_nimg, save_ema
from cedm_ray.stages.storage.bucket import bucket_key
from cedm_ray.stages.storage.bucket_files import fetch_files, keep_files
from cedm_ray.stages.storage.store import read_json, write_json
from cedm_ray.weights.listing import Listing, seal_fits, sealed

STATE_FILE = "state.safetensors"
STATE_COPIES = 4
"""Of the network in a state: the network, its moving average, and Adam's two moments."""
AVERAGED_FILE = "averaged.safetensors"
"""Stands for the state in a thinned checkpoint: nothing can be trained on from it, but it is sampled and scored."""
RUNGS_FILE = "rungs.json"
SAMPLES_FILE = "samples.png"
SAMPLE_PIXELS_FILE = "samples.npy"
MANIFEST_FILE = "manifest.json"
TORN = ".torn"
"""Added to the names of files that are set aside; the folder stays, because Ray Train knows it by its name."""
NEWEST_KEPT = 2
"""Newest checkpoints that keep the state: the one to go on from, and the one before it, should that one be torn."""
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, as its manifest describes it."""

    folder: Path
    nimg: int
    """Images that had been seen."""
    listing: Listing

    @property
    def resumable(self) -> bool:
        """Whether it holds, or should hold, a state to go on from."""
        return STATE_FILE in self.listing.sizes and not (self.folder / f"{STATE_FILE}{TORN}").exists()

    @property
    def weights(self) -> str:
        """Name of the file with the averaged weights."""
        return STATE_FILE if STATE_FILE in self.listing.sizes else AVERAGED_FILE

    def fault(self, *, contents: bool = True) -> str | None:
        """What is wrong with the files that are needed to go on, or to sample from where it is thinned; in words."""
        return self.listing.fault(self.folder, (self.weights, RUNGS_FILE), contents=contents)


def write_manifest(folder: Path, nimg: int) -> None:
    """List the files of a checkpoint with sizes and hashes, as the last one that is written.

    Args:
        folder: The checkpoint.
        nimg: Images that had been seen.
    """
    write_json(folder / MANIFEST_FILE, sealed({"nimg": nimg, **Listing.of(folder).values()}))


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint is to hold.

    Raises:
        ValueError: If that cannot be told: the manifest is torn, or there is none and no state of an earlier version.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    if manifest is None and not (folder / MANIFEST_FILE).exists():
        return _without_manifest(folder)
    if not isinstance(manifest, dict) or not seal_fits(manifest) or not isinstance(manifest.get("nimg"), int):
        raise ValueError(f"{MANIFEST_FILE} is torn")
    return Checkpoint(folder, manifest["nimg"], Listing.read(manifest))


def _without_manifest(folder: Path) -> Checkpoint:
    """A checkpoint from before there were manifests: safetensors' own check of the length alone says if it is whole."""
    if read_json(folder / RUNGS_FILE) is None:
        raise ValueError(f"{RUNGS_FILE} is missing or torn")
    try:
        nimg = read_nimg(folder / STATE_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read ({error})") from error
    sizes = {name: (folder / name).stat().st_size for name in (STATE_FILE, RUNGS_FILE)}
    return Checkpoint(folder, nimg, Listing(sizes, {}))


def keep_in_bucket(made: Path, training: Path) -> Path | None:
    """Put a checkpoint in its place on this node and into the bucket, where its manifest comes last.

    Returns:
        Its folder; None where the training is not kept in a bucket: Ray Train copies the checkpoint then.
    """
    if bucket_key(training) is None:
        return None
    folder = training / f"checkpoint_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S.%f}"
    scratch = folder.with_name(f".{folder.name}")
    try:
        shutil.copytree(made, scratch)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    keep_files(folder, MANIFEST_FILE)
    return folder


def checkpoints(training: Path) -> list[Checkpoint]:
    """The checkpoints of a training whose manifests can be read, by images seen and then by age, the newest last."""
    found = []
    for folder in sorted(training.glob("checkpoint_*/")):
        try:
            found.append(read_checkpoint(folder))
        except ValueError:
            continue
    return sorted(found, key=lambda each: (each.nimg, each.folder.name))


def newest_whole(training: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from; newer ones that are torn are set aside, and unfinished copies removed.

    Args:
        training: The folder with the checkpoints; rank 0 alone calls this, before it trains.

    Returns:
        The newest one that is whole, by its content, or None where there is none, and a line on each that was set
        aside.
    """
    for unfinished in training.glob(".checkpoint_*"):  # by keep_in_bucket, in a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    said = _set_unreadable_aside(training)
    for checkpoint in reversed(checkpoints(training)):
        if checkpoint.resumable:
            fault = checkpoint.fault()
            if fault is None:
                return checkpoint, said
            said.append(set_state_aside(checkpoint.folder, fault))
    return None, said


def _set_unreadable_aside(training: Path) -> list[str]:
    """Set aside checkpoints that hold a state but no readable manifest; a folder without a state is ignored."""
    said = []
    for folder in sorted(training.glob("checkpoint_*/")):
        try:
            read_checkpoint(folder)
        except ValueError as error:
            if (folder / STATE_FILE).exists():
                said.append(set_state_aside(folder, str(error)))
    return said


def set_state_aside(folder: Path, fault: str) -> str:
    """Rename a checkpoint's state, so that nothing goes on from it; returns a line that says so."""
    aside = folder / f"{STATE_FILE}{TORN}"
    if (folder / STATE_FILE).exists():
        (folder / STATE_FILE).rename(aside)
    else:
        aside.touch()
    line = f"checkpoint {folder} is torn ({fault}): it is set aside, and the one before it is used"
    _LOG.warning(line)
    return line


def whole_checkpoint(folder: Path, nimg: int) -> Path | None:
    """A checkpoint whose weights and reports are whole, by their content; None where there is none.

    Args:
        folder: The one that a record names. A rung that was trained again after its checkpoint was torn has a second.
        nimg: Images that had been seen.
    """
    fetch_files(folder)
    try:
        named = [read_checkpoint(folder)]
    except ValueError:
        named = []
    others = [each for each in reversed(checkpoints(folder.parent)) if each.folder != folder]
    fitting = (each for each in (*named, *others) if each.nimg == nimg and each.fault() is None)
    return next((each.folder for each in fitting), None)


def weights_file(folder: Path) -> Path:
    """The file with the averaged weights of a checkpoint, thinned or not."""
    try:
        return folder / read_checkpoint(folder).weights
    except ValueError:
        return folder / STATE_FILE


def intact(folder: Path, name: str) -> bool:
    """Whether a file of a checkpoint is there as it was written; without a manifest, whether it is there."""
    fetch_files(folder, (MANIFEST_FILE, name))
    if not (folder / MANIFEST_FILE).exists():
        return (folder / name).is_file()
    try:
        return read_checkpoint(folder).listing.fault(folder, (name,)) is None
    except ValueError:
        return False


def prune(training: Path) -> None:
    """Thin old checkpoints: all but the newest two and the best one keep the averaged weights alone.

    Every rung can be sampled and scored from what is left of it, a quarter of the size. A process that is killed here
    leaves each checkpoint whole, thinned or not.

    Args:
        training: The folder with the checkpoints; rank 0 alone calls this, when a new one is there.
    """
    found = [each for each in checkpoints(training) if each.fault(contents=False) is None]
    states = [each for each in found if each.resumable]
    kept = states[-NEWEST_KEPT:]
    best = _best_nimg(kept[-1].folder) if kept else None
    kept += [each for each in states if each.nimg == best][-1:]
    for checkpoint in found:
        if checkpoint.weights != STATE_FILE:
            (checkpoint.folder / STATE_FILE).unlink(missing_ok=True)  # left by a process that was killed
        elif checkpoint in states and checkpoint not in kept:
            thin(checkpoint)


def _best_nimg(folder: Path) -> int | None:
    """Images that had been seen when the score was least."""
    rungs: Iterable[Mapping[str, Any]] = read_json(folder / RUNGS_FILE) or ()
    scored = [(float(rung["score"]), int(rung["nimg"])) for rung in rungs if math.isfinite(rung.get("score", math.nan))]
    return min(scored)[1] if scored else None


def thin(checkpoint: Checkpoint) -> None:
    """Replace the state of a checkpoint by the averaged weights in it; one that is torn is set aside.

    Those of earlier versions, which have no manifest, are left as they are.
    """
    fault, folder = checkpoint.fault(), checkpoint.folder
    if fault is not None:
        set_state_aside(folder, fault)
    elif checkpoint.listing.sha256:
        tensors, nimg = read_ema(folder / STATE_FILE)
        save_ema(tensors, nimg, folder / AVERAGED_FILE)
        listing = checkpoint.listing.replaced(STATE_FILE, folder / AVERAGED_FILE)
        write_json(folder / MANIFEST_FILE, sealed({"nimg": nimg, **listing.values()}))  # thinned from here on
        (folder / STATE_FILE).unlink()


def forget_snapshot(training: Path) -> None:
    """Remove what Ray Train notes of its checkpoints: it refuses to start where that is torn, and we go by the folders.

    Args:
        training: Ray Train's folder; no training runs in it.
    """
    (training / SNAPSHOT_FILE).unlink(missing_ok=True)
