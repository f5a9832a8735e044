"""The sections of the settings: frozen dataclasses that refuse values out of their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from cedm_ray.diffusion.settings import NetSettings, TrainSettings
from cedm_ray.errors import require

Grouping = Literal["temi", "kmeans", "labels", "superclasses", "clip", "none", "file"]
"""Where the condition of the diffusion model comes from; C can be searched over for temi and kmeans."""
SamplerName = Literal["gp", "tpe", "random"]
RuleName = Literal["fitted", "promotion", "asha", "none"]
DetectorName = Literal["inception", "dinov2", "backbone", "lenet"]
SEARCHED: tuple[Grouping, ...] = ("temi", "kmeans")


@dataclass(frozen=True)
class ClipSettings:
    """Zero-shot pseudo-labels, for ``grouping clip``."""

    model: str = "open_clip:ViT-bigG-14/laion2b_s39b_b160k"
    """OpenCLIP model that compares images with class names."""
    weights: Path | None = None
    """File with its weights (when not given: downloaded)."""
    class_names: Path | None = None
    """Text file with one class name a line (when not given: the dataset's own)."""


@dataclass(frozen=True)
class EmbedSettings:
    batch_size: int = 128
    """Images that go through the backbone at once."""
    num_actors: int = 1
    """Processes that hold a copy of the backbone."""
    cpus_per_actor: float = 1.0
    """CPUs of each of them; all together stay below the CPUs of the cluster."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")
        require(self.num_actors >= 1, "num_actors", self.num_actors, "be at least 1")
        require(self.cpus_per_actor > 0, "cpus_per_actor", self.cpus_per_actor, "be above 0")


@dataclass(frozen=True)
class BoundSettings:
    rule: Literal["fit", "paper"] = "fit"
    """How C_max is searched: a curve fitted to repeated readings, with an interval, or the paper's rule of one reading
    for each C."""
    c_start: int = 100
    """Number of clusters of the first probe."""
    cutoff: float = 0.96
    """C_max is the C at which the share of used clusters r_C falls to this."""
    precision: float = 0.2
    """The fit ends when the upper end of its interval is at most (1 + precision)^2 times the lower one."""
    resolution: int = 10
    """The search also ends when C_max is known to this many clusters (the fit: and to a factor of 2)."""
    confidence: float = 0.95
    """Probability with which the interval of the fit holds C_max."""
    max_probes: int = 12
    """Full probes after which the fit ends in any case (twice as many where so many readings lie above the cutoff)."""
    low_heads: int | None = 4
    """Heads of the cheap probes that bracket C_max before full ones decide (None: none are run, nor where TEMI has no
    more heads than these)."""
    low_spread: float = 0.12
    """How far C_max is believed to be off at that number of heads: standard deviation of ln C_max."""
    max_concurrent: int | None = None
    """Probes at once (as many as the cluster holds, when not given)."""
    lower: bool = False
    """Also find the paper's lower bound: the clusters that TEMI uses at gamma 1 when it is given far too many."""
    lower_clusters: tuple[int, ...] = ()
    """Numbers of clusters that TEMI is given for the lower bound (when not given: 1.5, 2 and 3 times the upper end of
    C_max's interval)."""
    from_lower: bool = False
    """Search C from the lower bound on instead of from 2."""
    c_max: int | None = None
    """Take this upper bound and look for none (k-means needs it)."""

    def __post_init__(self) -> None:
        require(self.c_start >= 2, "c_start", self.c_start, "be at least 2")
        require(0 < self.cutoff <= 1, "cutoff", self.cutoff, "lie in (0, 1]")
        require(self.cutoff < 1 or self.rule == "paper", "cutoff", self.cutoff, "be below 1 for rule fit")
        require(self.precision > 0, "precision", self.precision, "be above 0")
        require(self.resolution >= 1, "resolution", self.resolution, "be at least 1")
        require(0 < self.confidence < 1, "confidence", self.confidence, "lie in (0, 1)")
        require(self.max_probes >= 1, "max_probes", self.max_probes, "be at least 1")
        require(self.low_heads is None or self.low_heads >= 1, "low_heads", self.low_heads, "be at least 1")
        require(self.low_spread > 0, "low_spread", self.low_spread, "be above 0")
        at_once = self.max_concurrent
        require(at_once is None or at_once >= 1, "max_concurrent", at_once, "be at least 1")
        require(all(c >= 2 for c in self.lower_clusters), "lower_clusters", self.lower_clusters, "be at least 2 each")
        require(self.lower or not self.from_lower, "from_lower", self.from_lower, "be given together with lower")
        require(self.c_max is None or self.c_max >= 3, "c_max", self.c_max, "be at least 3")


@dataclass(frozen=True)
class DiffusionSettings(NetSettings, TrainSettings):
    """The network and its training, in one group of flags."""

    def __post_init__(self) -> None:
        NetSettings.__post_init__(self)
        TrainSettings.__post_init__(self)


@dataclass(frozen=True)
class GranularitySettings:
    sampler: SamplerName | None = None
    """Who proposes numbers of clusters: gp (a Gaussian process over ln C that models noise), tpe or random of Optuna
    (when not given: gp, or tpe where the file has a space of other settings)."""
    rule: RuleName | None = None
    """Who goes on from a rung: fitted (the training that a model of the learning curves expects most of),
    promotion (ASHA that pauses at each rung and promotes), asha (ASHA that stops), or none (when not given: fitted, or
    promotion where the file has a space of other settings)."""
    grid_points: int = 24
    """Numbers of clusters to choose from, log-spaced from 2 to the upper end of C_max's interval: the full grid."""
    share: float = 0.25
    """Budget of the search, as a share of the images that the full grid would see, where no other budget is given."""
    num_trials: int | None = None
    """Numbers of clusters to start at most (when not given: as many as the budget allows)."""
    total_kimg: int = 100_000
    """Training of a trial that is not stopped early, in thousands of images seen."""
    grace_kimg: int = 12_500
    """First rung, where a trial is first scored, in thousands of images seen; the next ones follow by the reduction
    factor."""
    reduction_factor: float = 2.0
    """Each rung is so many times the one before, and ASHA lets one in so many go on."""
    rungs: tuple[int, ...] = ()
    """The rungs themselves, ascending, in thousands of images seen, the last one being total_kimg (when not given: from
    grace_kimg on by the reduction factor)."""
    startup_trials: int = 4
    """Trials of a log-spaced design over the same range before scores decide."""
    tolerance: float = 0.0005
    """When no further training is expected to lower the score by more than this share, the fitted rule only finishes
    the one that looks best."""
    retrain_spread: float = 0.015
    """Relative standard deviation of a score over retrainings (published: 1 to 2 %)."""
    multi_objective: bool = False
    """Minimise the distances of all detectors together and show their Pareto front; the best is then the C with the
    lowest geometric mean."""
    max_concurrent: int | None = None
    """Trials at once (as many as the cluster holds, when not given)."""
    baselines: bool = True
    """Also train without conditioning (C = 1) and, where labels exist, on the labels."""

    def __post_init__(self) -> None:
        at_least_1 = ("grid_points", "grace_kimg", "startup_trials", "num_trials", "max_concurrent")
        for name in at_least_1:
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "be at least 1")
        require(0 < self.share <= 1, "share", self.share, "lie in (0, 1]")
        require(
            self.total_kimg >= self.grace_kimg or bool(self.rungs),
            "total_kimg",
            self.total_kimg,
            f"be at least grace_kimg ({self.grace_kimg})",
        )
        require(self.reduction_factor > 1, "reduction_factor", self.reduction_factor, "be above 1")
        ascending = all(0 < a < b for a, b in pairwise([*self.rungs, self.total_kimg + 1]))
        last = not self.rungs or self.rungs[-1] == self.total_kimg
        wanted = f"ascend from above 0 and end with total_kimg ({self.total_kimg})"
        require(ascending and last, "rungs", self.rungs, wanted)
        require(self.tolerance >= 0, "tolerance", self.tolerance, "not be negative")
        require(0 < self.retrain_spread < 1, "retrain_spread", self.retrain_spread, "lie in (0, 1)")

    def sampler_name(self, *, space: bool = False) -> SamplerName:
        """The sampler; ``space``: whether other settings are searched over beside C."""
        return self.sampler or ("tpe" if space else "gp")

    def rule_name(self, *, space: bool = False) -> RuleName:
        """Who goes on from a rung; ``space``: whether other settings are searched over beside C."""
        return self.rule or ("promotion" if space else "fitted")

    def rungs_kimg(self) -> tuple[int, ...]:
        """Where a trial is scored, in kimg: grace, grace * eta, ... and the end, ascending."""
        if self.rungs:
            return self.rungs
        rungs = []
        rung = float(self.grace_kimg)
        while rung < self.total_kimg:
            rungs.append(round(rung))
            rung *= self.reduction_factor
        return (*rungs, self.total_kimg)


