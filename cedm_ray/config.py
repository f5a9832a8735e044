"""One frozen, typed tree of settings: read from a search-space file, overridden by flags, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.consistency import check_consistency
from cedm_ray.data.registry import KNOWN_DATASETS
from cedm_ray.data.storage import DEFAULT_COPIES_FOLDER, storage_folder
from cedm_ray.diffusion.compute import ComputeSettings
from cedm_ray.domains import Domain
from cedm_ray.errors import UserError, did_you_mean, one_line
from cedm_ray.flags import flag_value, parse_flags
from cedm_ray.settings import (
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

PROGRAM = "python -m cedm_ray.search"
_PACKAGE_DIR = Path(__file__).resolve().parent


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
    storage_copies: Path = DEFAULT_COPIES_FOLDER
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

    def with_values(self, values: Mapping[str, Any], *, origin: str = "search space") -> SearchConfig:
        """The same settings with others at the given dotted paths, checked again.

        Args:
            values: The other values, by their paths, for example ``diffusion.dropout``.
            origin: Where they come from; begins an error's message.

        Raises:
            UserError: If a value is out of its range.
        """
        tree = self.model_dump()
        for path, value in values.items():
            *sections, leaf = path.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[leaf] = value
        return _validated(tree, origin)


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
        raise UserError(f"search space {path} is not plain YAML: {one_line(error)}") from error
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
        return f"{path} is not a setting{did_you_mean(leaf, node)}"
    if first["type"] == "value_error":
        return f"{path}: {first['ctx']['error']}" if path else str(first["ctx"]["error"])
    return f"{path} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"


def load(argv: Sequence[str]) -> SearchConfig:
    """The settings of one search: the dataset's search-space file with the flags on top.

    Args:
        argv: Flags of the command line, without the program's name.

    Raises:
        UserError: If a flag, a key or a value is wrong; the message is one line.
        SystemExit: With status 0 after ``--help``.
    """
    dataset = flag_value(argv, "--dataset")
    chosen = flag_value(argv, "--search-space")
    path = Path(chosen) if chosen else space_file(dataset or "digits")
    tree = read_space_file(path)
    if dataset is not None:
        tree = {**tree, "dataset": dataset}
    default = _validated(tree, str(path))
    all_flags = f"{PROGRAM} --help-all lists every flag"
    config = parse_flags(SearchConfig, argv, prog=PROGRAM, default=default, more=all_flags)
    folder = storage_folder(config.storage_path, config.storage_copies)
    config = _with_metric(config.model_copy(update={"storage_path": folder}))
    check_consistency(config)
    return config


def _with_metric(config: SearchConfig) -> SearchConfig:
    """``metric`` as the detectors that it stands for: FID's and FDD's, the one to minimise first."""
    if config.metric is None:
        return config
    names: tuple[DetectorName, ...] = ("inception", "dinov2") if config.metric == "fid" else ("dinov2", "inception")
    also = (*names[1:], *(name for name in config.score.also if name not in names))
    return config.with_values({"score.detector": names[0], "score.also": also})


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
