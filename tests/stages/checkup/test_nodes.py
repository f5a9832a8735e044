"""What nodes say: the parts without Ray, and a cluster of two nodes on this machine."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cedm_ray.config import load
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages.checkup import nodes as checkup_nodes
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.look import Needs, look, shared_finding
from cedm_ray.stages.checkup.nodes import LARGE_CHECKPOINT, cluster_findings, files_of, fit_findings


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert all((each.level == "ok") == (each.fix == "") and "\n" not in each.text for each in findings), findings
    return {each.name: each for each in findings}


def test_a_node_leaves_its_file_and_looks_at_its_machine_only_if_the_driver_is_elsewhere(tmp_path: Path) -> None:
    needs = Needs(tmp_path, (), 1000, token=True, session="none")
    here = by_name(look(needs, tmp_path / "node", False))
    assert (tmp_path / "node").is_file() and "versions" not in here and "ports" in here
    there = by_name(look(needs, tmp_path / "other", True))
    assert {"versions", "shared memory", "open files", "local disk", "ports"} <= set(there)


def test_a_node_that_lacks_the_folder_or_a_weight_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "here.pt").touch()
    files = (("--backbone-weights", tmp_path / "here.pt"), ("--detector-weights", tmp_path / "not.pt"))
    found = by_name(
        look(Needs(tmp_path, files, 0, token=True, session="none"), tmp_path / "runs" / "scratch" / "node", False)
    )
    assert found["shared storage"].level == found["weight files"].level == "fail"
    assert found["shared storage"].text == f"{tmp_path}/runs cannot be written (No such file or directory)"
    assert found["weight files"].text == f"--detector-weights {tmp_path}/not.pt cannot be read here"


def test_a_folder_that_is_another_one_on_the_node_is_told(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "scratch" / "node"
    assert shared_finding(file).level == "fail" and "not seen by the driver" in shared_finding(file).text
    file.parent.mkdir(parents=True)
    file.touch()
    assert shared_finding(file).level == "ok"


def test_the_files_that_nodes_read_are_absolute() -> None:
    config = load(["--backbone-weights", "some.pt", "--dinov2-weights", "/other.pt"])
    assert files_of(config) == (
        ("--backbone-weights", Path.cwd() / "some.pt"), ("--dinov2-weights", Path("/other.pt"))
    )  # fmt: skip


def node(cpus: float, gpus: float = 0) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


def test_whether_a_trial_ever_fits() -> None:
    found = by_name(fit_findings(ResourceSettings(num_workers=2), [node(4), node(4)], 1000))
    assert found["GPUs"].level == found["one trial"].level == "ok"
    assert found["one trial"].text == "a training takes 2 x 1 CPU and 0 GPU; 4 fit at once, and 4 clusterings"
    found = by_name(fit_findings(ResourceSettings(num_workers=9), [node(4), node(4)], 1000))
    assert found["one trial"].level == "fail" and "the cluster holds 8 of them" in found["one trial"].text
    assert "--resources.num-workers" in found["one trial"].fix


def test_a_large_network_without_gpus_is_to_be_thought_of() -> None:
    (gpus, _) = fit_findings(ResourceSettings(), [node(4)], LARGE_CHECKPOINT + 1)
    assert gpus.level == "warn" and "very slow" in gpus.text
    assert "GPUs" not in by_name(fit_findings(ResourceSettings(), [node(4, 1)], LARGE_CHECKPOINT + 1))


@pytest.fixture
def two_nodes() -> Iterator[None]:
    cluster = Cluster()
    try:
        for cpus in (1, 2):
            cluster.add_node(num_cpus=cpus)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.ray
def test_every_node_of_a_cluster_is_looked_at(two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tmp_path / "runs"
    flags = ["--storage-path", str(storage), "--detector-weights", str(tmp_path / "not.pt")]
    found = cluster_findings(load([*flags, "--resources.num-workers", "4"]), 1000)
    names = [each.name for each in found]
    assert names.count("weight files") == 2 and {each.level for each in found if each.name == "weight files"} == {
        "fail"
    }
    assert names.count("shared storage") == 1 and "(as on 1 more)" in by_name(found)["shared storage"].text
    assert names.count("open files") == 1  # of the node that is not the driver's
    assert by_name(found)["one trial"].level == "fail" and not storage.exists()
    # A node whose task sees another folder: what the driver looks for is not there.
    monkeypatch.setattr(checkup_nodes, "shared_finding", lambda file: shared_finding(_unseen(file)))
    found = cluster_findings(load(flags[:2]), 1000)
    assert by_name(found)["one trial"].level == "ok"
    assert [each.level for each in found if each.name == "shared storage"] == ["fail", "fail"]


def _unseen(file: Path) -> Path:
    os.rename(file, file.with_name(f"{file.name}-elsewhere"))
    return file


@pytest.mark.ray
def test_a_task_that_fails_or_does_not_answer_is_the_failure_of_its_node(
    two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Finding]:
        raise ModuleNotFoundError("No module named 'cedm_ray'")

    config = load(["--storage-path", str(tmp_path)])
    monkeypatch.setattr(checkup_nodes, "look", broken)
    found = [each for each in cluster_findings(config, 1000) if each.name == "node"]
    assert len(found) == 2 and "(ModuleNotFoundError: No module named 'cedm_ray')" in found[0].text
    monkeypatch.setattr(checkup_nodes, "look", lambda *_: time.sleep(60))
    monkeypatch.setattr(checkup_nodes, "NODE_TIMEOUT_S", 0.5)
    found = [each for each in cluster_findings(config, 1000) if each.name == "node"]
    assert len(found) == 2 and "did not answer within 0.5 s" in found[1].text


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "surely.invalid:6379"])
def test_a_cluster_that_is_not_there_is_told_before_ray_waits_for_it(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is asked"))
    (finding,) = cluster_findings(load(["--storage-path", str(tmp_path)]), 1000)
    assert finding.level == "fail" and finding.text.startswith(f"the cluster at {address} does not answer (")
    assert "RAY_ADDRESS" in finding.fix


def test_a_ray_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refused(**_: object) -> None:
        raise Exception("The current node timed out during startup\nmore of it")

    monkeypatch.setattr(ray, "init", refused)
    (finding,) = cluster_findings(load(["--storage-path", str(tmp_path)]), 1000)
    assert finding.text == "Ray does not start on this machine (The current node timed out during startup)"
    assert finding.level == "fail" and finding.fix
