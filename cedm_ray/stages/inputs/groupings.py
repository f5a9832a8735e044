"""Groupings given from outside: labels, superclasses, a file's assignments, CLIP's pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from cedm_ray.clustering.assignments_file import read_assignments
from cedm_ray.clustering.clustering_io import CLUSTERING_FILE
from cedm_ray.clustering.labels import from_labels
from cedm_ray.clustering.types import Clustering
from cedm_ray.clustering.zero_shot import zero_shot_assignments
from cedm_ray.features.backbones import BackboneSpec, check_backbone
from cedm_ray.features.zero_shot_text import PROMPTS, class_text_features
from cedm_ray.stages.context import Context
from cedm_ray.stages.inputs.clusterings import keep
from cedm_ray.stages.inputs.embed import embed
from cedm_ray.stages.inputs.preflight import clip_class_names
from cedm_ray.stages.storage.paths import absolute
from cedm_ray.weights.listing import file_sha256


@dataclass(frozen=True)
class GivenGrouping:
    """A grouping whose number of clusters is not searched over, in the store."""

    num_clusters: int
    file: Path
    inputs: dict[str, Any]


def given_groupings(ctx: Context) -> dict[str, GivenGrouping]:
    """The groupings of this search that no clustering of the embeddings makes: its own one, and labels to compare with.

    Raises:
        UserError: If what a grouping is made from is missing or does not fit the images.
    """
    packed, found = ctx.packed, {}
    labels, num_classes, superclasses = packed.class_labels, packed.num_classes, packed.superclasses()
    if labels is not None and num_classes is not None:
        found["labels"] = _given(ctx, {"labels": num_classes}, partial(from_labels, labels, num_classes))
    if superclasses is not None:
        found["superclasses"] = _given(ctx, {"superclasses": superclasses[1]}, partial(from_labels, *superclasses))
    kind = ctx.config.grouping
    if kind == "file" and ctx.config.assignments is not None:
        file = ctx.config.assignments.expanduser()
        read = partial(read_assignments, file, num_images=len(packed))
        found["file"] = _given(ctx, {"file": file_sha256(file)}, read)
    if kind == "clip":
        found["clip"] = _clip(ctx)
    return found


def _given(ctx: Context, what: dict[str, Any], make: Callable[[], Clustering]) -> GivenGrouping:
    """A grouping in the store, which is made where the store does not have it.

    Args:
        ctx: The search.
        what: What tells it from other groupings of the same images.
        make: Makes it.
    """
    inputs = {"images": ctx.packed.facts.pixels_sha256, **what}
    path = ctx.store.path("clusterings", inputs)
    facts = ctx.store.facts(path)
    if facts is None:
        facts = keep(make(), path, inputs, ctx.store, ctx.packed)
    return GivenGrouping(int(facts["num_clusters"]), path / CLUSTERING_FILE, inputs)


def _clip(ctx: Context) -> GivenGrouping:
    """Each image's most similar class name, by an OpenCLIP model, as its pseudo-label."""
    settings = ctx.config.clip
    weights = absolute(settings.weights)
    weights_hash = check_backbone(settings.model, weights)
    names = clip_class_names(ctx.config, ctx.packed.class_names())
    images = embed(ctx, BackboneSpec(settings.model, weights, None), weights_hash)

    def make() -> Clustering:
        task = ray.remote(class_text_features).options(num_cpus=ctx.shares.cpus_per_probe)
        texts = ray.get(task.remote(settings.model, weights, names, device="cpu"))
        return zero_shot_assignments(images.values, texts)

    return _given(ctx, {"clip": {**images.inputs, "class_names": list(names), "prompts": list(PROMPTS)}}, make)
