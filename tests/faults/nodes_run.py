"""Searches on a cluster of three nodes on one machine whose workers come and go; prints what happened as JSON.

Run by test_nodes_lost.py in a process of its own: ``nodes_run.py FOLDER SEED``. The head has no CPU for work.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cedm_ray.stages import RAY_ENVIRONMENT

MEMORY = 200_000_000
SAY_EVERY_S = 10
SEARCH = f"""
import sys
from cedm_ray.stages.cluster import waiting
waiting.SAY_EVERY_S = {SAY_EVERY_S}.0
from cedm_ray.search import main
sys.exit(main(sys.argv[1:]))
"""
FLAGS = [
    "--dataset=digits", "--plain", "--temi.epochs=30", "--temi.warmup-epochs=1", "--bound.c-start=150",
    "--bound.precision=2", "--bound.low-heads=2", "--bound.low-spread=0.6", "--bound.max-probes=4",
    "--granularity.rule=none", "--granularity.num-trials=3", "--granularity.share=0.5", "--granularity.no-baselines",
    "--granularity.total-kimg=60", "--granularity.rungs", "5", "20", "40", "60", "--granularity.startup-trials=2",
    "--score.num-images=200", "--score.num-steps=4", "--score.num-sets=1", "--resources.num-workers=1",
    "--resources.cpus-per-probe=1", "--final.total-kimg=61", "--final.num-images=150", "--final.num-sets=1",
]  # fmt: skip
WAITS = re.compile(r"no node of the cluster holds .*: waiting for ")
WAIT_S = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Story:
    """The cluster, the search on it, and what was found."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random, self.log = random.Random(seed), folder / "search.out"
        ip, port = ray.util.get_node_ip_address(), free_port()
        # Processes of a trial look the cluster up: other Rays may run on this machine.
        os.environ.update(RAY_ENVIRONMENT, RAY_ADDRESS=f"{ip}:{port}")
        head = {"gcs_server_port": port, "node_ip_address": ip, "dashboard_port": free_port()}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**head, "include_dashboard": True, "num_cpus": 0, "object_store_memory": MEMORY},
        )
        self.nodes = [self.add(), self.add()]
        ray.init(address=f"{ip}:{port}", log_to_driver=False)
        self.found: dict[str, Any] = {"seed": seed, "events": []}
        self.started_s = time.monotonic()
        with open(self.log, "w") as out:
            self.search = subprocess.Popen(
                [sys.executable, "-u", "-c", SEARCH, *FLAGS, f"--storage-path={folder / 'runs'}"],
                stdout=out,
                stderr=out,
            )

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    def lose(self, count: int) -> None:
        """The raylets of so many nodes are killed."""
        for _ in range(count):
            self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        self.say(f"{count} lost")

    def come(self, count: int) -> None:
        self.nodes += [self.add() for _ in range(count)]
        self.say(f"{count} come")

    def say(self, what: str) -> None:
        self.found["events"].append([round(time.monotonic() - self.started_s, 1), what])
        print(self.found["events"][-1], file=sys.stderr, flush=True)

    def said(self, pattern: str, after: int = 0) -> list[str]:
        """Lines of the search from a place in its output on."""
        return [line for line in self.log.read_text()[after:].splitlines() if re.search(pattern, line)]

    @property
    def here(self) -> int:
        return len(self.log.read_text())

    def wait(self, what: str, looks_right: Callable[[], object], within_s: float = WAIT_S) -> float:
        """Seconds until something is so."""
        started_s = time.monotonic()
        while not looks_right():
            waited_s = time.monotonic() - started_s
            ended = self.search.poll() is not None
            assert waited_s < within_s and not ended, (
                f"not within {within_s:g} s: {what}\n{self.log.read_text()[-3000:]}"
            )
            time.sleep(0.2)
        self.say(what)
        return round(time.monotonic() - started_s, 1)

    def actors(self) -> list[tuple[str, str]]:
        """Kind and node of every actor that is alive."""
        from ray.util.state import list_actors

        alive = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        return [(actor.class_name, actor.node_id) for actor in alive]

    def training(self) -> set[str]:
        """The nodes on which workers train."""
        return {node for kind, node in self.actors() if kind == "RayTrainWorker"}

    def away(self, stage: str) -> None:
        """All workers are preempted for a while; the search says so, and goes on when they return."""
        time.sleep(self.random.uniform(0, 3))
        after = self.here
        self.lose(len(self.nodes))
        told_s = self.wait(f"{stage}: said that it waits, twice", lambda: len(self.said(WAITS.pattern, after)) >= 2)
        self.found[f"{stage}_told_s"] = told_s
        self.found[f"{stage}_line"] = self.said(WAITS.pattern, after)[-1]
        self.come(2)

    def run(self) -> dict[str, Any]:
        self.wait("embedding", lambda: self.said("embedding "))
        self.away("embedding")
        self.wait("bound", lambda: self.said("searching C_max"))
        self.wait("a probe runs", lambda: self.said("clustering into"))
        self.away("bound")
        self.wait("trials", lambda: self.said(": starts"))
        self.wait("two trainings at once", lambda: len(self.training()) == 2)
        self.wait("a rung", lambda: self.said(" 5 kimg, "))
        head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
        self.found["off_the_head"] = sorted({kind for kind, node in self.actors() if node != head})
        after = self.here
        self.lose(1)
        self.found["moved_s"] = self.wait("its trial is told", lambda: self.said("a node was lost; goes on", after))
        self.wait("one training at once", lambda: len(self.training()) == 1)
        self.come(1)
        self.found["both_s"] = self.wait("two trainings again", lambda: len(self.training()) == 2 or self.last())
        self.away("trials")
        self.found["again_s"] = self.wait("training again", lambda: self.training())
        while self.search.poll() is None:
            assert time.monotonic() - self.started_s < 3000, self.log.read_text()[-3000:]
            time.sleep(1)
        self.say("ended")
        return {**self.found, "status": self.search.returncode, "lines": self.said("lost|waiting for|holds again")}

    def last(self) -> bool:
        """Whether fewer than two trainings are left."""
        return len(self.said(": starts")) - len(self.said(": 60 kimg")) < 2


if __name__ == "__main__":
    story = Story(Path(sys.argv[1]), int(sys.argv[2]))
    try:
        print(json.dumps(story.run()))
    finally:
        story.search.kill()
        ray.shutdown()
        story.cluster.shutdown()
