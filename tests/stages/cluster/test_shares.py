import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from cedm_ray.errors import UserError
from cedm_ray.settings import ResourceSettings
from cedm_ray.stages.cluster.shares import Shares, shares


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    resources = {name: float(value) for name, value in {"CPU": cpus, "GPU": gpus}.items() if value}
    return {"Alive": alive, "Resources": {**resources, "memory": 1e9}}


def test_as_many_trials_run_at_once_as_whole_worker_groups_fit() -> None:
    settings = ResourceSettings(num_workers=2, cpus_per_worker=1.0)
    assert shares(settings, [node(2)]).max_trials == 1
    assert [shares(settings, [node(cpus)]).max_probes for cpus in (2, 3, 64)] == [1, 1, 32]
    assert shares(settings, [node(64, 6)]).max_probes == 6
    assert shares(settings, [node(9)]).max_trials == 4
    gpus = shares(settings, [node(64, 6)])
    assert (gpus.max_trials, gpus.gpus_per_worker, gpus.gpus_per_probe) == (3, 1.0, 1.0)
    assert shares(ResourceSettings(num_workers=2, gpus_per_worker=0.5), [node(64, 6)]).max_trials == 6


def test_what_is_left_over_on_each_node_does_not_add_up() -> None:
    three, seven = ResourceSettings(num_workers=1, cpus_per_worker=3.0), ResourceSettings(num_workers=7)
    nodes = [node(5), node(5), node(5)]
    assert (shares(three, nodes).max_trials, shares(three, [node(15)]).max_trials) == (3, 5)
    assert (shares(three, nodes).max_probes, shares(three, [node(15)]).max_probes) == (6, 7)
    assert shares(seven, nodes).max_trials == 2  # the workers of one training may lie on several nodes
    # A GPU without a CPU beside it is of no use, nor is a CPU without a GPU.
    apart = [node(64), node(1, 4), node(3, 1)]
    found = shares(ResourceSettings(num_workers=1, cpus_per_probe=1.0), apart)
    assert (found.max_trials, found.max_probes) == (2, 2)


def test_a_share_of_a_gpu_is_of_one_gpu() -> None:
    for each, fits in ((0.4, 4), (0.5, 4), (0.34, 4), (1 / 3, 6), (0.6, 2), (1.0, 2), (2.0, 1)):
        assert shares(ResourceSettings(num_workers=1, gpus_per_worker=each), [node(64, 2)]).max_trials == fits


def test_tenths_of_a_cpu_fill_a_node() -> None:
    for tenths in range(1, 10):
        settings = ResourceSettings(num_workers=1, cpus_per_worker=tenths / 10, cpus_per_probe=tenths / 10)
        found = shares(settings, [node(tenths)])
        assert (found.max_trials, found.max_probes) == (10, 10)
    many = ResourceSettings(num_workers=1, cpus_per_worker=0.57, cpus_per_probe=0.3)  # 0.57 * 10,000 < 5,700
    assert (shares(many, [node(5700)]).max_trials, shares(many, [node(0.9)]).max_probes) == (10_000, 3)


def test_nodes_that_are_gone_do_not_count() -> None:
    found = shares(ResourceSettings(num_workers=1), [node(64, 8, alive=False), node(4), node(32, alive=False)])
    assert (found.max_trials, found.max_probes, found.gpus_per_worker) == (4, 2, 0.0)


def test_a_probe_takes_no_more_than_the_cluster_has() -> None:
    small = shares(ResourceSettings(num_workers=1, cpus_per_probe=8.0), [node(2)])
    assert (small.cpus_per_probe, small.gpus_per_probe, small.gpus_per_worker) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        (
            ResourceSettings(num_workers=3),
            [node(2)],
            "resources.num_workers is 3 with 1 CPU and 0 GPU each, but the cluster holds 2 of them (2 CPU and 0 GPU in "
            "all); lower --resources.num-workers or --resources.cpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=2),
            [node(8, 1)],
            "resources.num_workers is 2 with 1 CPU and 1 GPU each, but the cluster holds 1 of them (8 CPU and 1 GPU in "
            "all); lower --resources.num-workers or --resources.cpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=3, cpus_per_worker=2.0),
            [node(3), node(3)],
            "resources.num_workers is 3 with 2 CPU and 0 GPU each, but the cluster holds 2 of them (6 CPU and 0 GPU in "
            "all); lower --resources.num-workers or --resources.cpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=1, gpus_per_worker=1.0),
            [node(8)],
            "a worker asks for 1 CPU and 1 GPU of one node, but the largest has 8 CPU and 0 GPU; lower "
            "--resources.cpus-per-worker or --resources.gpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=1, cpus_per_worker=4.0),
            [node(3), node(64, alive=False), node(2)],
            "a worker asks for 4 CPU and 0 GPU of one node, but the largest has 3 CPU and 0 GPU; lower "
            "--resources.cpus-per-worker or --resources.gpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=1, cpus_per_worker=4.0),
            [node(2, 1), node(3, 4), node(64)],
            "a worker asks for 4 CPU and 1 GPU of one node, but the largest has 3 CPU and 4 GPU; lower "
            "--resources.cpus-per-worker or --resources.gpus-per-worker",
        ),
        (
            ResourceSettings(num_workers=1, cpus_per_probe=5.0),
            [node(2), node(4)],
            "a clustering asks for 5 CPU and 0 GPU of one node, but the largest has 4 CPU and 0 GPU; lower "
            "--resources.cpus-per-probe",
        ),
        (
            ResourceSettings(num_workers=1, gpus_per_worker=0.0, cpus_per_probe=3.0),
            [node(8), node(2, 4)],
            "a clustering asks for 3 CPU and 1 GPU of one node, but the largest has 2 CPU and 4 GPU; lower "
            "--resources.cpus-per-probe",
        ),
        (
            ResourceSettings(num_workers=1),
            [],
            "a worker asks for 1 CPU and 0 GPU of one node, but the largest has 0 CPU and 0 GPU; lower "
            "--resources.cpus-per-worker or --resources.gpus-per-worker",
        ),
    ],
)
def test_what_can_never_fit_is_refused(settings: ResourceSettings, nodes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError) as caught:
        shares(settings, nodes)
    assert str(caught.value) == said


