"""cluster-local.yaml for real: ray up over SSH to a head and two workers, the digits search as a job, ray down.

The tests are one story in their order. Every process of Ray lives in the namespaces of a host (conftest.py): ray stop
and ray down end all that they see.
"""

import json
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

CLUSTER_FILE = Path(__file__).parents[2] / "cluster-local.yaml"
JOB, UNPLUGGED = "digits", "unplugged"
OVER = {"succeeded", "failed", "was stopped"}
SMALL = (
    "--temi.epochs=8 --temi.warmup-epochs=1 --bound.c-start=150 --bound.precision=2 --bound.low-heads=2 "
    "--bound.low-spread=0.6 --granularity.rule=fitted --granularity.num-trials=2 --granularity.share=0.2 "
    "--granularity.total-kimg=4 --granularity.grace-kimg=2 --granularity.startup-trials=2 --score.num-images=200 "
    "--score.num-steps=4 --score.num-sets=2 --final.total-kimg=5 --final.num-images=150 --final.num-sets=2"
)
LABELS = (
    "--grouping=labels --resources.num-workers=1 --granularity.total-kimg=60 --granularity.rungs 10 20 30 40 50 60 "
    "--score.num-images=200 --score.num-steps=4 --score.num-sets=1 --final.total-kimg=61 --final.num-images=150 "
    "--final.num-sets=1"
)
"""Two trainings, on the labels and on nothing, one on each worker."""
NODES = """
import json, ray
ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(json.dumps([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]))
"""
ACTORS = """
import json
from ray.util.state import list_actors, list_nodes
address = {node.node_id: node.node_ip for node in list_nodes(limit=100)}
actors = [actor for actor in list_actors(limit=5000) if actor.node_id]
print(json.dumps([(actor.class_name, address[actor.node_id], actor.state) for actor in actors]))
"""
ASK_FOR_JOBS = """
import os, urllib.error, urllib.request
token = open(os.path.expanduser("~/.ray/auth_token")).read().strip()
for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {token}"}):
    try:
        print(urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8265/api/jobs/", headers=headers)).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
LOGGED = """
from mlflow.tracking import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
runs = client.search_runs([client.get_experiment_by_name("cedm_ray/digits").experiment_id])
print(sum("mlflow.parentRunId" not in run.data.tags for run in runs), {run.info.status for run in runs})
"""
POINTS = """
from collections import Counter
from mlflow.tracking import MlflowClient
client = MlflowClient("http://127.0.0.1:5000")
runs = client.search_runs([client.get_experiment_by_name("cedm_ray/digits").experiment_id])
points = Counter(
    (run.info.run_id, metric, point.step)
    for run in runs
    for metric in run.data.metrics
    for point in client.get_metric_history(run.info.run_id, metric)
)
print(max(points.values()))
"""


@dataclass(frozen=True)
class Story:
    """What became of a search that lost a worker."""

    status: str
    log: str
    told_s: float
    """From the loss until the search told of it."""
    over_s: float


def python(host: Any, program: str) -> str:
    """What a program prints that is run on a host."""
    file = host.folder / "program.py"
    file.write_text(program)
    return str(host.run(f"python {file} 2> {file}.log || {{ cat {file}.log; false; }}").strip())


def wait_until(what: str, looks_right: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not looks_right():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        time.sleep(2)


@pytest.fixture(scope="module")
def cluster_file(hosts: Any) -> Path:
    """The file, filled in as a user does."""
    text = CLUSTER_FILE.read_text()
    for old, new in {
        "EDIT_HEAD_ADDRESS": hosts.head.address,
        "EDIT_WORKER_ADDRESS": ", ".join(worker.address for worker in hosts.workers),
        "EDIT_USER": "root",
        "EDIT_PRIVATE_KEY_FILE": str(hosts.key),
        "EDIT_SHARED_FOLDER": str(hosts.shared),
        # Every host sees all the processors and the memory of the machine that they are on.
        "--address=$RAY_HEAD_IP:6379": "--address=$RAY_HEAD_IP:6379 --num-cpus=2 --object-store-memory=500000000",
        "--num-cpus=0": "--num-cpus=0 --object-store-memory=500000000",
    }.items():
        assert old in text
        text = text.replace(old, new)
    file: Path = hosts.operator.folder / "cluster.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def up(hosts: Any, cluster_file: Path) -> Any:
    """The cluster that ray up made, with all its nodes."""
    hosts.operator.run("ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
    hosts.operator.run(f"ray up -y {cluster_file}")
    everybody = {host.address for host in (hosts.head, *hosts.workers)}
    wait_until("all nodes are there", lambda: set(json.loads(python(hosts.head, NODES))) == everybody, within_s=240)
    return hosts


@pytest.fixture(scope="module")
def searched(up: Any, cluster_file: Path) -> Any:
    """The cluster after the search, which was submitted as a job and left alone."""
    submit(up, cluster_file, JOB, SMALL)
    wait_until("the job is over", lambda: job_status(up, JOB) in OVER, within_s=1200)
    return up


@pytest.fixture(scope="module")
def unplugged(searched: Any, cluster_file: Path) -> Story:
    """A search that lost a worker from the network while something was trained there; it came back at the end."""
    lost, stays = searched.workers
    submit(searched, cluster_file, UNPLUGGED, LABELS)
    wait_until("trainings on both workers have come to a rung", lambda: len(rungs(searched)) == 2, within_s=300)
    assert {lost.address, stays.address} == training(searched)
    searched.unplug(lost)
    started_s = time.monotonic()
    try:
        wait_until("the loss is told", lambda: "a node was lost" in log(searched, UNPLUGGED), within_s=300)
        told_s = time.monotonic() - started_s
        wait_until("the job is over", lambda: job_status(searched, UNPLUGGED) in OVER, within_s=600)
    finally:
        searched.plug_in(lost)
    return Story(job_status(searched, UNPLUGGED), log(searched, UNPLUGGED), told_s, time.monotonic() - started_s)


def submit(hosts: Any, cluster_file: Path, job: str, flags: str) -> None:
    """Submit a search as a job, and leave it alone."""
    search = (
        f"python -m cedm_ray.search --storage-path {hosts.shared}/runs --tracking-uri http://127.0.0.1:5000 {flags}"
    )
    command = f"ray job submit --no-wait --submission-id {job} -- {search}"
    hosts.operator.run(f"ray exec {cluster_file} {shlex.quote(command)}")


def raylets(host: Any) -> str:
    return str(host.run("pgrep -x raylet", check=False).strip())


def job_status(hosts: Any, job: str) -> str:
    said = str(hosts.head.run(f"ray job status {job}", check=False))
    found = re.search(rf"Job '{job}' (succeeded|failed|was stopped)|Status for job '{job}': (\w+)", said)
    return (found[1] or found[2]) if found else said


def log(hosts: Any, job: str) -> str:
    return str(hosts.head.run(f"ray job logs {job}", check=False))


def rungs(hosts: Any) -> set[str]:
    """The trainings of the search that is to lose a worker, as far as they have told a rung."""
    return set(re.findall(r"(\S+): 10 kimg, ", log(hosts, UNPLUGGED)))


def training(hosts: Any) -> set[str]:
    """The addresses at which something is trained now."""
    actors = json.loads(python(hosts.head, ACTORS))
    return {address for kind, address, state in actors if kind == "RayTrainWorker" and state == "ALIVE"}


def test_a_file_that_was_not_filled_in_is_refused(hosts: Any) -> None:
    said = hosts.operator.run(f"ray up -y {CLUSTER_FILE}", check=False)
    assert "EDIT_" in said and "Error" in said
    assert not (hosts.head.home / ".ray").exists()


def test_the_head_and_the_workers_have_addresses_of_their_own(up: Any) -> None:
    found = json.loads(python(up.head, NODES))
    assert sorted(found) == sorted(host.address for host in (up.head, *up.workers)) and len(set(found)) == 3


def test_dashboard_jobs_and_mlflow_listen_on_loopback_alone(up: Any) -> None:
    wait_until("MLflow answers", lambda: ":5000 " in up.head.run("ss -Hltn"), within_s=120)
    lines = [line.split() for line in up.head.run("ss -Hltn").splitlines()]
    listening = {line[3].rpartition(":")[2]: line[3].rpartition(":")[0] for line in lines}
    assert listening["8265"] == listening["5000"] == "127.0.0.1"
    assert "6379" in listening  # where the nodes meet: open to the others, and only with the token


def test_without_the_token_nobody_is_answered_and_nobody_else_can_read_it(up: Any) -> None:
    assert python(up.head, ASK_FOR_JOBS).split() == ["401", "403", "200"]
    for host in (up.operator, up.head, *up.workers):
        assert host.run("stat -c %a ~/.ray/auth_token").strip() == "600"
    for host in (up.head, *up.workers):
        assert host.run("stat -c %a ~/.ray").strip() == "700"
    stranger = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong timeout 60 ray status --address {up.head.address}:6379"
    said = up.workers[0].run(stranger, check=False)
    assert "Unauthenticated" in said or "authentication" in said.lower(), said


def test_the_search_that_was_submitted_as_a_job_ends_well(searched: Any) -> None:
    assert job_status(searched, JOB) == "succeeded", log(searched, JOB)
    (file,) = (searched.shared / "runs").glob("digits-*/result.json")
    result = json.loads(file.read_text())
    assert result["best"] >= 2 and result["final"]["kimg"] == 5
    assert Path(result["final"]["export"]).is_relative_to(searched.shared)


def test_trials_ran_on_both_workers_and_nothing_was_trained_on_the_head(searched: Any) -> None:
    places: dict[str, set[str]] = {}
    for kind, address, _ in json.loads(python(searched.head, ACTORS)):
        places.setdefault(kind, set()).add(address)
    assert places["RayTrainWorker"] == {worker.address for worker in searched.workers}, places


def test_the_runs_are_in_the_mlflow_of_the_head(searched: Any) -> None:
    assert python(searched.head, LOGGED) == "1 {'FINISHED'}"


def test_the_same_job_again_reads_what_is_stored(searched: Any, cluster_file: Path) -> None:
    search = f"python -m cedm_ray.search --storage-path {searched.shared}/runs {SMALL}"
    said = searched.operator.run(f"ray exec {cluster_file} {shlex.quote(f'ray job submit -- {search}')}")
    assert "all is done" in said


def test_a_search_that_loses_a_worker_from_the_network_ends_well_without_it(unplugged: Story, searched: Any) -> None:
    assert unplugged.status == "succeeded", unplugged.log
    results = [json.loads(file.read_text()) for file in (searched.shared / "runs").glob("digits-*/result.json")]
    (trials,) = [result["trials"] for result in results if result["grouping"] == "labels"]
    assert {trial["grouping"] for trial in trials} == {"labels", "none"}
    for trial in trials:
        reached = [10, 20, 30, 40, 50, 60] + ([61] if trial["grouping"] == "labels" else [])
        assert trial["state"] == "complete" and [rung["kimg"] for rung in trial["rungs"]] == reached
    print(f"told after {unplugged.told_s:.0f} s, over after {unplugged.over_s:.0f} s")


def test_one_training_went_on_elsewhere_from_its_last_rung_and_the_other_was_left_alone(unplugged: Story) -> None:
    moved = re.findall(r"(\S+): a node was lost; goes on from (\d+) kimg", unplugged.log)
    assert len(moved) == 1 and int(moved[0][1]) >= 10, unplugged.log
    told = re.findall(r"(\S+): (\d+) kimg, ", unplugged.log)
    assert len(told) == len(set(told)) == 13, told  # no rung twice
    assert unplugged.told_s < 120


def test_mlflow_has_each_point_of_the_moved_training_once(unplugged: Story, searched: Any) -> None:
    assert unplugged.status == "succeeded" and python(searched.head, POINTS) == "1"


def test_down_ends_ray_on_every_host(searched: Any, cluster_file: Path) -> None:
    searched.operator.run(f"ray down -y {cluster_file}")
    everybody = (searched.head, *searched.workers)
    wait_until("no raylet is left", lambda: not any(raylets(host) for host in everybody), within_s=120)
