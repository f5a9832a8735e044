"""The driver, killed before each thing that it writes down: the search over C, without Ray and without MLflow."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from cedm_ray.clustering.clustering_io import CLUSTERING_FILE
from cedm_ray.config import SearchConfig
from cedm_ray.metrics.stats import StatsFacts
from cedm_ray.settings import FinalSettings, GranularitySettings, RuleName
from cedm_ray.stages.decide import decide
from cedm_ray.stages.granularity import _recall, make_search
from cedm_ray.stages.inputs.scoring import Reference, Scoring
from cedm_ray.stages.storage.store import Store
from cedm_ray.stages.tracking.delivery import Delivery
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE, OutageError, Outbox, read_journal
from cedm_ray.stages.tracking.tracker import Tracker
from cedm_ray.stages.training import ledger as ledger_module
from cedm_ray.stages.training.ledger import Ledger
from cedm_ray.stages.training.ledger_callback import LedgerCallback
from cedm_ray.stages.training.legs import Desk
from cedm_ray.stages.training.trial_job import Planner
from cedm_ray.stages.training.trials import TrialSource

CANDIDATES = (2, 5, 12, 30, 70)
QUALITY = {"num_used": 1, "utilization_ratio": 0.5}
FACTS = StatsFacts("lenet", "ab" * 32, "none", "float32", 2, 300)
Params = Mapping[str, Any]


class KilledError(BaseException):
    """The driver is gone; nothing catches it."""


class Search:
    """One search in a folder of its own, and the drivers that work on it one after the other."""

    def __init__(self, root: Path, rule: RuleName) -> None:
        granularity = GranularitySettings(total_kimg=4, grace_kimg=1, startup_trials=2, rule=rule, retrain_spread=0.1)
        self.config = SearchConfig(granularity=granularity, final=FinalSettings(total_kimg=6), seed=1)
        self.folder, store = root, Store(root / "store")
        root.mkdir()
        scoring = Scoring((Reference(cast(Any, None), FACTS, root / "reference.safetensors"),))
        self.planner = Planner(self.config, store, {"backbone": "pixels"}, root / "images", "ab", {}, scoring)
        for num_clusters in CANDIDATES:
            job = self.planner.job({"grouping": "temi", "num_clusters": num_clusters}).clustering
            assert job is not None
            with store.create(job.path, job.inputs, {"quality": QUALITY}) as scratch:
                (scratch / CLUSTERING_FILE).touch()
        self.checkpoints: dict[str, list[dict[str, Any]]] = {}
        """What the workers have stored, by trial; it outlives every driver."""
        self.trained: list[tuple[str, int]] = []
        self.left, self.writes = -1, 0

    def write(self) -> None:
        """Something is about to be written; the driver may not come to it."""
        if self.left == 0:
            raise KilledError
        self.left -= 1
        self.writes += 1

    def train(self, params: Params, total_kimg: int | None) -> Iterator[dict[str, Any]]:
        """The reports of a training: what was checkpointed before, then each missing rung."""
        job = self.planner.job(params, total_kimg=total_kimg)
        done = self.checkpoints.setdefault(job.key, [])
        yield from list(done)
        for kimg in job.rungs_kimg[len(done) :]:
            self.trained.append((job.label, kimg))
            score = random.Random(f"{job.label} {kimg}").uniform(4, 6) / kimg**0.5
            done.append({"kimg": kimg, "nimg": kimg * 1000, "loss": 0.5, "images_per_s": float(len(self.trained)),
                         "score": score, "fd_lenet": score, "num_images": 300, "score_s": 1.5})  # fmt: skip
            yield done[-1]

    def drive(self, writes: int = -1) -> bool:
        """One driver, which dies after so many writes (-1: never); whether it came to the end."""
        self.left = writes
        tracker = Tracker("unreachable", "test", None, self.folder, lambda line: None)
        try:
            tracker.start("search", "search", {}, {})
            self._search(tracker)
        except KilledError:
            return False
        finally:
            self.left = -1
            tracker.close(0)
        return True

    def _search(self, tracker: Tracker) -> None:
        terminal, board = Mock(), Mock()
        ctx = SimpleNamespace(folder=self.folder, terminal=terminal, tracker=tracker, board=board)
        ledger = Ledger(cast(Any, ctx), self.planner)
        search = make_search(self.config, CANDIDATES, cast(Any, SimpleNamespace(allowed_kimg=lambda: 13.0)))
        complete = [record.params for record in ledger.records if record.state == "complete"]
        given = [params for params in self.planner.fixed() if params not in complete]
        _recall(search, ledger)
        self._tune(ledger, TrialSource(ledger, given, search))
        ledger.close_left("temi")
        decision = decide(ledger.records, self.config, ("fd_lenet",))
        assert decision is not None
        self._tune(ledger, TrialSource(ledger, [decision.best.params]), total_kimg=6)

    def _tune(self, ledger: Ledger, source: TrialSource, total_kimg: int | None = None) -> None:
        """What Tune does with one place: its scheduler hears of a report before its callbacks do."""
        desk, callback = Desk(source, lambda: 1), LedgerCallback(ledger)
        while not source.done:
            leg = desk.next_leg()
            if leg is None:
                continue
            trial_id = desk.trial_id(leg.key) or f"{len(self.trained)} {leg.key}"
            desk.take(leg, trial_id)
            trial = SimpleNamespace(config=dict(leg.params))
            callback.on_trial_start(0, [], trial)
            verdict = "continue"
            for result in self.train(leg.params, total_kimg):
                verdict = desk.hear(trial_id, result)
                callback.on_trial_result(0, [], trial, result)
                if verdict != "continue":
                    break
            if verdict != "pause":
                callback.on_trial_complete(0, [], trial)
                desk.close(trial_id, failed=False)

    def found(self) -> Any:
        """What the search has found, and what MLflow is told: states, points and files, each point once."""
        ctx = SimpleNamespace(folder=self.folder, terminal=None, tracker=None, board=None)
        records = Ledger(cast(Any, ctx), self.planner).records
        runs: dict[str, dict[str, Any]] = {}
        points: Counter[tuple[str, str, int]] = Counter()
        for _, operation in sorted(read_journal(self.folder / OUTBOX_FILE).operations.items()):
            run = runs.setdefault(operation.run, {"files": set(), "tags": {}})
            run["tags"] |= operation.body.get("tags", {})
            if operation.kind in ("open", "end"):
                run["status"] = operation.body.get("status", "RUNNING")
            if operation.kind == "artifact":
                run["files"].add(operation.body["path"].removeprefix(str(self.folder)))
            for name in operation.body["values"] if operation.kind == "metrics" else ():
                points[operation.run, name, operation.body["step"]] += 1
        return [(r.label, r.state, r.utilization_ratio, [(x["kimg"], x["score"]) for x in r.rungs]) for r in records], \
            runs, points  # fmt: skip


@pytest.fixture(autouse=True)
def writes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Search]:
    """Everything that the ledger and the journal write asks the current search first; MLflow never answers."""
    current: dict[str, Search] = {}
    put, write_json, write_record = Outbox.put, ledger_module.write_json, ledger_module.write_record

    def asked(write: Any) -> Any:
        def instead(*args: Any) -> Any:
            current["search"].write()
            return write(*args)

        return instead

    def away(*args: Any) -> Any:
        raise OutageError("away")

    monkeypatch.setattr(Outbox, "put", asked(put))
    monkeypatch.setattr(ledger_module, "write_json", asked(write_json))
    monkeypatch.setattr(ledger_module, "write_record", asked(write_record))
    monkeypatch.setattr(Delivery, "first_connect", lambda self: None)
    monkeypatch.setattr(Delivery, "send", away)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process takes no written bytes with it
    return current


def killed_and_finished(search: Search, kills: list[int]) -> Any:
    """Kill drivers after so many writes each, then let one finish."""
    for count in kills:
        if search.drive(count):
            break
    else:
        assert search.drive()
    return search.found()


@pytest.mark.parametrize(
    ("rule", "step"), [("promotion", 3), ("fitted", 9), pytest.param("fitted", 1, marks=pytest.mark.slow)]
)
def test_a_driver_that_is_killed_before_any_of_its_writes_loses_and_doubles_nothing(
    tmp_path: Path, writes: dict[str, Search], rule: RuleName, step: int
) -> None:
    whole = writes["search"] = Search(tmp_path / "whole", rule)
    assert whole.drive()
    expected, course = whole.found(), whole.trained
    records, runs, points = expected
    assert {state for _, state, *_ in records} == {"complete", "stopped"} and len(records) >= 4
    assert all(run["status"] == "FINISHED" for name, run in runs.items() if name != "search")
    assert set(points.values()) == {1} and max(kimg for *_, kimg in points) == 6
    kills, multiples = list(range(0, whole.writes, step)), range(0, 30, 5 * step)
    for plan in [[count] for count in kills] + [random.Random(seed).choices(kills, k=3) for seed in multiples]:
        search = writes["search"] = Search(tmp_path / "-".join(map(str, plan)), rule)
        found = killed_and_finished(search, plan)
        assert found == expected, f"killed after {plan} of {whole.writes} writes"
        assert search.trained == course  # nothing twice, nothing else
    print(f"{rule}: {len(kills)} kills among {whole.writes} writes, and {len(multiples)} times three: nothing lost")
