"""A real run: CIFAR-10 without a condition, on its labels, and on assignments from a file; FID against images seen.

    python benchmarks/cifar10_real.py --data-dir data --assignments temi_100.npy --inception inception.pt

The conditions share everything but the condition: network, first weights, order of the images, images seen. They take
turns, rung by rung, and each is scored at every rung, so that a run that ends early compares what all have reached.
Rungs double from --first-kimg up to --kimg, or, with --minutes, as far as the time of all calls together allows; the
last rung is then what still fits. Stopped or killed, the same command goes on. In --work: state and exported model of
each condition, samples, the statistics of the real images, and curves.png.

With a GPU the defaults are the paper's network and training (arXiv 2403.00570) but for the ramp of the learning rate,
which is shortened to --rampup-kimg; the averaged weights need no change, for their half-life is at most 5 % of the
images seen. Without one they are a small network, few images and a short sampler: that shows the comparison at a size
at which no score is near a published one. On a CPU, extraction makes some 12 images a second on one core: --real takes
the statistics of the first training images only, and the result says of how many.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, end
from safetensors.torch import save
from torch import Tensor

from cedm_ray.clustering.assignments_file import read_assignments
from cedm_ray.clustering.clustering_io import save_clustering
from cedm_ray.clustering.types import Clustering, make_clustering
from cedm_ray.data.cifar import CIFAR10, open_cifar
from cedm_ray.diffusion.compute import ComputeSettings, decide
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.model_file import FACTS_FILE, FORMAT, WEIGHTS_FILE
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.state_io import load_state, save_state
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import TrainState, new_state
from cedm_ray.errors import UserError
from cedm_ray.metrics.detectors import metric_name
from cedm_ray.metrics.frechet import FeatureSums
from cedm_ray.metrics.inception import load_inception
from cedm_ray.metrics.stats import FeatureStats, StatsFacts, load_stats, load_sums, save_stats, save_sums
from cedm_ray.report.curve_figures import efficiency_figure
from cedm_ray.report.grids import sample_grid
from cedm_ray.report.rows import Curve

SAVE_EVERY_S = 120.0
REAL_BATCH = 250
LEAST_GROWTH = 1.25  # of the images seen; a last rung below it says nothing new


@dataclass(frozen=True)
class Condition:
    """What one of the trainings is conditioned on."""

    name: str
    label: str
    clustering: Clustering | None


def parsed() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with CIFAR-10's official files")
    parser.add_argument("--assignments", type=Path, required=True, help="cluster of each training image, in order")
    parser.add_argument("--inception", type=Path, help="weights of FID's Inception-v3; fetched if left out")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10_real"), help="folder for all that is made")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--first-kimg", type=int, default=250 if cuda else 5, help="first rung, thousands of images")
    parser.add_argument("--kimg", type=int, default=200_000 if cuda else 20, help="last rung")
    parser.add_argument("--minutes", type=float, default=60.0 if cuda else None, help="time for all, calls together")
    parser.add_argument("--images", type=int, default=10_000 if cuda else 2_048, help="generated for each score")
    parser.add_argument("--real", type=int, default=50_000 if cuda else 5_000, help="real images that they are held to")
    parser.add_argument("--steps", type=int, default=18 if cuda else 8, help="of the sampler; 2 n - 1 evaluations")
    parser.add_argument("--sample-batch", type=int, help="images sampled at once; what fits if left out")
    parser.add_argument("--channels", type=int, default=128 if cuda else 32)
    parser.add_argument("--channel-mult", type=int, nargs="+", default=[2, 2, 2] if cuda else [1, 2, 2])
    parser.add_argument("--blocks", type=int, default=4 if cuda else 1)
    parser.add_argument("--attn", type=int, nargs="*", default=[16] if cuda else [8], help="resolutions with attention")
    parser.add_argument("--dropout", type=float, default=0.13 if cuda else 0.0)
    parser.add_argument("--augment-prob", type=float, default=0.12 if cuda else 0.0)
    parser.add_argument("--batch", type=int, default=1024 if cuda else 64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rampup-kimg", type=float, default=200.0 if cuda else 2.0, help="ramp of the learning rate")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16", "fp16"), default="auto")
    parser.add_argument("--sample-precision", choices=("auto", "float32", "bf16", "fp16"), default="auto")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="by the device if left out")
    parser.add_argument("--device-batch", type=int, help="images computed at once in training")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.first_kimg < 1 or args.kimg < args.first_kimg:
        parser.error("--first-kimg must be at least 1, and --kimg at least --first-kimg")
    return args


def conditions(labels: np.ndarray, assignments: Path) -> list[Condition]:
    """None, the labels, and the clusters of a file."""
    given = read_assignments(assignments, num_images=len(labels))
    return [
        Condition("none", "no condition", None),
        Condition("labels", "labels", make_clustering(labels, CIFAR10.num_classes)),
        Condition("file", f"assignments, C = {given.num_clusters}", given),
    ]


def digest(condition: Condition) -> str | None:
    """What tells its assignments from others."""
    if condition.clustering is None:
        return None
    return hashlib.sha256(condition.clustering.assignments.tobytes()).hexdigest()


class Journal:
    """What has been done so far, in a file.

    Args:
        file: JSON; made if need be.
        settings: What decides the scores. A file of other settings is refused.

    Raises:
        UserError: If it is of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file = file
        settings = json.loads(json.dumps(settings))
        content = json.loads(file.read_text()) if file.is_file() else {"settings": settings}
        other = [name for name in settings if content["settings"].get(name) != settings[name]]
        if other:
            before, now = content["settings"].get(other[0]), settings[other[0]]
            raise UserError(
                f"{file.parent} was begun with {other[0]} {before}, and now it is {now}: give another --work"
            )
        self.settings: dict[str, Any] = settings
        self.rungs: list[int] = content.get("rungs", [])
        """In kimg, ascending; the last one may not be complete."""
        self.scores: dict[str, dict[str, dict[str, Any]]] = content.get("scores", {})
        """By condition and kimg: fid, loss, train_s, score_s."""
        self._spent_s: float = content.get("spent_s", 0.0)
        self._started_s = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Of all calls together, but for what a killed one did after it last wrote."""
        return self._spent_s + time.monotonic() - self._started_s

    def write(self) -> None:
        content = {
            "settings": self.settings,
            "rungs": self.rungs,
            "scores": self.scores,
            "spent_s": round(self.spent_s, 1),
        }
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self._file)


class RealRun:
    """The trainings, their scores, and where they are kept.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        wanted = ComputeSettings(
            precision=args.precision,
            sample_precision=args.sample_precision,
            channels_last=args.channels_last,
            device_batch=args.device_batch,
        )
        self.compute = decide(wanted, self.device)
        self.net_settings = NetSettings(args.channels, tuple(args.channel_mult), args.blocks, tuple(args.attn),
                                        args.dropout)  # fmt: skip
        self.settings = TrainSettings(
            total_batch=args.batch, lr=args.lr, lr_rampup_kimg=args.rampup_kimg, augment_prob=args.augment_prob
        )
        source = open_cifar(CIFAR10, args.data_dir.expanduser())
        self.images = torch.from_numpy(source.read(0, len(source))).to(self.device)
        labels = source.labels()
        assert labels is not None
        self.conditions = conditions(labels, args.assignments)
        self.detector = load_inception(args.inception, device=self.device)
        self.check_counts()
        args.work.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(args.work / "scores.json", self.terms())
        self.states: dict[str, TrainState] = {}
        self.real = self.real_stats()

    def check_counts(self) -> None:
        """Refuse numbers of images that give no score."""
        least, most = self.detector.dim, len(self.images)
        for name, value in (("images", self.args.images), ("real", self.args.real)):
            if value < least or (name == "real" and value > most):
                bound = f"lie in [{least}, {most}]" if name == "real" else f"be at least {least}"
                raise UserError(f"{name} is {value}; it must {bound}: change --{name}")

    def terms(self) -> dict[str, Any]:
        """What decides the scores."""
        names = ("images", "real", "steps", "seed")
        return {
            "network": asdict(self.net_settings),
            "training": asdict(self.settings),
            **{name: getattr(self.args, name) for name in names},
            "precision": self.compute.precision,
            "sample_precision": self.compute.sample_precision,
            "inception": self.detector.weights_hash,
            "assignments": digest(self.conditions[-1]),
        }

    @property
    def metric(self) -> str:
        """``fid``, or another name where the weights are not those that FID is defined on."""
        return metric_name(self.detector.name)

    def facts(self, count: int) -> StatsFacts:
        detector = self.detector
        return StatsFacts(detector.name, detector.weights_hash, detector.resize, "float32", detector.dim, count)

    def real_stats(self) -> FeatureStats:
        """Statistics of the first --real training images, read or made; what a killed call made is not lost."""
        num = self.args.real
        file = self.args.work / f"real-{num}-{self.detector.weights_hash[:8]}.safetensors"
        if file.is_file():
            return load_stats(file)
        begun = file.with_suffix(".sums")
        sums = load_sums(begun) if begun.is_file() else FeatureSums(self.detector.dim)
        kept_s = time.monotonic()
        while int(sums.count) < num:
            batch = self.images[int(sums.count) : min(int(sums.count) + REAL_BATCH, num)]
            sums.update(self.detector(batch).cpu())
            if time.monotonic() - kept_s > SAVE_EVERY_S:
                kept_s = time.monotonic()
                partial = begun.with_suffix(".partial")
                save_sums(sums, partial)
                partial.replace(begun)
                self.journal.write()
                print(f"real images: {int(sums.count):,} of {num:,}", flush=True)
        stats = FeatureStats(*sums.mean_cov(), self.facts(num))
        save_stats(stats, file)
        begun.unlink(missing_ok=True)
        return stats

    def folder(self, condition: Condition) -> Path:
        return self.args.work / condition.name

    def state(self, condition: Condition) -> TrainState:
        """The training as it stands; one for all rungs, so that it is compiled once."""
        if condition.name not in self.states:
            clustering = condition.clustering
            with torch.random.fork_rng([]):
                torch.manual_seed(self.args.seed)
                net = build_net(
                    self.net_settings,
                    self.images.shape[-1],
                    self.images.shape[1],
                    label_dim=0 if clustering is None else clustering.num_clusters,
                    augment=self.settings.augment_prob > 0,
                    sigma_data=self.settings.sigma_data,
                )
            state = new_state(net.to(self.device))
            file = self.folder(condition) / "state.safetensors"
            if file.is_file():
                load_state(state, file)
            self.states[condition.name] = state
        return self.states[condition.name]

    def train_to(self, condition: Condition, kimg: int) -> dict[str, float | None]:
        """Train to a rung; kept on the way, and at the end. What is told is of this call alone."""
        state, folder = self.state(condition), self.folder(condition)
        folder.mkdir(exist_ok=True)
        clusters = None if condition.clustering is None else torch.from_numpy(condition.clustering.assignments)
        source = ResidentImages(self.images, None if clusters is None else clusters.to(self.device))
        before, started_s = state.nimg, time.monotonic()
        losses: list[Tensor] = []
        kept_s = started_s
        for progress in train(
            state, source, settings=self.settings, stop_nimg=kimg * 1000, seed=self.args.seed, compute=self.compute
        ):
            losses.append(progress.loss)
            if time.monotonic() - kept_s > SAVE_EVERY_S:
                kept_s = self.keep(condition)
        loss = float(torch.stack(losses).mean()) if losses else None  # a killed call had got to its score
        seconds = time.monotonic() - started_s
        if losses:
            self.keep(condition)
        return {"loss": loss, "train_s": seconds, "trained": state.nimg - before}

    def keep(self, condition: Condition) -> float:
        save_state(self.state(condition), self.folder(condition) / "state.safetensors")
        self.journal.write()
        return time.monotonic()

    def score(self, condition: Condition) -> dict[str, float]:
        """FID of images of the averaged weights; the model is exported beside its samples."""
        started_s = time.monotonic()
        sums = FeatureSums(self.detector.dim, device=self.device)
        probs = None if condition.clustering is None else torch.from_numpy(condition.clustering.cluster_probs)
        samples: Tensor | None = None
        for images in generate(
            self.state(condition).ema, seed=self.args.seed, indices=range(self.args.images), cluster_probs=probs,
            batch_size=self.args.sample_batch, num_steps=self.args.steps, device=self.device,
            precision=self.compute.sample_precision, compile=self.compute.compile,
        ):  # fmt: skip
            sums.update(self.detector(images))
            samples = images[:64].cpu() if samples is None else samples
        assert samples is not None
        mu, sigma = sums.mean_cov()
        fid = FeatureStats(mu.cpu(), sigma.cpu(), self.facts(self.args.images)).distance(self.real)
        sample_grid(samples.numpy(), columns=8).save(self.folder(condition) / "samples.png")
        self.export(condition)
        return {"fid": fid, "score_s": time.monotonic() - started_s}

    def export(self, condition: Condition) -> None:
        """The averaged weights as a model that cedm_ray reads."""
        state, folder, clustering = self.state(condition), self.folder(condition), condition.clustering
        facts = {
            "format": FORMAT, "img_resolution": state.ema.img_resolution, "img_channels": state.ema.img_channels,
            "dataset": CIFAR10.name, "nimg": state.nimg,
            "label_dim": 0 if clustering is None else clustering.num_clusters, "grouping": condition.name,
            "diffusion": {**asdict(self.net_settings), **asdict(self.settings)},
            "num_steps": self.args.steps, "conditions": "cluster_probs", "seed": self.args.seed,
        }  # fmt: skip
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.ema.state_dict().items()}
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))
        if clustering is not None:
            save_clustering(clustering, folder / "clustering.safetensors")
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1))

    def missing(self, kimg: int) -> list[Condition]:
        """The conditions without a score at a rung."""
        return [each for each in self.conditions if str(kimg) not in self.journal.scores.get(each.name, {})]

    def next_rung(self) -> int | None:
        """The rung of the next round; None when all is done, or no further round fits into the time."""
        rungs = self.journal.rungs
        if not rungs:
            return int(self.args.first_kimg)
        last = rungs[-1]
        if self.missing(last):
            return last
        if last >= self.args.kimg:
            return None
        following = min(2 * last, self.args.kimg)
        if self.args.minutes is None:
            return following
        rounds = [scores[str(last)] for scores in self.journal.scores.values()]
        rates = [each["train_s"] / each["trained"] for each in rounds if each["trained"]]
        per_kimg_s = max(rates, default=0.0) * 1000 * len(rounds)
        left_s = self.args.minutes * 60 - self.journal.spent_s - sum(each["score_s"] for each in rounds)
        fitting = min(following, last + int(left_s / max(per_kimg_s, 1e-9)))
        return fitting if fitting >= LEAST_GROWTH * last else None

    def run(self) -> None:
        """Round after round."""
        while (kimg := self.next_rung()) is not None:
            if kimg not in self.journal.rungs:
                self.journal.rungs.append(kimg)
                self.journal.write()
            for condition in self.missing(kimg):
                trained = self.train_to(condition, kimg)
                scored = self.score(condition)
                self.journal.scores.setdefault(condition.name, {})[str(kimg)] = {**trained, **scored}
                self.journal.write()
                said = f"trained in {trained['train_s']:.0f} s, scored in {scored['score_s']:.0f} s"
                print(f"{condition.label}, {kimg:,} kimg: {self.metric} {scored['fid']:.2f}, {said}", flush=True)


