"""python -m cedm_ray.evaluate: score a folder of generated images against a data set."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from cedm_ray.data.generated import open_generated
from cedm_ray.data.registry import TEST_SPLITS, open_source
from cedm_ray.data.sources import ImageSource
from cedm_ray.data.storage import DEFAULT_COPIES_FOLDER, storage_folder
from cedm_ray.data.subset import FirstImages
from cedm_ray.devices import default_device
from cedm_ray.errors import UserError, require
from cedm_ray.flags import parse_flags
from cedm_ray.metrics.evaluation import EvaluationInputs, evaluate_features
from cedm_ray.metrics.scores import Score
from cedm_ray.report.tables import scores_table
from cedm_ray.stages.inputs.detectors import DetectorSpec, check_detectors, lenet_spec, try_detectors
from cedm_ray.stages.inputs.features import MAX_KEPT, FeatureParts
from cedm_ray.stages.inputs.images import pack_images
from cedm_ray.stages.results.score_rows import score_row
from cedm_ray.stages.show.progress import WorkCounter
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.storage.bucket_files import keep_file
from cedm_ray.stages.storage.store import Store, for_this_user, key_of, prepare_storage, write_json


@dataclass(frozen=True)
class EvaluateSettings:
    """Score generated images against the training images of a data set."""

    images: str
    """Generated images of the data set's resolution: a folder or a ZIP."""
    dataset: str = "digits"
    """What they are compared with: digits, cifar10, cifar100, ffhq64, afhq64, or a path, as in a search."""
    data_dir: Path = Path("data")
    """Folder where the archives of the named datasets are, or are downloaded to."""
    resolution: int | None = None
    """Side of the images in pixels; a folder of images needs it."""
    detectors: tuple[Literal["inception", "dinov2", "lenet"], ...] = ("inception", "dinov2")
    """Whose features are compared: inception (FID), dinov2 (FDD), or lenet (a classifier trained on the labels)."""
    detector_weights: Path | None = None
    """Weights of FID's Inception-v3: a state dict or TorchScript (when not given: the canonical file, downloaded)."""
    dinov2_weights: Path | None = None
    """Weights of FDD's DINOv2 ViT-L/14 (when not given: timm's, downloaded)."""
    unconditional: str | None = None
    """Samples of an unconditional model, to which uFID is the distance: a folder or a ZIP."""
    num_images: int | None = None
    """Score the first so many generated images (when not given: all)."""
    max_real: int | None = None
    """Compare with the first so many training and test images (when not given: all)."""
    num_neighbors: int = 5
    """Neighbours that set the radii of precision, recall, density and coverage."""
    seed: int = 2020
    """Seed of the subsets of KID and the splits of the Inception Score."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a damaged, too small or too large image does: end the command, or be left out and counted."""
    storage_path: Path = Path("runs")
    """Folder where features are kept, or s3://bucket/prefix; a second evaluation against the same images reads them."""
    storage_copies: Path = DEFAULT_COPIES_FOLDER
    """Folder for copies of what lies in a bucket."""
    out: Path | None = None
    """JSON file for the scores (when not given: under evaluations/ in the storage folder)."""

    def __post_init__(self) -> None:
        require(len(self.detectors) >= 1, "detectors", self.detectors, "name at least one")
        require(self.num_neighbors >= 1, "num_neighbors", self.num_neighbors, "be at least 1")
        for name in ("num_images", "max_real"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "be at least 1")

    def storage(self) -> Path:
        """The storage folder on this machine."""
        return storage_folder(self.storage_path, self.storage_copies).expanduser()


@dataclass(frozen=True)
class Piles:
    """Folders of the packed images that are compared."""

    generated: Path
    real: Path
    test: Path | None
    unconditional: Path | None


def evaluate(settings: EvaluateSettings, terminal: Terminal | None = None) -> list[Score]:
    """Score generated images; features that an earlier evaluation or search made are read.

    Args:
        settings: What to compare with what.
        terminal: Where progress is shown.

    Returns:
        The scores, detector by detector.

    Raises:
        UserError: If images or weights are missing or do not fit one another, or if ``out`` cannot be written.
    """
    terminal = terminal or Terminal()
    if settings.out is not None:
        _try_out(settings.out.expanduser())
    with for_this_user():
        hashes = check_detectors(settings.detectors, settings.detector_weights, settings.dinov2_weights)
        try_detectors(settings.detectors, settings.detector_weights, settings.dinov2_weights)
        store = Store(prepare_storage(settings.storage()) / "store")
        piles = _piles(settings, store, terminal)
        found: list[Score] = []
        for name in settings.detectors:
            weights = {"inception": settings.detector_weights, "dinov2": settings.dinov2_weights}.get(name)
            spec = lenet_spec(piles.real, store) if name == "lenet" else DetectorSpec(name, weights, hashes[name])
            found += _scores(settings, piles, spec, store, terminal)
    return found


