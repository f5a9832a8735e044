"""What Ray Tune, Ray Train and MLflow cost a trial, as a share of a trial of the paper's size.

    python benchmarks/ray_overhead.py

The product's own trial (cedm_ray.stages) trains a small network on the real digits, and a bare loop in this process
does the same: the same images in the same batches, the same scores of the same generated images (they have to agree), a
checkpoint at each rung. Every round runs four of them:

    bare      three rungs in one loop
    one       one rung in one leg, through Tune, Train and MLflow
    leg       three rungs in one leg
    legs      three rungs, each a leg of its own: paused, its processes ended, and started again

What a trial takes beside its training and scoring, less what the bare loop takes beside them, is
start + rungs * per_rung + (legs - 1) * per_resume, from which the three are found; a step's own extra time is the
difference of the fastest rungs. A trial of the paper's size is 100 million images on four A100, about a day (86,400
seconds; arXiv 2403.00570), in batches of 1,024, scored at four rungs, and here each rung is a leg of its own, which is
the worst that a search does. Its checkpoint is larger: Ray Train copies it to its place once, so a copy of a file of
that size is timed and added to each rung. The start of Ray and of MLflow's database, once for a search, is told beside.
Medians over rounds. Two to four minutes on two cores.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from record import arguments, end

from cedm_ray.config import SearchConfig, load
from cedm_ray.data.digits import digits
from cedm_ray.data.pack import load_packed
from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import build_net
from cedm_ray.diffusion.state_io import save_state
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import new_state
from cedm_ray.granularity.runs import Leg, name_of
from cedm_ray.granularity.search import Verdict
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.images import pack_images
from cedm_ray.stages.inputs.scoring import prepare_scoring
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.storage.paths import ARTIFACTS_FOLDER, database_uri
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.tracking.tracker import Tracker
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.records import read_record
from cedm_ray.stages.training.trial_job import Planner, TrialJob
from cedm_ray.stages.training.trials import tune_trials

PAPER_S, PAPER_KIMG, PAPER_BATCH, PAPER_RUNGS = 86_400, 100_000, 1024, 4
PAPER_STATE_BYTES = 4 * 4 * 56_000_000  # network, average and two moments of 56 million parameters in float32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Course:
    """How one trial went."""

    outside_s: float
    """All its time but that of training and scoring."""
    step_s: tuple[float, ...]
    """Of training, for each step of a rung."""
    scores: tuple[float, ...]


class OneTraining:
    """Gives Tune the legs of one training and hears its rungs, as a search does.

    Args:
        ledger: Writes down what happens, also to MLflow.
        params: Of the training.
        rungs: In kimg.
        pausing: Whether each rung ends a leg.
    """

    def __init__(self, ledger: Ledger, params: Mapping[str, Any], rungs: Sequence[int], *, pausing: bool) -> None:
        self._ledger, self._params, self._rungs, self._pausing = ledger, params, list(rungs), pausing
        self._heard, self._running, self._over = 0, False, False

    @property
    def done(self) -> bool:
        return self._over

    def ask(self) -> Leg | None:
        if self._running or self._over:
            return None
        self._running = True
        if self._heard:
            self._ledger.open(self._params)
        stop = next(rung for rung in self._rungs if rung > self._heard)
        return Leg(name_of(self._params), self._params, self._heard, stop)

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        self._heard = int(result["kimg"])
        self._ledger.add(self._params, result)
        if not self._pausing or self._heard == self._rungs[-1]:
            return "continue"
        self._ledger.pause(self._params)
        self._running = False
        return "pause"

    def end(self, key: str, failed: bool) -> None:
        self._running, self._over = False, True


class Bench:
    """The trials, through Ray and without it.

    Args:
        ctx: A search that has no other stages.
        args: The command line.
    """

    def __init__(self, ctx: Context, args: argparse.Namespace) -> None:
        self.ctx, self.kimg = ctx, args.kimg
        self.scoring = prepare_scoring(ctx, cast(Any, None))  # the detector is lenet: no embeddings are read
        self._seeds = itertools.count(1)

    def planner(self, rungs: int) -> Planner:
        kimg = [self.kimg * rung for rung in range(1, rungs + 1)]
        settings = {"granularity.rungs": tuple(kimg), "granularity.total_kimg": kimg[-1]}
        return Planner(
            config=self.ctx.config.with_values(settings),
            store=self.ctx.store,
            embedding_inputs={},
            images=self.ctx.images,
            images_sha256=self.ctx.packed.facts.pixels_sha256,
            given={},
            scoring=self.scoring,
        )

    def by_ray(self, rungs: int, *, pausing: bool = False) -> tuple[Course, TrialJob]:
        """A trial of the search's kind; a seed of its own, for what is stored would be read."""
        planner = self.planner(rungs)
        params = {"grouping": "none", "num_clusters": 1, "train_seed": next(self._seeds)}
        job, ledger = planner.job(params), Ledger(self.ctx, planner)
        source = OneTraining(ledger, params, job.rungs_kimg, pausing=pausing)
        started_s = time.monotonic()
        tune_trials(self.ctx, ledger, f"trial-{params['train_seed']}", cast(Any, None), source, at_once=lambda: 1)
        wall_s = time.monotonic() - started_s
        record = read_record(job.path)
        if record is None or record.state != "complete":
            raise SystemExit(f"the trial through Ray is {record and record.state}: {record and record.reason}")
        return course(wall_s, record.rungs, job), job

    def bare(self, job: TrialJob) -> Course:
        """The same training in a plain loop."""
        started_s = time.monotonic()
        packed = load_packed(job.images)
        source = ResidentImages(torch.from_numpy(packed.images.copy()), None)
        (reference,) = job.scoring.references
        detector, real = reference.detector.load(CPU), reference.load()
        with torch.random.fork_rng([]):
            torch.manual_seed(job.seed)
            net = build_net(job.diffusion, packed.resolution, packed.channels, label_dim=0,
                            augment=job.diffusion.augment_prob > 0, sigma_data=job.diffusion.sigma_data)  # fmt: skip
        state, rungs = new_state(net), []
        with tempfile.TemporaryDirectory() as folder:
            for kimg in job.rungs_kimg:
                start_nimg, train_from_s = state.nimg, time.monotonic()
                for _ in train(state, source, settings=job.diffusion, stop_nimg=kimg * 1000, seed=job.seed):
                    pass
                score_from_s = time.monotonic()
                sums = FeatureSums(detector.dim)
                for images in generate(state.ema, seed=job.seed, indices=range(job.score.num_images),
                                       cluster_probs=None, batch_size=job.score.batch_size,
                                       num_steps=job.score.num_steps, device=CPU):  # fmt: skip
                    sums.update(detector(images))
                score = frechet_distance(*sums.mean_cov(), real.mu, real.sigma)
                done_s = time.monotonic()
                save_state(state, Path(folder) / "state.safetensors")
                speed = (state.nimg - start_nimg) / (score_from_s - train_from_s)
                rungs.append({"kimg": kimg, "nimg": state.nimg, "images_per_s": speed, "score": score,
                              "score_s": done_s - score_from_s})  # fmt: skip
        return course(time.monotonic() - started_s, rungs, job)


