"""One frozen, typed tree of settings: read from a search-space file, overridden by flags, checked once."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.data.registry import KNOWN_DATASETS
from cedm_ray.data.storage import COPIES, storage_folder
from cedm_ray.diffusion.compute import ComputeSettings
from cedm_ray.errors import UserError
from cedm_ray.settings import (
    SEARCHED,
    BoundSettings,
    BudgetSettings,
    ClipSettings,
    DetectorName,
    DiffusionSettings,
    EmbedSettings,
    FinalSettings,
    GranularitySettings,
    Grouping,
    ResourceSettings,
    ScoreSettings,
)

KMEANS_HAS_NO_BOUND = (
    "grouping is kmeans, which fills every cluster whatever C is (r_C = 1), so that no upper bound can be found; "
    "give one with --bound.c-max"
)
ALL_FLAGS = "python -m cedm_ray.search --help-all lists every flag"
Settings = TypeVar("Settings")
_PACKAGE_DIR = Path(__file__).resolve().parent


class Choice(BaseModel):
    """One of the given values."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["choice"]
    values: tuple[int | float | str | bool, ...] = Field(min_length=1)


class Range(BaseModel):
    """A number in [low, high], on a linear or a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["uniform", "loguniform", "randint", "lograndint"]
    low: float
    high: float

    def ends(self) -> tuple[float, float] | tuple[int, int]:
        """Low and high, as integers where the domain is of integers."""
        return (int(self.low), int(self.high)) if self.kind.endswith("randint") else (self.low, self.high)


Domain = Annotated[Choice | Range, Field(discriminator="kind")]


class SearchConfig(BaseModel):
    """Find the number of clusters on which a conditional diffusion model of these images does best."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)

    dataset: str = "digits"
    """digits, cifar10, cifar100, ffhq64, afhq64, or a path: a folder of images, a ZIP of EDM's kind, Parquet with an
    image column, or a remote folder (s3://, gs://)."""
    data_dir: Path = Path("data")
    """Folder where the archives of the named datasets are, or are downloaded to."""
    resolution: int | None = None
    """Side of the images in pixels; a folder of images needs it."""
    folder_labels: bool = False
    """Take the sub-folders of a folder of images (or Parquet's label column) as class labels."""
    image_column: str = "image"
    """Column of Parquet files that holds the images."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a damaged, too small or too large image does: end the search, or be left out and counted."""
    max_images: int | None = None
    """Use only the first so many images (for trying things out)."""
    search_space: Path | None = None
    """YAML file with the settings to start from (when not given: the dataset's in search_spaces/)."""
    backbone: str = "vit_base_patch16_224.dino"
    """Model that turns an image into an embedding: a timm name, open_clip:ARCH/TAG, or pixels."""
    backbone_weights: Path | None = None
    """File with its weights (safetensors, or tensors-only .pt/.pth)."""
    detector_weights: Path | None = None
    """Weights of FID's Inception-v3: a state dict or TorchScript (when not given: the canonical file, downloaded)."""
    dinov2_weights: Path | None = None
    """Weights of FDD's DINOv2 ViT-L/14 (when not given: timm's, downloaded)."""
    grouping: Grouping = "temi"
    """Condition of the diffusion model: temi or kmeans (searched over C), labels, superclasses, clip, none, or file."""
    assignments: Path | None = None
    """File with the cluster of each image, for grouping file: .npy, .csv, or .pt of tensors alone."""
    num_neighbors: int = 50
    """Nearest neighbours of each image, from which clustering draws its pairs."""
    metric: Literal["fid", "fdd"] | None = None
    """Score to minimise, the other one being logged beside it (when not given: score.detector and score.also)."""
    confirm: int = 0
    """Retrain every C that the noise cannot tell from the best one so many times, with fresh seeds."""
    dry_run: bool = False
    """Print the plan and what it will take, and start nothing."""
    storage_path: Path = Path("runs")
    """Folder for everything that is made; on a cluster, one that all nodes share, or s3://bucket/prefix."""
    storage_copies: Path = COPIES
    """Folder on each node for copies of what lies in a bucket."""
    tracking_uri: str | None = None
    """MLflow tracking server (when not given: a database in the storage folder)."""
    seed: int = 0
    """Seed of everything random."""
    clip: ClipSettings = ClipSettings()
    embed: EmbedSettings = EmbedSettings()
    temi: TemiSettings = TemiSettings()
    bound: BoundSettings = BoundSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    compute: ComputeSettings = ComputeSettings()
    score: ScoreSettings = ScoreSettings()
    granularity: GranularitySettings = GranularitySettings()
    budget: BudgetSettings = BudgetSettings()
    final: FinalSettings = FinalSettings()
    resources: ResourceSettings = ResourceSettings()
    space: tyro.conf.Suppress[dict[str, Domain]] = {}
    """Other settings to search over: dotted path to domain (search-space file only)."""

    def with_values(self, values: Mapping[str, Any]) -> SearchConfig:
        """The same settings with others at the given dotted paths, checked again.

        Raises:
            UserError: If a value is out of its range.
        """
        return _validated(self.tree_with(values), "search space")

    def tree_with(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as nested dictionaries, with others at the given dotted paths, unchecked."""
        tree = self.model_dump()
        for path, value in values.items():
            *sections, leaf = path.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[leaf] = value
        return tree


def _consistent(config: SearchConfig) -> SearchConfig:
    """Refuse what no single type can: numbers out of range, and settings that contradict one another."""
    for name in ("resolution", "max_images", "num_neighbors"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if config.confirm < 0:
        raise UserError(f"confirm is {config.confirm}; it must not be negative")
    workers, batch = config.resources.num_workers, config.diffusion.total_batch
    if batch % workers:
        raise UserError(
            f"diffusion.total_batch is {batch}; it must be a multiple of resources.num_workers ({workers}): "
            f"set --diffusion.total-batch {batch // workers * workers + workers}"
        )
    if config.final.total_kimg < config.granularity.total_kimg:
        raise UserError(
            f"final.total_kimg is {config.final.total_kimg}; it must be at least granularity.total_kimg "
            f"({config.granularity.total_kimg})"
        )
    _check_grouping(config)
    granularity = config.granularity
    for name, value, way in (("rule", granularity.rule, "fitted"), ("sampler", granularity.sampler, "gp")):
        if config.space and value == way:
            raise UserError(
                f"granularity.{name} is {way}, which searches over C alone, and the search space holds "
                f"{', '.join(config.space)}; leave it out, or take the space out of the file"
            )
    if granularity.multi_objective and len(config.score.detectors) < 2:
        raise UserError(
            f"granularity.multi_objective is given, but {config.score.detector} is the only score; name others with "
            "--score.also, or take --metric fid"
        )
    for path, domain in config.space.items():
        _check_domain(config, path, domain)
    return config


def _check_grouping(config: SearchConfig) -> None:
    """Refuse a grouping that lacks what it is made from, or whose C cannot be bounded."""
    if config.grouping == "kmeans" and config.bound.c_max is None:
        raise UserError(KMEANS_HAS_NO_BOUND)
    if (config.grouping == "file") != (config.assignments is not None):
        raise UserError(
            f"grouping is {config.grouping} and assignments is {config.assignments}; grouping file and a file "
            "belong together: --grouping file --assignments FILE"
        )
    if config.space and config.grouping not in SEARCHED:
        raise UserError(f"space is given, but nothing is searched over for grouping {config.grouping}; leave it out")
    if config.bound.lower and config.grouping != "temi":
        raise UserError(f"bound.lower is given, but it is TEMI's and grouping is {config.grouping}; leave it out")
    if config.bound.c_max is not None and config.grouping not in SEARCHED:
        raise UserError(
            f"bound.c_max is given, but C is not searched over for grouping {config.grouping}; leave it out"
        )


def _check_domain(config: SearchConfig, path: str, domain: Choice | Range) -> None:
    """Refuse a domain whose path names no setting or whose values that setting does not take."""
    node: Any = config.model_dump()
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            raise UserError(f"space.{path} names no setting{_did_you_mean(part, node)}")
        node = node[part]
    if isinstance(domain, Range) and not domain.low <= domain.high:
        raise UserError(f"space.{path}: low is {domain.low:g}; it must be at most high ({domain.high:g})")
    if isinstance(domain, Range) and domain.kind.startswith("log") and domain.low <= 0:
        raise UserError(f"space.{path}: low is {domain.low:g}; on a logarithmic scale it must be above 0")
    if isinstance(domain, Range) and domain.kind.endswith("randint") and (domain.low % 1 or domain.high % 1):
        raise UserError(
            f"space.{path}: {domain.low:g} to {domain.high:g} are no whole numbers; take uniform, or round them"
        )
    for value in domain.values if isinstance(domain, Choice) else domain.ends():
        _validated(config.tree_with({path: value}), f"space.{path}")


def _did_you_mean(word: str, known: object) -> str:
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(known, dict) else []
    return f"; did you mean {close[0]}?" if close else ""


def space_file(dataset: str) -> Path:
    """The search-space file of a dataset: its own for a named one, folder.yaml for a folder of images.

    In a checkout search_spaces/ stands beside the package, in an installed wheel inside it.
    """
    beside = _PACKAGE_DIR.parent / "search_spaces"
    folder = beside if beside.is_dir() else _PACKAGE_DIR / "search_spaces"
    named = folder / f"{dataset}.yaml"
    return named if dataset in KNOWN_DATASETS and named.is_file() else folder / "folder.yaml"


def read_space_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, read with the safe loader.

    Raises:
        UserError: If the file is missing, is not YAML, or holds something else than a map.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"search space {path} cannot be read ({reason}); give the path of a YAML file") from error
    except RecursionError:
        raise UserError(f"search space {path} is not plain YAML: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits, or no UTF-8
        raise UserError(f"search space {path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"search space {path} holds no settings; it must be a map such as 'temi: {{num_heads: 50}}'")
    return tree


def _validated(tree: Mapping[str, Any], origin: str) -> SearchConfig:
    try:
        return SearchConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    """The first finding of pydantic in one line, with the dotted path of the setting."""
    first = error.errors()[0]
    *sections, leaf = [str(part) for part in first["loc"]] or [""]
    path = ".".join([*sections, leaf])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        node: Any = SearchConfig().model_dump()
        for section in sections:
            node = node.get(section, {})
        return f"{path} is not a setting{_did_you_mean(leaf, node)}"
    if first["type"] == "value_error":
        return f"{path}: {first['ctx']['error']}" if path else str(first["ctx"]["error"])
    return f"{path} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _flag(argv: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, the last one given."""
    value = None
    for here, after in itertools.zip_longest(argv, argv[1:]):
        if here == name:
            value = after
        elif here.startswith(f"{name}="):
            value = here.removeprefix(f"{name}=")
    return value


def load(argv: Sequence[str]) -> SearchConfig:
    """The settings of one search: the dataset's search-space file with the flags on top.

    Args:
        argv: Flags of the command line, without the program's name.

    Raises:
        UserError: If a flag, a key or a value is wrong; the message is one line.
        SystemExit: With status 0 after ``--help``.
    """
    dataset = _flag(argv, "--dataset")
    chosen = _flag(argv, "--search-space")
    path = Path(chosen) if chosen else space_file(dataset or "digits")
    tree = read_space_file(path)
    if dataset is not None:
        tree = {**tree, "dataset": dataset}
    default = _validated(tree, str(path))
    config = parse_flags(SearchConfig, argv, prog="python -m cedm_ray.search", default=default)
    folder = storage_folder(config.storage_path, config.storage_copies)
    return _consistent(_with_metric(config.model_copy(update={"storage_path": folder})))


def _with_metric(config: SearchConfig) -> SearchConfig:
    """``metric`` as the detectors that it stands for: FID's and FDD's, the one to minimise first."""
    if config.metric is None:
        return config
    names: tuple[DetectorName, ...] = ("inception", "dinov2") if config.metric == "fid" else ("dinov2", "inception")
    also = (*names[1:], *(name for name in config.score.detectors if name not in names and name in config.score.also))
    return config.with_values({"score.detector": names[0], "score.also": also})


def parse_flags(kind: type[Settings], argv: Sequence[str], *, prog: str, default: Settings | None = None) -> Settings:
    """The settings that the flags of a command give.

    Args:
        kind: Class of the settings.
        argv: Flags, without the program's name.
        prog: How the command is called.
        default: Settings to start from (None: the class' own defaults).

    Raises:
        UserError: If a flag is unknown or a value does not fit; the message is one line.
        SystemExit: With status 0 after ``--help``.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind, prog=prog, args=list(argv), default=default if default is not None else tyro.MISSING_NONPROP
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        more = ALL_FLAGS if kind is SearchConfig else "--help lists every flag"
        raise UserError(_unboxed(complaint.getvalue(), more)) from stop


def _unboxed(text: str, more: str) -> str:
    """What tyro says in a box of several lines, as one line."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in text.splitlines()]
    said = []
    for number, line in enumerate(lines):
        if number and not line:  # the rule under the message; what follows repeats the help text
            break
        said.append(line)
    message = " ".join(" ".join(said[1:] or said).split())
    return f"{message.removeprefix('Error parsing ')} ({more})"


def fingerprint_tree(config: SearchConfig) -> dict[str, Any]:
    """What of the settings decides the result, as plain JSON values.

    Where things are stored, and how many processes embed or cluster, is left out; the number of training workers
    stays, because each worker draws its own noise. Files are left out too: what they hold counts, not their place.
    Of the computation only precisions stay that are asked for: the rest changes rounding alone.
    """
    tree = config.model_dump(mode="json")
    places = ("storage_path", "storage_copies", "tracking_uri", "data_dir", "search_space")
    files = ("backbone_weights", "detector_weights", "dinov2_weights", "assignments")
    for name in (*places, *files, "embed", "resources", "dry_run", "metric"):
        tree.pop(name)
    tree["budget"].pop("images_per_s")
    for name in ("weights", "class_names"):
        tree["clip"].pop(name)
    tree["granularity"].pop("max_concurrent")
    tree["score"].pop("batch_size")
    tree["compute"] = config.compute.asked_precisions()
    return {**tree, "num_workers": config.resources.num_workers}
