"""The short help of python -m cedm_ray.search: the flags that most searches need, with defaults and units.

It is written here and not made from the settings, so that it is there at once; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap

WIDTH, INDENT = 96, 38


@dataclass(frozen=True)
class Flag:
    """A flag in the short help."""

    name: str
    value: str
    """What is given, with its unit; empty for a switch."""
    text: str
    default: str = ""


GROUPS: dict[str, tuple[Flag, ...]] = {
    "images": (
        Flag("--dataset", "NAME|PATH", "digits, cifar10, cifar100, ffhq64, afhq64, or your own images", "digits"),
        Flag("--resolution", "PIXELS", "side of the images; a folder needs it"),
        Flag("--max-images", "N", "use only the first so many, for trying things out", "all"),
    ),
    "models": (
        Flag("--backbone", "NAME", "turns images into embeddings", "vit_base_patch16_224.dino"),
        Flag("--backbone-weights", "FILE", "its weights", "downloaded"),
        Flag("--detector-weights", "FILE", "weights of FID's Inception-v3", "downloaded"),
        Flag("--dinov2-weights", "FILE", "weights of FDD's DINOv2", "downloaded"),
    ),
    "what is searched": (
        Flag("--grouping", "NAME", "temi, kmeans; or not over C: labels, clip, none, file, ...", "temi"),
        Flag("--metric", "fid|fdd", "score to minimise", "the dataset's own"),
        Flag("--bound.c-max", "C", "take this upper bound instead of finding one"),
        Flag("--confirm", "N", "retrain what ties with the best so many times", "0"),
    ),
    "budget": (
        Flag("--budget.mimg", "MILLIONS", "images seen in training, in all"),
        Flag("--budget.gpu-hours", "HOURS", "hours of training and scoring, times the workers"),
        Flag("--budget.wall-hours", "HOURS", "hours from the start of the search"),
        Flag("--granularity.share", "SHARE", "where none of them is given: share of the full grid over C", "0.25"),
        Flag("--granularity.total-kimg", "KIMG", "training of each C, thousands of images seen", "100000"),
        Flag("--final.total-kimg", "KIMG", "training of the best C", "200000"),
    ),
    "machines": (
        Flag("--resources.num-workers", "N", "processes of one training", "2"),
        Flag("--resources.gpus-per-worker", "GPUS", "of each of them", "1 where there are GPUs"),
        Flag("--resources.cpus-per-worker", "CPUS", "of each of them", "1.0"),
        Flag("--granularity.max-concurrent", "N", "trainings at once", "what the cluster holds"),
    ),
    "where": (
        Flag("--storage-path", "FOLDER", "everything that is made: one that all nodes share, or s3://...", "runs"),
        Flag("--tracking-uri", "URI", "MLflow server", "a database in the storage folder"),
        Flag("--search-space", "FILE", "YAML with settings to start from", "search_spaces/DATASET.yaml"),
        Flag("--seed", "N", "of everything random", "0"),
    ),
    "this command": (
        Flag("--dry-run", "", "print the plan and what it will take, start nothing"),
        Flag("--list-runs", "", "print the runs in the storage folder"),
        Flag("--plain", "", "lines instead of a live view, as where there is no terminal"),
        Flag("--json", "", "one JSON object a line (docs/terminal.md)"),
        Flag("--help-all", "", "all settings, with the defaults of the given --dataset"),
    ),
}
EXAMPLES = """examples:
  python -m cedm_ray.search --dataset digits
  python -m cedm_ray.search --dataset /path/to/images --resolution 64 --budget.gpu-hours 48 --dry-run
  python -m cedm_ray.search --dataset cifar10 --storage-path /mnt/shared/runs --confirm 2
"""


def short_help() -> str:
    """What ``--help`` prints."""
    lines = [
        "usage: python -m cedm_ray.search [FLAGS]",
        "",
        "Find the number of clusters C on which a conditional diffusion model of your images does best.",
        "The same command again goes on with a search that was interrupted. Defaults are in parentheses;",
        "a dataset's search-space file may have others.",
        "",
    ]
    for group, flags in GROUPS.items():
        lines.append(f"{group}:")
        for flag in flags:
            text = f"{flag.text} ({flag.default})" if flag.default else flag.text
            first, *rest = wrap(text, WIDTH - INDENT)
            lines.append(f"  {f'{flag.name} {flag.value}':<{INDENT - 4}}  {first}")
            lines += [" " * INDENT + more for more in rest]
    return "\n".join(lines) + "\n\n" + EXAMPLES
