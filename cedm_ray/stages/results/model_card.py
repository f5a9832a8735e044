"""The README of an exported model, made of the facts in its model.json and of nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cedm_ray.settings import SEARCHED

FILES = {
    "model.safetensors": "the averaged weights (EMA), float32",
    "model.json": "how the network is built, what it was trained on, its scores: all figures of this page",
    "clustering.safetensors": "the cluster of each training image and q(c), the share of the images in each cluster",
    "head.safetensors": "the TEMI head behind the clusters: from embeddings to cluster probabilities",
    "pixels.safetensors": "mean and standard deviation of the pixels: they turn an image into its embedding",
    "samples.png": "samples: the first images of the seed",
}


def model_card(model: Mapping[str, Any], files: Collection[str]) -> str:
    """Markdown that says what a model is, what it scored, and how it is used.

    Args:
        model: The contents of ``model.json``.
        files: Names of the files beside it.
    """
    parts = [
        f"# {_title(model)}",
        "A diffusion model of images (EDM, [arXiv 2206.00364](https://arxiv.org/abs/2206.00364)), trained by cedm_ray "
        f"{_conditioning(model)}",
        _table(_facts(model)),
        "## Scores",
        _scores(model),
        "## Use",
        "In this folder, with cedm_ray installed:",
        "```sh\npython -m cedm_ray.sample --run . --num 64 --seed 0\n```",
        "Image i depends on the seed and i alone. `--cluster C` keeps to one cluster, `--out FOLDER` writes single "
        "files, `--help` lists the rest. In Python:",
        f"```python\n{_program(model)}```",
        "## Files",
        _table(_files(files)),
        "## Licence",
        f"The weights were trained on the images of {model['dataset']}. The terms on which these images may be "
        "used hold for the weights too; this page grants nothing beyond them.",
    ]
    return "\n\n".join(parts) + "\n"


def _title(model: Mapping[str, Any]) -> str:
    if model["grouping"] == "none":
        return f"{model['dataset']}, unconditional"
    return f"{model['dataset']} in {model['num_clusters']} {'visual groups' if _searched(model) else 'groups'}"


def _searched(model: Mapping[str, Any]) -> bool:
    return model["grouping"] in SEARCHED


def _conditioning(model: Mapping[str, Any]) -> str:
    if model["grouping"] == "none":
        return "without a condition."
    what = f"with the {model['num_clusters']} groups of `{model['grouping']}` as its condition"
    if not _searched(model):
        return f"{what}."
    return (
        f"{what}: C_V = {model['num_clusters']}, the number of clusters that scored best in a search "
        "([arXiv 2403.00570](https://arxiv.org/abs/2403.00570))."
    )


def _facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    side, trained = model["img_resolution"], model["diffusion"]
    rows = [
        ("images", f"{model['dataset']}: {model['num_images']:,} of {side} x {side} pixels, {_channels(model)}"),
        ("SHA-256 of their pixels", f"`{model['images_sha256']}`"),
    ]
    if "num_used" in model:
        rows.append(("clusters in use", f"{model['num_used']} of {model['num_clusters']}; q(c) is "
                     f"{model['kl_from_uniform']:.3g} nats from uniform"))  # fmt: skip
    tie = model.get("tie_set") or {}
    if {"clusters", "margin"} <= set(tie):
        rows.append(("tie set", f"C = {', '.join(map(str, tie['clusters']))}: scores within {tie['margin']:.1%} of the "
                     "lowest, which one training each cannot tell apart"))  # fmt: skip
    if model["embedding"] is not None:
        made = model["embedding"]
        known = "" if made["weights"] == made["backbone"] else f", weights SHA-256 `{made['weights']}`"
        rows.append(("embeddings", f"`{made['backbone']}` in {made['dtype']}{known}"))
    rows += [
        ("network", f"{model['num_parameters']:,} parameters: {trained['model_channels']} channels, multipliers "
         f"{'-'.join(map(str, trained['channel_mult']))}, blocks per level {trained['num_blocks']}, "
         f"dropout {trained['dropout']:g}"),
        ("training", f"{model['nimg'] / 1000:,.6g} kimg in batches of {trained['total_batch']}, learning rate "
         f"{trained['lr']:g}, EMA half-life {trained['ema_halflife_kimg']:,g} kimg, augmentation "
         f"{trained['augment_prob']:g}, label dropout {trained['label_dropout']:g}"),
        ("sampler", f"Heun, {model['num_steps']} steps ({2 * model['num_steps'] - 1} network evaluations); conditions "
         f"drawn {'uniformly from the clusters in use' if model['conditions'] == 'uniform' else 'from q(c)'}"),
        ("seed", str(model["seed"])),
        ("versions", ", ".join(f"{name} {number}" for name, number in model["versions"].items())),
    ]  # fmt: skip
    return rows


def _channels(model: Mapping[str, Any]) -> str:
    return "grey" if model["img_channels"] == 1 else "RGB"


def _scores(model: Mapping[str, Any]) -> str:
    scores = model.get("score", {}).get("scores", ())
    if not scores:
        return "None were taken."
    terms = ("detector", "weights", "resize", "dtype")
    detectors = {(each["detector"], f"`{each['weights_hash']}`", each["resize"], each["dtype"]) for each in scores}
    rows = [
        (
            each["metric"], f"{each['value']:.6g}", "" if each["std"] is None else f"{each['std']:.2g}",
            str(each["num_sets"]), f"{each['num_images']:,}", f"{each['num_reference']:,}", each["detector"],
        )
        for each in scores
    ]  # fmt: skip
    said = (
        f"C was chosen for the lowest {model['metric']} of those tried: part of how low it is owes to that choice. "
        if _searched(model)
        else ""
    )
    return (
        f"{said}Images is the number of generated images in each set, real that of the training images; std is over "
        "sets, or over subsets where there is one set. Two values compare only where both numbers, the detector, its "
        "weights, its resize and its dtype agree.\n\n"
        f"{_table(rows, ('metric', 'value', 'std', 'sets', 'images', 'real', 'detector'))}\n\n"
        f"{_table(sorted(detectors), terms)}"
    )


def _program(model: Mapping[str, Any]) -> str:
    probs = {
        "uniform": '(torch.from_numpy(load_clustering(Path("clustering.safetensors")).cluster_probs) > 0).double()',
        "cluster_probs": 'torch.from_numpy(load_clustering(Path("clustering.safetensors")).cluster_probs)',
    }
    given = model["label_dim"] > 0
    shape = f"(16, {model['img_channels']}, {model['img_resolution']}, {model['img_resolution']})"
    return f"""from pathlib import Path
import torch
{"from cedm_ray.clustering.clustering_io import load_clustering" if given else ""}
from cedm_ray.diffusion.model_file import load_model
from cedm_ray.diffusion.sampler import generate

net = load_model(Path("."))
probs = {probs[model["conditions"]] if given else None}
given = dict(cluster_probs=probs, num_steps={model["num_steps"]}, batch_size=16, device="cpu")
images = torch.cat(list(generate(net, seed=0, indices=range(16), **given)))  # {shape}, uint8
""".replace("\n\nfrom", "\nfrom")


def _files(files: Collection[str]) -> list[tuple[str, str]]:
    references = {
        name: "mean and covariance of the real images' features, which scores are distances to"
        for name in sorted(files) if name.startswith("reference")
    }  # fmt: skip
    return [(f"`{name}`", text) for name, text in {**FILES, **references}.items() if name in files]


def _table(rows: Collection[tuple[str, ...]], head: tuple[str, ...] = ("", "")) -> str:
    ruled = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in ruled)