def curves(run: RealRun) -> list[Curve]:
    """FID by images seen; what they are compared with first."""
    return [
        Curve(
            each.label,
            None,
            tuple((float(kimg), score["fid"]) for kimg, score in run.journal.scores.get(each.name, {}).items()),
            run.args.images,
        )
        for each in run.conditions
    ]


def figures(run: RealRun) -> dict[str, Any]:
    """What was measured, as plain values."""
    args, scores = run.args, run.journal.scores
    kimg = [rung for rung in run.journal.rungs if not run.missing(rung)]
    parameters = sum(each.numel() for each in run.state(run.conditions[0]).net.parameters())
    full = replace(run.net_settings, dropout=0.13) == NetSettings()
    size = "the paper's network" if full else f"a small network of {parameters / 1e6:.2f} million parameters"
    return {
        "terms": f"{size}, batch {args.batch}, {2 * args.steps - 1} evaluations an image",
        "kimg": kimg,
        "metric": run.metric,
        "num_images": args.images,
        "num_real": args.real,
        "conditions": [
            {
                "name": each.name,
                "label": each.label,
                "num_clusters": 1 if each.clustering is None else each.clustering.num_clusters,
                "fid": {at: round(score["fid"], 3) for at, score in scores.get(each.name, {}).items()},
                "images_per_s": {
                    at: round(score["trained"] / score["train_s"], 1)
                    for at, score in scores.get(each.name, {}).items()
                    if score["trained"]
                },
            }
            for each in run.conditions
        ],
        "settings": run.journal.settings,
        "minutes": round(run.journal.spent_s / 60, 1),
        "device": run.device.type,
    }


def print_table(found: Mapping[str, Any]) -> None:
    print(f"\nFID of {found['num_images']:,} against {found['num_real']:,} real images; {found['terms']}")
    print("| condition | C | " + " | ".join(f"{kimg:,} kimg" for kimg in found["kimg"]) + " |")
    print("|---|---:|" + "---:|" * len(found["kimg"]))
    for each in found["conditions"]:
        cells = [f"{each['fid'][str(kimg)]:.2f}" for kimg in found["kimg"]]
        print(f"| {each['label']} | {each['num_clusters']} | " + " | ".join(cells) + " |")
    falls = all(b < a for each in found["conditions"] for a, b in pairwise(each["fid"].values()))
    print("FID falls from rung to rung" if falls else "FID does not fall from rung to rung everywhere")


def main() -> int:
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        run = RealRun(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.run()
    *others, own = curves(run)
    figure = efficiency_figure(own, others, metric=run.metric)
    figure.savefig(args.work / "curves.png", dpi=120)
    found = figures(run)
    print_table(found)
    end(found, args.json, packages=("torch", "numpy", "torch-fidelity"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