@dataclass(frozen=True)
class BudgetSettings:
    """What a whole search may use: baselines, the search over C, retrainings and the final training."""

    mimg: float | None = None
    """Millions of images seen in training (when none of the three is given: granularity.share of the full grid for
    the search over C)."""
    gpu_hours: float | None = None
    """Hours of training and scoring, times the workers."""
    wall_hours: float | None = None
    """Hours from the start of the search."""
    images_per_s: float | None = None
    """Images that one training sees a second, to plan with until the first rung is measured (when not given: as
    measured by earlier trainings of these settings, else a rough published figure)."""

    def __post_init__(self) -> None:
        for name in ("mimg", "gpu_hours", "wall_hours", "images_per_s"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "be above 0")


@dataclass(frozen=True)
class FinalSettings:
    total_kimg: int = 200_000
    """Training of the best C, in thousands of images seen."""
    num_sets: int = 3
    """Independent sets of images in the final score."""
    num_images: int = 50_000
    """Images in each of them."""

    def __post_init__(self) -> None:
        require(self.total_kimg >= 1, "total_kimg", self.total_kimg, "be at least 1")
        require(self.num_sets >= 1, "num_sets", self.num_sets, "be at least 1")
        require(self.num_images >= 2, "num_images", self.num_images, "be at least 2")


