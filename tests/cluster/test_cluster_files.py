"""The two cluster files against Ray's own schema, the shell's grammar, and what they promise."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster-local.yaml")
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text()


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text_of(name))  # type: ignore[no-any-return]


def commands(name: str, *groups: str) -> list[str]:
    config = load(name)
    return [command for group in groups or COMMANDS for command in config[group]]


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_file_passes_rays_own_schema(name: str) -> None:
    validate_config(prepare_config(load(name)))


def test_every_command_is_grammatical(name: str) -> None:
    for command in commands(name):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def test_what_has_to_be_edited_stands_at_the_top_and_nowhere_else(name: str) -> None:
    top, rest = text_of(name).split("\ncluster_name:")
    assert "EDIT_" in top and "EDIT_" not in rest
    edited = {word for value in load(name)["metadata"].values() for word in re.findall("EDIT_[A-Z_]+", str(value))}
    assert edited == set(re.findall("EDIT_[A-Z_]+", top))


def test_nothing_of_ours_listens_outside(name: str) -> None:
    (head,) = (command for command in commands(name, "head_start_ray_commands") if "--head" in command)
    (server,) = (command for command in commands(name, "head_start_ray_commands") if "mlflow server" in command)
    assert "--dashboard-host=127.0.0.1 " in head and "mlflow server --host 127.0.0.1 " in server
    assert "0.0.0.0" not in text_of(name)


def test_every_start_of_ray_asks_for_the_token_which_only_its_owner_reads(name: str) -> None:
    starts = [command for command in commands(name) if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token " in start for start in starts)
    assert load(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert commands(name)[0] == "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token"


def test_the_head_trains_nothing(name: str) -> None:
    (head,) = (command for command in commands(name) if "--head" in command)
    assert "--num-cpus=0 " in head


def test_gpu_workers_come_from_the_spot_market_when_they_are_needed_and_the_head_does_not() -> None:
    types = load("cluster.yaml")["available_node_types"]
    assert load("cluster.yaml")["head_node_type"] == "head" and types.keys() == {"head", "gpu_worker"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"] and types["head"]["resources"] == {"CPU": 0}
    worker = types["gpu_worker"]
    assert worker["min_workers"] == 0 < worker["max_workers"] == load("cluster.yaml")["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_what_is_installed_are_the_versions_of_the_constraints(name: str) -> None:
    (install,) = (command for command in commands(name) if "pip install" in command)
    assert "--constraint ~/cedm_ray/constraints.txt" in install and "==" not in install
    lines = (line.split("#")[0].strip() for line in (REPOSITORY / "constraints.txt").read_text().splitlines())
    pinned = {canonical(pin.name): pin.specifier for pin in map(Requirement, filter(None, lines))}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"]]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            (exact,) = pinned[canonical(requirement.name)]
            assert exact.operator == "==" and requirement.specifier.contains(exact.version), requirement
    assert str(pinned["ray"]) == f"=={version('ray')}" and "boto3" in pinned


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_all_that_the_project_is_built_from_is_copied_and_nothing_large(name: str) -> None:
    mounts = load(name)["file_mounts"]
    copied = {local: remote for remote, local in mounts.items() if remote.startswith("~/cedm_ray/")}
    assert all((REPOSITORY / local).exists() and remote == f"~/cedm_ray/{local}" for local, remote in copied.items())
    tree = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    wheel = tree["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [tree["project"]["readme"], *tree["project"]["license-files"], *wheel["packages"], *wheel["force-include"]]
    assert copied.keys() == {"pyproject.toml", "constraints.txt", *needed}
    files = [file for local in copied for file in [REPOSITORY / local, *(REPOSITORY / local).rglob("*")]]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 20 * 2**20  # Ray reads them all at every up


def test_the_two_files_differ_in_where_the_machines_come_from_alone() -> None:
    aws, local = map(load, FILES)
    assert aws["file_mounts"] == local["file_mounts"]
    assert aws["worker_start_ray_commands"] == local["worker_start_ray_commands"]
    own_autoscaler = "RAY_enable_autoscaler_v2=0 "
    starts = [config["head_start_ray_commands"][1] for config in (aws, local)]
    assert own_autoscaler in starts[1] and starts[0] == starts[1].replace(own_autoscaler, "")
