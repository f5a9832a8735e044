"""The samples that the head is most and least sure of, beside the unconditional model's from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from cedm_ray.devices import default_device, net_device
from cedm_ray.diffusion.compute import ComputeSettings, decide
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import build_net
from cedm_ray.diffusion.state_io import read_ema
from cedm_ray.errors import UserError
from cedm_ray.settings import DiffusionSettings
from cedm_ray.stages.context import Context
from cedm_ray.stages.results.exported import ExportedModel, open_confidence, open_exported
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.storage.bucket_files import fetch_files, keep_files
from cedm_ray.stages.storage.checkpoints import weights_file
from cedm_ray.stages.storage.paths import absolute
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.records import last_checkpoint, unconditional_record
from cedm_ray.stages.training.trial_job import TrialJob
from cedm_ray.weights.files import fill
from cedm_ray.weights.whole_file import whole_file

CONFIDENCE_FILE = "confidence.npz"
NUM_IMAGES, SHOWN = 512, 32


@dataclass(frozen=True)
class Unconditional:
    """A training without a condition."""

    checkpoint: Path
    """Folder of its checkpoint."""
    diffusion: DiffusionSettings
    """How its network is built."""


def rank_samples(
    export: Path,
    backbone_weights: Path | None,
    unconditional: Unconditional | None,
    out: Path,
    *,
    num_images: int = NUM_IMAGES,
    shown: int = SHOWN,
    seed: int,
    batch_size: int | None = None,
    device: torch.device,
) -> Path:
    """Generate images as they are scored and keep the ones that the TEMI head is most and least sure of.

    The file holds ``high`` and ``low``, shape ``(shown, C, R, R)`` uint8, the surest and the least sure first,
    ``high_probs`` and ``low_probs``, their largest cluster probability, ``high_indices`` and ``low_indices``, which
    images of the seed they are, and ``unconditional``, the other model's images from the noise of ``high``, in that
    order. It appears whole or not at all.

    Args:
        export: The folder of the exported model.
        backbone_weights: File with the backbone's weights; None for the library's own, or where it has none.
        unconditional: The other model; None where there is none.
        out: File to write, ``*.npz``; its folder exists. An older one is replaced.
        num_images: Images to choose from: 0 and on.
        shown: Images at each end.
        seed: Of the noise and of the drawn clusters.
        batch_size: Images generated at once; None for as many as fill the device.
        device: Where to compute.

    Returns:
        ``out``.

    Raises:
        UserError: If the model was not trained on TEMI clusters, or if a file is missing or does not fit.
        ValueError: If the two ends would overlap.

    Source: arXiv 2403.00570, Figs. 7 and 10.
    """
    if not 1 <= shown <= num_images // 2:
        raise ValueError(f"shown is {shown}; it must lie in [1, {num_images // 2}], half of the images")
    model = open_exported(export, device=device)
    confidence = open_confidence(model, backbone_weights, device=device)
    # Opened before the work starts, too: what does not fit is refused in seconds.
    other = None if unconditional is None else _unconditional_net(unconditional, model.net, device)
    images, sure = [], []
    for batch in _generate(model, model.net, model.cluster_probs, seed, range(num_images), batch_size):
        images.append(batch.cpu().numpy())
        sure.append(confidence(batch))
    pixels, probs = np.concatenate(images), np.concatenate(sure)
    # One order for both ends: among equal probabilities, too, no image stands at both.
    order = np.argsort(-probs, kind="stable")
    high, low = order[:shown], order[::-1][:shown]
    arrays = {**_end("high", pixels, probs, high), **_end("low", pixels, probs, low)}
    if other is not None:
        batches = _generate(model, other, None, seed, high.tolist(), batch_size)
        arrays["unconditional"] = torch.cat(list(batches)).cpu().numpy()
    _write(arrays, out)
    return out


def _generate(
    model: ExportedModel,
    net: EDMPrecond,
    probs: Tensor | None,
    seed: int,
    indices: Sequence[int],
    batch_size: int | None,
) -> Iterator[Tensor]:
    """Images of either network, with the sampler of the scores."""
    device = net_device(net)
    return generate(
        net,
        seed=seed,
        indices=indices,
        cluster_probs=probs,
        batch_size=batch_size,
        num_steps=model.num_steps,
        device=device,
        precision=decide(ComputeSettings(), device).sample_precision,
    )


def _end(
    name: str, pixels: NDArray[np.uint8], probs: NDArray[np.float32], chosen: NDArray[np.int64]
) -> dict[str, np.ndarray]:
    return {name: pixels[chosen], f"{name}_probs": probs[chosen].astype(np.float64), f"{name}_indices": chosen}


def _unconditional_net(given: Unconditional, like: EDMPrecond, device: torch.device) -> EDMPrecond:
    """The averaged network of a training without a condition, for images like those of another one."""
    settings, path = given.diffusion, weights_file(given.checkpoint)
    try:
        state, _ = read_ema(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"unconditional model {path} cannot be read ({error}); remove its trial's folder and run the search again"
        ) from error
    with torch.device("meta"):  # weights are not drawn, only to be overwritten
        net = build_net(
            settings,
            like.img_resolution,
            like.img_channels,
            label_dim=0,
            augment=settings.augment_prob > 0,
            sigma_data=settings.sigma_data,
        )
    net = net.to_empty(device=device)
    fill(net, state, source=f"unconditional model {path}", wanted="a training without a condition, of these settings")
    return net.eval().requires_grad_(False)


def _write(arrays: dict[str, np.ndarray], out: Path) -> None:
    with whole_file(out) as partial:
        np.savez(partial, allow_pickle=False, **arrays)


def make_confidence(ctx: Context, ledger: Ledger, job: TrialJob, export: Path) -> Path | None:
    """The ranked samples of the exported model, from the store or made now on the cluster.

    Args:
        ctx: The search.
        ledger: Its trials, the unconditional one among them.
        job: The final training.
        export: The folder of its exported model.

    Returns:
        The file in the store; None for a grouping that has no head.
    """
    if job.grouping != "temi":
        return None
    found = _unconditional(ledger)
    inputs = {
        "trial": job.key,
        "kimg": job.rungs_kimg[-1],
        "unconditional": None if found is None else found[0],
        "num_images": NUM_IMAGES,
        "shown": SHOWN,
        "confidence": 1,  # to be raised when the same models give another file
    }
    path = ctx.store.path("confidence", inputs)
    if ctx.store.facts(path) is None:
        shares = ctx.shares
        task = ray.remote(_rank).options(num_cpus=shares.cpus_per_probe, num_gpus=shares.gpus_per_probe)
        keep_files(export)
        ray.get(
            task.remote(
                export.absolute(),
                absolute(ctx.config.backbone_weights),
                None if found is None else found[1],
                ctx.store,
                path,
                inputs,
                seed=job.seed,
                batch_size=job.score.batch_size,
                threads=max(1, round(shares.cpus_per_probe)),
            )
        )
    return here(path / CONFIDENCE_FILE)


def _unconditional(ledger: Ledger) -> tuple[str, Unconditional] | None:
    """The complete training without a condition, with what stands for its weights.

    None where it was not asked for, or where no checkpoint of it is whole.
    """
    record = unconditional_record(ledger.records)
    if record is None:
        return None
    checkpoint, diffusion = last_checkpoint(record), ledger.planner.job(record.params).diffusion
    if checkpoint is None:
        return None
    return f"{record.key}-{record.rungs[-1]['kimg']}", Unconditional(checkpoint, diffusion)


def _rank(
    export: Path,
    weights: Path | None,
    unconditional: Unconditional | None,
    store: Store,
    path: Path,
    inputs: dict[str, Any],
    *,
    seed: int,
    batch_size: int | None,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    device = default_device()
    fetch_files(export, fresh=True)
    if unconditional is not None:
        fetch_files(unconditional.checkpoint)
    with store.create(path, inputs, {}) as scratch:
        out = scratch / CONFIDENCE_FILE
        rank_samples(export, weights, unconditional, out, seed=seed, batch_size=batch_size, device=device)