def packed(cpus: float, gpus: float, nodes: list[dict[str, Any]]) -> int:
    """How many fit, put one by one where there is room, each GPU a place of its own, in exact numbers."""
    count, need = 0, Fraction(str(cpus))
    for each in nodes:
        if not each["Alive"]:
            continue
        left = Fraction(each["Resources"].get("CPU", 0.0))
        places = [Fraction(1)] * int(each["Resources"].get("GPU", 0.0))
        while left >= need:
            if gpus:
                part = min(Fraction(str(gpus)), Fraction(1))
                free = [i for i, place in enumerate(places) if place >= part][: max(1, int(gpus))]
                if len(free) < max(1, int(gpus)):
                    break
                for i in free:
                    places[i] -= part
            left, count = left - need, count + 1
    return count


def random_clusters() -> Iterator[tuple[ResourceSettings, list[dict[str, Any]]]]:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        nodes = [
            node(int(rng.integers(0, 17)), int(rng.choice([0, 0, 1, 2, 5])), alive=bool(rng.random() < 0.9))
            for _ in range(rng.integers(1, 6))
        ]
        yield (
            ResourceSettings(
                num_workers=int(rng.integers(1, 6)),
                cpus_per_worker=float(rng.choice([0.1, 0.3, 0.5, 1, 2, 3, 8])),
                gpus_per_worker=rng.choice([None, 0.0, 0.25, 0.3, 0.5, 0.7, 1.0, 2.0]),
                cpus_per_probe=float(rng.choice([0.2, 1, 2, 4, 12])),
            ),
            nodes,
        )


def test_never_more_at_once_than_the_cluster_holds_and_never_less() -> None:
    outcomes = {True: 0, False: 0}
    for settings, nodes in random_clusters():
        alive = [each["Resources"] for each in nodes if each["Alive"]]
        cpus, gpus = (sum(each.get(name, 0.0) for each in alive) for name in ("CPU", "GPU"))
        gpus_per_worker = settings.gpus_per_worker
        if gpus_per_worker is None:
            gpus_per_worker = 1.0 if gpus else 0.0
        trials = packed(settings.cpus_per_worker, gpus_per_worker, nodes) // settings.num_workers
        probes = packed(min(settings.cpus_per_probe, cpus), min(1.0, gpus), nodes) if cpus else 0
        found: Shares | None = None
        try:
            found = shares(settings, nodes)
        except UserError as error:
            assert "\n" not in str(error)
        outcomes[found is not None] += 1
        assert (found is not None) == (trials > 0 and probes > 0)
        if found is not None:
            assert (found.max_trials, found.max_probes) == (trials, probes)
            workers = found.max_trials * found.num_workers
            assert workers * found.cpus_per_worker <= cpus + 1e-9 and workers * found.gpus_per_worker <= gpus + 1e-9
            assert found.max_probes * found.cpus_per_probe <= cpus + 1e-9 and found.max_probes >= 1
    assert min(outcomes.values()) > 300


@pytest.mark.ray
def test_ray_places_as_many_workers_and_not_one_more() -> None:
    cluster = Cluster()
    try:
        for cpus, gpus in ((1, 0), (3, 0), (4, 2)):
            cluster.add_node(num_cpus=cpus, num_gpus=gpus)
        ray.init(address=cluster.address, log_to_driver=False)
        for cpus, gpus in ((2.0, 0.0), (0.5, 0.4)):
            settings = ResourceSettings(num_workers=1, cpus_per_worker=cpus, gpus_per_worker=gpus)
            fits = shares(settings, ray.nodes()).max_trials
            worker = {"CPU": cpus, "GPU": gpus}
            assert not _placed(worker, fits + 1, timeout_s=2) and _placed(worker, fits, timeout_s=30)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _placed(worker: dict[str, float], count: int, timeout_s: float) -> bool:
    group = placement_group(list(itertools.repeat({name: n for name, n in worker.items() if n}, count)))
    placed = bool(group.wait(timeout_s))
    remove_placement_group(group)
    return placed
