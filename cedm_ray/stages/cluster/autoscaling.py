"""The nodes that a cluster can have, where it starts them itself when work waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")
"""Where ``ray up`` leaves the head the file by which it starts nodes."""


def possible_nodes(nodes: Iterable[Mapping[str, Any]], cluster_file: Path = CLUSTER_FILE) -> list[Mapping[str, Any]]:
    """The nodes by which a search is planned: those that are there, or all that the cluster can start.

    A cluster whose workers come when work waits has none when a search begins.

    Args:
        nodes: The nodes that are there, as ``ray.nodes()`` lists them.
        cluster_file: The cluster's file on the head; where it is missing, or does not say what its nodes hold (those
            of given machines), nothing can be started.

    Returns:
        Nodes with ``Alive`` and ``Resources``.
    """
    there = [node for node in nodes if node["Alive"]]
    path = cluster_file.expanduser()
    if not path.is_file():
        return there
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    startable = [
        {"Alive": True, "Resources": dict(kind["resources"])}
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"] and kind["resources"]
        for _ in range(kind["max_workers"])
    ]
    if not startable:
        return there
    heads = [node for node in there if "node:__internal_head__" in node["Resources"]]
    return [*heads, *startable[: cluster["max_workers"]]]