def course(wall_s: float, rungs: Sequence[Mapping[str, Any]], job: TrialJob) -> Course:
    """What of a trial's time went where."""
    seen = [b - a for a, b in itertools.pairwise([0, *(rung["nimg"] for rung in rungs)])]
    train_s = sum(images / rung["images_per_s"] for images, rung in zip(seen, rungs, strict=True))
    score_s = sum(rung["score_s"] for rung in rungs)
    step_s = tuple(job.diffusion.total_batch / rung["images_per_s"] for rung in rungs)
    return Course(wall_s - train_s - score_s, step_s, tuple(rung["score"] for rung in rungs))


def agree(one: Course, other: Course) -> None:
    """Refuse to compare trainings that did not do the same."""
    apart = max(abs(a / b - 1) for a, b in zip(one.scores, other.scores, strict=True))
    if apart > 1e-3:
        raise SystemExit(f"the scores of the trial and of the bare loop differ by {apart:.1e}: {one} {other}")


def copy_s() -> float:
    """Time of copying a checkpoint of the paper's network from one place on the disk to another."""
    with tempfile.TemporaryDirectory() as folder:
        block = torch.randint(0, 256, (16 * 2**20,), dtype=torch.uint8).numpy().tobytes()
        with open(Path(folder) / "state", "wb") as file:
            for _ in range(PAPER_STATE_BYTES // len(block)):
                file.write(block)
        started_s = time.monotonic()
        shutil.copyfile(Path(folder) / "state", Path(folder) / "copy")
        return time.monotonic() - started_s


def parsed() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often all are run, in turns")
    parser.add_argument("--kimg", type=int, default=4, help="thousands of images seen from rung to rung")
    parser.add_argument("--images", type=int, default=200, help="generated for a score")
    args = parser.parse_args()
    if min(args.rounds, args.kimg) < 1 or args.images < 64:
        parser.error("--rounds and --kimg must be at least 1, and --images at least 64")
    return args


def flags(args: argparse.Namespace, storage: Path) -> list[str]:
    """Those of the search whose trials these are."""
    settings = {
        "--storage-path": storage, "--grouping": "none", "--resources.num-workers": 1,
        "--resources.gpus-per-worker": 0,
        "--score.num-images": args.images, "--score.num-steps": 4, "--score.num-sets": 1,
        "--score.batch-size": 100,
    }  # fmt: skip
    return [str(word) for pair in settings.items() for word in pair]


def measure(args: argparse.Namespace, storage: Path, terminal: Terminal) -> dict[str, Any]:
    """Run the rounds within one Ray."""
    config: SearchConfig = load(flags(args, storage))
    store = Store(storage / "store")
    images = pack_images(digits(), store, terminal)
    started_s = time.monotonic()
    tracker = Tracker(database_uri(storage), "cedm_ray/overhead", storage / ARTIFACTS_FOLDER)
    run = tracker.start("overhead", "overhead", {}, {})
    mlflow_s, started_s = time.monotonic() - started_s, time.monotonic()
    rounds: list[dict[str, Course]] = []
    with connected(config) as shares:
        ray_s = time.monotonic() - started_s
        context = Context(
            config=config, folder=storage / "search", store=store, images=images, packed=load_packed(images),
            weights_hash="", detector_hashes={}, terminal=terminal, tracker=tracker, shares=shares, board=Board(),
        )  # fmt: skip
        bench = Bench(context, args)
        for _ in range(args.rounds):
            one, first = bench.by_ray(1)
            bench.bare(first)  # the first one in a process is slower
            leg, job = bench.by_ray(3)
            bare = bench.bare(job)
            legs, paused = bench.by_ray(3, pausing=True)
            again = bench.bare(paused)
            agree(leg, bare)
            agree(legs, again)
            rounds.append({"bare": bare, "one": one, "leg": leg, "legs": legs, "bare again": again})
            shown = ", ".join(f"{name} {each.outside_s:.1f}" for name, each in rounds[-1].items())
            terminal.line(f"seconds beside training and scoring: {shown}")
    tracker.end(run, "complete")
    return figures(rounds, {"ray_start_s": ray_s, "mlflow_start_s": mlflow_s})


def figures(rounds: Sequence[Mapping[str, Course]], once: Mapping[str, float]) -> dict[str, Any]:
    """The parts of the overhead and what they come to in a trial of the paper's size."""

    def fastest(*names: str) -> float:
        # A step takes milliseconds, and whatever else the machine does makes it longer, never shorter.
        return min(min(each[name].step_s) for each in rounds for name in names)

    def outside(name: str) -> float:
        return statistics.median(each[name].outside_s for each in rounds)

    bare_rung_s = outside("bare") / 3
    per_rung_s = (outside("leg") - outside("one")) / 2 - bare_rung_s
    per_resume_s = (outside("legs") - outside("leg")) / 2
    start_s = outside("one") - bare_rung_s - per_rung_s
    per_step_s = round(fastest("leg", "legs") - fastest("bare", "bare again"), 6)
    copied_s = copy_s()
    parts = {
        "start_s": start_s,
        "resumes_s": (PAPER_RUNGS - 1) * max(per_resume_s, 0.0),
        "rungs_s": PAPER_RUNGS * (max(per_rung_s, 0.0) + copied_s),
        # The loop around a step is the same whatever the step's size; below 0 it is noise.
        "steps_s": PAPER_KIMG * 1000 / PAPER_BATCH * max(per_step_s, 0.0),
    }
    return {
        "overhead_share": round(sum(parts.values()) / PAPER_S, 5),
        "overhead_s": round(sum(parts.values()), 1),
        "start_s": round(start_s, 2),
        "per_resume_s": round(per_resume_s, 2),
        "per_rung_s": round(per_rung_s, 2),
        "checkpoint_copy_s": round(copied_s, 2),
        "per_step_s": per_step_s,
        "parts_s": {name: round(value, 1) for name, value in parts.items()},
        "once_s": {name: round(value, 1) for name, value in once.items()},
        "outside_s": {name: [round(each[name].outside_s, 2) for each in rounds] for name in rounds[0]},
        "step_s": {name: [round(step, 5) for each in rounds for step in each[name].step_s] for name in rounds[0]},
    }


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)  # as the worker of a trial with one CPU
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        with output_to(storage / "log", terminal.console):
            found = measure(args, storage, terminal)
    for name in ("start_s", "per_resume_s", "per_rung_s", "checkpoint_copy_s", "per_step_s"):
        print(f"{name:>18}: {found[name]}")
    print(f"a trial of the paper's size: {found['overhead_s']} s of {PAPER_S:,} s, {found['overhead_share']:.2%}")
    end(found, args.json, packages=("torch", "ray", "mlflow"))


if __name__ == "__main__":
    main()
