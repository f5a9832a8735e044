import threading
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from cedm_ray.stages.cluster import waiting
from cedm_ray.stages.cluster.shares import Shares
from cedm_ray.stages.cluster.waiting import LOOK_EVERY_S, SAY_EVERY_S, Places, Wait, unheld, watched


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {}), "memory": 1e9}}


def shares(num_workers: int = 1, gpus: float = 0.0, max_trials: int = 3) -> Shares:
    return Shares(num_workers, 1.0, gpus, 1.0, gpus, max_trials, 1)


class Cluster:
    """Nodes that come and go, and a clock."""

    def __init__(self, *nodes: Any) -> None:
        self.nodes, self.now_s, self.looks = list(nodes), 0.0, 0

    def look(self) -> list[Any]:
        self.looks += 1
        if not self.nodes:
            raise ConnectionError("away")
        return self.nodes

    def places(self, found: Shares, most: int | None = None) -> Places:
        return Places(found, most, self.look, lambda: self.now_s)


def test_places_follow_the_nodes_and_there_is_always_one() -> None:
    cluster = Cluster(node(0), node(2), node(2))
    places = cluster.places(shares(max_trials=9))
    found = []
    for nodes in ([node(0), node(2), node(2)], [node(0), node(2, alive=False), node(2)], [node(0)], [node(0), node(8)]):
        cluster.nodes, cluster.now_s = nodes, cluster.now_s + LOOK_EVERY_S
        found.append(places())
    assert found == [4, 2, 1, 8]


def test_places_are_no_more_than_the_settings_allow_and_count_whole_trainings() -> None:
    cluster = Cluster(node(0), node(16, 1), node(16, 2))
    for found, most, expected in (
        (shares(2, 1.0), None, 1), (shares(1, 1.0), None, 3), (shares(1, 0.5), None, 6), (shares(1, 0.5), 2, 2),
        (shares(4, 1.0), None, 1),
    ):  # fmt: skip
        places = cluster.places(found, most)
        cluster.now_s += LOOK_EVERY_S
        assert places() == expected


def test_the_nodes_are_looked_at_seldom_and_the_last_answer_stands_where_there_is_none() -> None:
    cluster = Cluster(node(4))
    places = cluster.places(shares(max_trials=2))
    assert [places() for _ in range(100)] == [2] * 100 and cluster.looks == 0  # as the search was planned
    cluster.now_s = LOOK_EVERY_S
    assert [places() for _ in range(100)] == [4] * 100 and cluster.looks == 1
    cluster.nodes, cluster.now_s = [], 2 * LOOK_EVERY_S
    assert [places() for _ in range(100)] == [4] * 100 and cluster.looks == 2


GPU = {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("groups", "nodes", "said"),
    [
        ([], [node(0)], ""),
        ([[GPU]], [node(0), node(4, 1)], ""),
        ([[GPU]], [node(4), node(4, 1, alive=False)], "no node of the cluster holds 1 CPU and 1 GPU"),
        ([[GPU] * 2], [node(4, 2)], ""),
        ([[GPU] * 2], [node(4, 1), node(1, 1)], ""),
        ([[GPU] * 3], [node(1, 2), node(4, 1)], "the cluster holds 2 of 3 times 1 CPU and 1 GPU"),
        ([[{"CPU": 0.1}] * 3], [node(0.3)], ""),
        ([[{"GPU": 0.5}] * 3], [node(1, 1)], "the cluster holds 2 of 3 times 0.5 GPU"),
        ([[{"GPU": 0.4}] * 5], [node(1, 2)], "the cluster holds 4 of 5 times 0.4 GPU"),
        ([[{"CPU": 0.57}]], [node(0.57)], ""),  # 0.57 * 10,000 < 5,700
        ([[{"memory": 6e8}] * 2], [node(1)], "the cluster holds 1 of 2 times 6e+08 memory"),
        ([[{"CPU": 1.0}], [{"CPU": 4.0}]], [node(2), node(2)], "no node of the cluster holds 4 CPU"),
        ([[{}], [{"GPU": 0.0}]], [node(0)], ""),
        ([[{"CPU": 1.0}]], [], "no node of the cluster holds 1 CPU"),
    ],
)  # fmt: skip
def test_what_no_node_holds_is_told_and_what_others_use_at_present_is_not(
    groups: Any, nodes: list[Any], said: str
) -> None:
    assert unheld(groups, nodes) == said


def test_waiting_is_said_once_a_minute_and_its_end_once() -> None:
    wait, what = Wait(), "no node of the cluster holds 1 CPU"
    said = {now_s: line for now_s in range(0, 400, 5) if (line := wait.said(what if 40 <= now_s < 245 else "", now_s))}
    assert said == {
        100: f"{what}: waiting for 1 min 00 s; ray status shows what is asked for",
        160: f"{what}: waiting for 2 min 00 s; ray status shows what is asked for",
        220: f"{what}: waiting for 3 min 00 s; ray status shows what is asked for",
        245: "the cluster holds again what is asked for, after 3 min 25 s",
    }
    assert SAY_EVERY_S == 60


def test_no_answer_of_the_cluster_says_neither_that_there_is_room_nor_ends_the_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers, done, lines = iter([GPU, None, GPU, GPU, None]), threading.Event(), list[str]()

    def pending() -> list[Any]:
        bundle = next(answers, done)
        if bundle is done:
            done.set()
        if not isinstance(bundle, dict):
            raise ConnectionError("the cluster does not answer")
        return [[bundle]]

    monkeypatch.setattr(waiting, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(waiting, "SAY_EVERY_S", 0.001)
    monkeypatch.setattr(waiting, "pending", pending)
    monkeypatch.setattr(ray, "nodes", lambda: [node(4)])
    monkeypatch.setattr(waiting, "Orphans", lambda bundle: Mock(freed=lambda now_s: 0))
    board = Mock(said=Mock(side_effect=lambda: ["a node was lost"]))
    with watched(Mock(line=lambda text, style="": lines.append(text.strip())), board, shares()):
        assert done.wait(10)
    told = [line for line in lines if line != "a node was lost"]
    assert len(told) == 2 and all("no node of the cluster holds 1 CPU and 1 GPU: waiting for" in line for line in told)
    assert lines.count("a node was lost") >= 6


def test_a_short_want_is_not_told() -> None:
    wait = Wait()
    assert not any(wait.said("no node" if now_s % 50 < 45 else "", now_s) for now_s in range(0, 3600, 5))
