"""The sections of the settings: frozen dataclasses that refuse values out of their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cedm_ray.diffusion.settings import NetSettings, TrainSettings
from cedm_ray.errors import require

Grouping = Literal["temi", "kmeans", "labels", "superclasses", "clip", "none", "file"]
"""Where the condition of the diffusion model comes from; C can be searched over for temi and kmeans."""
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
    """The fit ends when the interval reaches no further than this share below and above C_max."""
    resolution: int = 10
    """The search ends when C_max is known to this many clusters."""
    confidence: float = 0.95
    """Probability with which the interval of the fit holds C_max."""
    max_probes: int = 12
    """Full probes after which the fit ends in any case (twice as many where r_C has never fallen to the cutoff)."""
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
    """Numbers of clusters that it is given (when not given: 1.5, 2 and 3 times the upper end of C_max's interval)."""
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
    num_trials: int = 15
    """Numbers of clusters C to try."""
    total_kimg: int = 100_000
    """Training of a trial that is not stopped early, in thousands of images seen."""
    grace_kimg: int = 12_500
    """First rung of early stopping, in thousands of images seen; the next ones follow by the reduction factor."""
    reduction_factor: float = 2.0
    """One in this many trials goes on from each rung."""
    startup_trials: int = 5
    """Trials of a log-spaced design over [2, C_max) before the sampler takes over."""
    max_concurrent: int | None = None
    """Trials at once (as many as the cluster holds, when not given)."""
    baselines: bool = True
    """Also train without conditioning (C = 1) and, where labels exist, on the labels."""

    def __post_init__(self) -> None:
        require(self.num_trials >= 1, "num_trials", self.num_trials, "be at least 1")
        require(self.grace_kimg >= 1, "grace_kimg", self.grace_kimg, "be at least 1")
        require(
            self.total_kimg >= self.grace_kimg,
            "total_kimg",
            self.total_kimg,
            f"be at least grace_kimg ({self.grace_kimg})",
        )
        require(self.reduction_factor > 1, "reduction_factor", self.reduction_factor, "be above 1")
        require(self.startup_trials >= 1, "startup_trials", self.startup_trials, "be at least 1")
        require(
            self.max_concurrent is None or self.max_concurrent >= 1,
            "max_concurrent",
            self.max_concurrent,
            "be at least 1",
        )

    def rungs_kimg(self) -> tuple[int, ...]:
        """Where a trial is scored, in kimg: grace, grace * eta, ... and the end, ascending."""
        rungs = []
        rung = float(self.grace_kimg)
        while rung < self.total_kimg:
            rungs.append(round(rung))
            rung *= self.reduction_factor
        return (*rungs, self.total_kimg)


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
    num_steps: int = 18
    """Steps of the sampler; the network is evaluated 2 * num_steps - 1 times an image."""
    batch_size: int = 256
    """Images generated at once by each worker."""

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "num_images", self.num_images, "be at least 2")
        require(self.num_steps >= 2, "num_steps", self.num_steps, "be at least 2")
        require(len(set(self.detectors)) == len(self.detectors), "also", self.also, "name each detector once")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "be at least 1")

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
