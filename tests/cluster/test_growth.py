import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages.cluster.autoscaling import possible_nodes
from cedm_ray.stages.cluster.shares import shares

REPOSITORY = Path(__file__).parents[2]
HEAD = {"Alive": True, "Resources": {"node:__internal_head__": 1.0, "memory": 1e9}}
WORKER = {"Alive": True, "Resources": {"CPU": 48.0, "GPU": 4.0}}
FOUR_GPUS = ResourceSettings(num_workers=4, cpus_per_worker=8)


def cluster_file(name: str, folder: Path, **of_worker: Any) -> Path:
    """What ray up leaves the head."""
    config = prepare_config(yaml.safe_load((REPOSITORY / name).read_text()))
    config["available_node_types"].get("gpu_worker", {}).update({"resources": {"CPU": 48, "GPU": 4}, **of_worker})
    file = folder / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(config))
    return file


def test_a_search_is_planned_by_the_workers_that_can_come(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the largest has 0 CPU and 0 GPU"):
        shares(FOUR_GPUS, [HEAD])
    planned = shares(FOUR_GPUS, possible_nodes([HEAD], cluster_file("cluster.yaml", tmp_path)))
    assert (planned.gpus_per_worker, planned.gpus_per_probe, planned.max_trials, planned.max_probes) == (1, 1, 4, 16)


def test_workers_that_have_come_count_once(tmp_path: Path) -> None:
    file = cluster_file("cluster.yaml", tmp_path)
    dead = {**WORKER, "Alive": False}
    assert possible_nodes([HEAD, WORKER, dead], file) == possible_nodes([HEAD], file) == [HEAD, *[WORKER] * 4]


def test_the_bound_of_all_workers_holds_too(tmp_path: Path) -> None:
    assert len(possible_nodes([HEAD], cluster_file("cluster.yaml", tmp_path, max_workers=9))) == 1 + 4


def test_machines_that_are_given_are_those_that_there_are(tmp_path: Path) -> None:
    file = cluster_file("cluster-local.yaml", tmp_path)
    assert possible_nodes([HEAD, WORKER, {**WORKER, "Alive": False}], file) == [HEAD, WORKER]


def test_without_such_a_file_the_nodes_are_those_that_there_are(tmp_path: Path) -> None:
    assert possible_nodes([HEAD, WORKER], tmp_path / "none.yaml") == [HEAD, WORKER]