def _piles(settings: EvaluateSettings, store: Store, terminal: Terminal) -> Piles:
    """Open and pack what is compared."""

    def opened(resolution: int | None, split: Literal["train", "test"]) -> ImageSource:
        return open_source(
            settings.dataset,
            data_dir=settings.data_dir.expanduser(),
            resolution=resolution,
            split=split,
            on_bad_image=settings.on_bad_image,
        )

    def packed(source: ImageSource) -> Path:
        return pack_images(source, store, terminal, settings.on_bad_image)

    real = _first(opened(settings.resolution, "train"), settings.max_real)
    if len(real) > MAX_KEPT:
        raise UserError(
            f"{real.name} has {len(real):,} images; at most {MAX_KEPT:,} are compared here: "
            f"give --max-real, for example --max-real 50000"
        )
    made = _first(open_generated(settings.images, real), settings.num_images)
    plain = settings.unconditional
    return Piles(
        generated=packed(made),
        real=packed(real),
        test=packed(_first(opened(None, "test"), settings.max_real)) if settings.dataset in TEST_SPLITS else None,
        unconditional=None if plain is None else packed(open_generated(plain, real)),
    )


def _first(source: ImageSource, count: int | None) -> ImageSource:
    return source if count is None else FirstImages(source, min(count, len(source)))


def _scores(
    settings: EvaluateSettings, piles: Piles, spec: DetectorSpec, store: Store, terminal: Terminal
) -> Iterator[Score]:
    """The scores in the features of one detector."""
    device = default_device()

    def parts(images: Path | None) -> FeatureParts | None:
        return None if images is None else FeatureParts(images, spec, store)

    generated, real = FeatureParts(piles.generated, spec, store), FeatureParts(piles.real, spec, store)
    test, unconditional = parts(piles.test), parts(piles.unconditional)
    _extract([each for each in (generated, real, test, unconditional) if each is not None], spec, device, terminal)
    inputs = EvaluationInputs(
        facts=real.stats_facts(),
        generated=generated.features(),
        real=real.features(),
        logits=generated.logits(),
        test=None if test is None else test.features(),
        unconditional=None if unconditional is None else unconditional.stats(),
    )
    with terminal.stage(f"comparing features of {spec.name}"):
        for score in evaluate_features(inputs, num_neighbors=settings.num_neighbors, seed=settings.seed, device=device):
            terminal.line(f"  {score.metric} {score.value:.5g}")
            yield score


def _extract(piles: Sequence[FeatureParts], spec: DetectorSpec, device: torch.device, terminal: Terminal) -> None:
    """Make the features that are missing."""
    missing = [(parts, bounds) for parts in piles for bounds in parts.missing()]
    if not missing:
        return
    total = sum(stop - start for _, (start, stop) in missing)
    counter = WorkCounter(f"features of {spec.name}", total, "images")
    with terminal.stage(f"{total:,} images through {spec.name}", counter):
        detector = spec.load(device)
        for parts, bounds in missing:
            parts.make(bounds, detector, device, counter.add)


def _try_out(out: Path) -> None:
    """Refuse a file that could not be written at the end, before hours are spent."""
    with _written(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=out.parent).close()


@contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"out {out} cannot be written ({reason}); give another file with --out") from error


def write_scores(settings: EvaluateSettings, scores: Sequence[Score]) -> Path:
    """Keep scores, with what was compared, as JSON; returns the file.

    Raises:
        UserError: If it cannot be written.
    """
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    del asked["storage_copies"]  # where a bucket's copy lies changes no score
    facts = {"settings": asked, "scores": [asdict(score) for score in scores]}
    default = settings.storage() / "evaluations" / f"{key_of(facts)}.json"
    out = default if settings.out is None else settings.out.expanduser()
    with nullcontext() if settings.out else for_this_user(), _written(out):
        write_json(out, facts)
    keep_file(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    try:
        given = sys.argv[1:] if argv is None else argv
        settings = parse_flags(EvaluateSettings, given, prog="python -m cedm_ray.evaluate")
        scores = evaluate(settings)
        out = write_scores(settings, scores)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the features that are stored", file=sys.stderr)
        return 130
    console = Console(highlight=False)
    console.print()
    console.print(scores_table([score_row(score) for score in scores], f"{settings.images} against {settings.dataset}"))
    console.print(f"scores: {out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