@dataclass(frozen=True)
class ScoreSettings:
    detector: DetectorName = "inception"
    """Features of the Fréchet distance that is minimised: inception (FID), dinov2 (FDD), the backbone, or lenet (a
    small classifier trained on the dataset's labels)."""
    also: tuple[DetectorName, ...] = ()
    """Detectors whose distances are measured and logged beside it."""
    conditions: Literal["cluster_probs", "uniform"] = "cluster_probs"
    """Clusters of generated images: drawn from q(c), or uniformly from the used clusters."""
    num_images: int = 50_000
    """Images that a trial generates at each rung."""
    num_sets: int = 3
    """Independent sets of images at the last rung of the search; earlier ones take one."""
    num_steps: int = 18
    """Steps of the sampler; the network is evaluated 2 * num_steps - 1 times an image."""
    batch_size: int | None = None
    """Images generated at once by each worker; it changes no image (when not given: as many as fill the device)."""

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "num_images", self.num_images, "be at least 2")
        require(self.num_sets >= 1, "num_sets", self.num_sets, "be at least 1")
        require(self.num_steps >= 2, "num_steps", self.num_steps, "be at least 2")
        require(len(set(self.detectors)) == len(self.detectors), "also", self.also, "name each detector once")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")

    @property
    def detectors(self) -> tuple[DetectorName, ...]:
        """All detectors, the one that decides first."""
        return (self.detector, *self.also)


@dataclass(frozen=True)
class ResourceSettings:
    num_workers: int = 2
    """Processes of one training (data parallel)."""
    cpus_per_worker: float = 1.0
    """CPUs of each of them."""
    gpus_per_worker: float | None = None
    """GPUs of each of them (when not given: 1 where the cluster has GPUs, else 0)."""
    cpus_per_probe: float = 2.0
    """CPUs of one clustering (at most what the cluster has)."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "num_workers", self.num_workers, "be at least 1")
        require(self.cpus_per_worker > 0, "cpus_per_worker", self.cpus_per_worker, "be above 0")
        require(
            self.gpus_per_worker is None or self.gpus_per_worker >= 0,
            "gpus_per_worker",
            self.gpus_per_worker,
            "be at least 0",
        )
        require(self.cpus_per_probe > 0, "cpus_per_probe", self.cpus_per_probe, "be above 0")
