"""python -m cedm_ray.sample: images from the model of a finished search."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from cedm_ray.devices import default_device, net_device
from cedm_ray.diffusion.compute import ComputeSettings, decide
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.starts import draw_conditions
from cedm_ray.errors import UserError, require
from cedm_ray.flags import parse_flags
from cedm_ray.report.grids import sample_grid
from cedm_ray.stages.results.exported import Confidence, ExportedModel, open_confidence, open_exported
from cedm_ray.stages.results.sample_output import (
    Sample,
    file_name,
    free_place,
    is_grid,
    whole,
    write_image,
    write_table,
)
from cedm_ray.stages.show.progress import WorkCounter
from cedm_ray.stages.show.terminal import Terminal


@dataclass(frozen=True)
class SampleSettings:
    """Generate images with the model that a search has found; image i depends on the seed and i alone."""

    run: Path
    """Folder of a finished search, or of its export."""
    num: int = 64
    """Images to generate."""
    seed: int = 0
    """Seed of the noise and of the drawn clusters."""
    cluster: int | None = None
    """Cluster of all images (when not given: drawn for each of them, as in the scores)."""
    out: Path | None = None
    """PNG file for a grid of all images, or a folder for one PNG each and a table (when not given:
    samples-seed<SEED>.png)."""
    overwrite: bool = False
    """Replace a PNG file that is there."""
    confidence: bool = False
    """Rank the images by how sure the clustering's head is of them, the surest first."""
    guidance: float = 0.0
    """Weight w of classifier-free guidance, for a model that was trained with label dropout."""
    num_steps: int | None = None
    """Steps of the sampler (when not given: those of the scores)."""
    batch_size: int = 64
    """Images generated at once."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to compute (when not given: cuda where there is one)."""
    backbone_weights: Path | None = None
    """Weights of the backbone of the search, which the confidence needs."""

    def __post_init__(self) -> None:
        require(self.num >= 1, "num", self.num, "be at least 1")
        require(0 <= self.seed < 2**64, "seed", self.seed, "lie in [0, 2^64)")
        require(math.isfinite(self.guidance) and self.guidance >= 0, "guidance", self.guidance,
                "be a finite number, at least 0")  # fmt: skip
        require(self.num_steps is None or self.num_steps >= 2, "num_steps", self.num_steps, "be at least 2")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")


def sample(settings: SampleSettings, terminal: Terminal | None = None) -> tuple[Path, list[Sample]]:
    """Generate images and write them.

    Args:
        settings: Which images.
        terminal: Where progress is shown.

    Returns:
        The file or folder that was written, and its images, the surest first where confidence is asked for.

    Raises:
        UserError: If the model is not there or not whole, or does not go with the settings; nothing was written then.
    """
    terminal = terminal or Terminal(Console(file=sys.stderr, highlight=False, soft_wrap=True))
    default = Path(f"samples-seed{settings.seed}.png")
    out = free_place(settings.out or default, overwrite=settings.overwrite)
    device = _device(settings.device)
    model = open_exported(settings.run, device=device)
    _check_guidance(settings, model)
    probs = _conditions(settings.cluster, model)
    weights = settings.backbone_weights and settings.backbone_weights.expanduser()
    confidence = open_confidence(model, weights, device=device) if settings.confidence else None
    counter = WorkCounter("images", settings.num, "images")
    with whole(out) as scratch, terminal.stage(f"generating {settings.num:,} images", counter):
        folder = None if is_grid(out) else scratch
        images, sure = _generate(settings, model, probs, confidence, folder, counter)
        samples = _samples(settings, probs, sure)
        if folder is not None:
            write_table(samples, folder)
        else:
            ranked = images[[each.index for each in samples]]
            sample_grid(ranked, columns=math.ceil(math.sqrt(settings.num))).save(scratch, format="PNG")
    return out, samples


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA device here; leave it out or give --device cpu")
    return default_device() if name is None else torch.device(name)


def _check_guidance(settings: SampleSettings, model: ExportedModel) -> None:
    if settings.guidance == 0:
        return
    if model.cluster_probs is None:
        raise UserError(f"guidance is {settings.guidance:g}, but the model has no condition to guide to; leave it out")
    if model.label_dropout == 0:
        raise UserError(
            f"guidance is {settings.guidance:g}, but the model was trained without label dropout and knows no answer "
            "without a cluster; leave it out, or search again with --diffusion.label-dropout 0.1"
        )


def _conditions(cluster: int | None, model: ExportedModel) -> Tensor | None:
    """The distribution to draw the clusters from: the model's own, or all of it on one cluster."""
    probs = model.cluster_probs
    if cluster is None:
        return probs
    if probs is None:
        raise UserError(f"cluster is {cluster}, but the model was trained without a condition; leave it out")
    if not 0 <= cluster < len(probs):
        raise UserError(f"cluster is {cluster}; it must lie in [0, {len(probs)})")
    if probs[cluster] == 0:
        raise UserError(f"cluster is {cluster}, which holds no training image; give one of {_ranges(probs > 0)}")
    return torch.nn.functional.one_hot(torch.tensor(cluster), len(probs)).double()


def _ranges(used: Tensor) -> str:
    """For example ``0-3, 5, 7-9``."""
    numbers = torch.nonzero(used).flatten()
    runs = torch.tensor_split(numbers, torch.nonzero(numbers.diff() > 1).flatten() + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _generate(
    settings: SampleSettings,
    model: ExportedModel,
    probs: Tensor | None,
    confidence: Confidence | None,
    folder: Path | None,
    counter: WorkCounter,
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """All images (none where they go into a folder, which holds any number of them), and their confidences."""
    kept: list[NDArray[np.uint8]] = []
    sure: list[NDArray[np.float32]] = []
    done, device = 0, net_device(model.net)
    for batch in generate(
        model.net,
        seed=settings.seed,
        indices=range(settings.num),
        cluster_probs=probs,
        batch_size=settings.batch_size,
        num_steps=settings.num_steps or model.num_steps,
        guidance=settings.guidance,
        device=device,
        precision=decide(ComputeSettings(), device).sample_precision,
    ):
        images = batch.cpu().numpy()
        if folder is None:
            kept.append(images)
        else:
            for i, image in enumerate(images, start=done):
                write_image(image, folder / file_name(i))
        if confidence is not None:
            sure.append(confidence(batch))
        done += len(images)
        counter.add(len(images))
    none = np.empty((0, 0, 0, 0), np.uint8)
    return np.concatenate(kept) if kept else none, np.concatenate(sure) if sure else None


def _samples(settings: SampleSettings, probs: Tensor | None, sure: NDArray[np.float32] | None) -> list[Sample]:
    """The images in the order in which they are told."""
    clusters = None if probs is None else draw_conditions(settings.seed, range(settings.num), probs).tolist()
    order = range(settings.num) if sure is None else np.argsort(-sure, kind="stable").tolist()
    return [
        Sample(i, file_name(i), None if clusters is None else clusters[i], None if sure is None else float(sure[i]))
        for i in order
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    try:
        given = sys.argv[1:] if argv is None else argv
        out, samples = sample(parse_flags(SampleSettings, given, prog="python -m cedm_ray.sample"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    sure = [each.confidence for each in samples if each.confidence is not None]
    if sure:
        print(f"confidence: best {sure[0]:.4f}, median {statistics.median(sure):.4f}, worst {sure[-1]:.4f}")
    print(f"{len(samples):,} images: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
