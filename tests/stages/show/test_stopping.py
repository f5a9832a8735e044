"""How a search is asked to end: the signals, in real processes, and what then still starts."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from cedm_ray.clustering.upper_bound import UpperBoundSearch
from cedm_ray.granularity.runs import Leg
from cedm_ray.granularity.search import Verdict
from cedm_ray.stages.probes import ProbeSearcher
from cedm_ray.stages.show.stopping import Signals, Stopped, Stopping
from cedm_ray.stages.training.legs import Desk, LegScheduler, LegSearcher

PROGRAM = """
import os, sys, time
from cedm_ray.stages.show import stopping
stopping.NOW_S, stopping.TERM_GRACE_S = 0.5, 0.5
asked = stopping.Stopping()
signals = stopping.Signals(asked, lambda: os.write(1, b"last words\\n"))
with signals.handled():
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01 if sys.argv[1] != "one sleep" else 30)
            if asked.asked and sys.argv[1] == "at once":
                asked.check()
    except stopping.Stopped:
        print("stopped", flush=True)
    except KeyboardInterrupt:
        print("now", flush=True)
        if sys.argv[1] == "hangs":
            print("closing", flush=True)
            while True:
                try:
                    time.sleep(30)
                except KeyboardInterrupt:
                    pass
print("closed", flush=True)
"""


@contextmanager
def program(course: str) -> Iterator[subprocess.Popen[str]]:
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", PROGRAM, course]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}) as run:
        try:
            assert run.stdout is not None and run.stdout.readline() == "ready\n"
            yield run
        finally:
            run.kill()


def rest(run: subprocess.Popen[str]) -> list[str]:
    said, _ = run.communicate(timeout=30)
    return said.splitlines()


def test_ctrl_c_once_asks_and_the_program_ends_where_it_can_go_on() -> None:
    with program("at once") as run:
        run.send_signal(signal.SIGINT)
        assert rest(run) == ["stopped", "closed"] and run.returncode == 0


def test_ctrl_c_once_interrupts_nothing_and_twice_interrupts_what_runs() -> None:
    with program("goes on") as run:
        run.send_signal(signal.SIGINT)
        assert run.stdout is not None and not select.select([run.stdout], [], [], 0.3)[0]
        run.send_signal(signal.SIGINT)
        assert rest(run) == ["now", "closed"] and run.returncode == 0


@pytest.mark.parametrize("third", [False, True])
def test_what_does_not_end_after_twice_is_ended_with_the_last_words(third: bool) -> None:
    with program("hangs") as run:
        run.send_signal(signal.SIGINT)
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.stdout is not None and [run.stdout.readline() for _ in range(2)] == ["now\n", "closing\n"]
        started_s = time.monotonic()
        if third:
            run.send_signal(signal.SIGINT)
        assert rest(run) == ["last words"] and run.returncode == 130
        assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(("course", "said"), [("at once", ["stopped", "closed"]), ("one sleep", ["now", "closed"])])
def test_sigterm_asks_and_after_its_grace_interrupts(course: str, said: list[str]) -> None:
    with program(course) as run:
        run.send_signal(signal.SIGTERM)
        assert rest(run) == said and run.returncode == 0


def test_the_handlers_from_before_come_back_and_a_library_s_are_replaced() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopping = Stopping()
    signals = Signals(stopping)
    with signals.handled():
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the library's"))  # as Ray does
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked
        with pytest.raises(Stopped):
            stopping.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    Stopping().check()


class Three:
    """Three trainings of four rungs each; the second one pauses at its first rung."""

    def __init__(self) -> None:
        self.left = [Leg(name, {"name": name}, 0, 4) for name in ("goes on", "pauses", "never starts")]
        self.ended: list[str] = []

    def ask(self) -> Leg | None:
        return self.left.pop(0) if self.left else None

    def tell(self, key: str, result: Mapping[str, Any]) -> Verdict:
        return "pause" if key == "pauses" else "continue"

    def end(self, key: str, failed: bool) -> None:
        self.ended.append(key)

    @property
    def done(self) -> bool:
        return False


class Tune:
    """The part of Tune's controller that the scheduler uses."""

    def __init__(self, searcher: LegSearcher, names: tuple[str, ...]) -> None:
        self.searcher = searcher
        self.trials = {name: SimpleNamespace(trial_id=name, status=Trial.RUNNING, is_saving=False) for name in names}

    def get_trials(self) -> list[Any]:
        return list(self.trials.values())

    def stop_trial(self, trial: Any) -> None:
        trial.status = Trial.TERMINATED
        self.searcher.on_trial_complete(trial.trial_id)


def test_asked_to_end_legs_end_at_their_next_rung_and_none_starts() -> None:
    source, stopping = Three(), Stopping()
    desk = Desk(source, lambda: 3, stopping)
    searcher, scheduler = LegSearcher(desk), LegScheduler(desk)
    assert [searcher.suggest(name) for name in ("a", "b")] == [{"name": "goes on"}, {"name": "pauses"}]
    tune = Tune(searcher, ("a", "b"))
    a, b = tune.get_trials()

    def hear(trial: Any, kimg: int) -> str:
        return scheduler.on_trial_result(tune, trial, {"kimg": kimg})

    assert hear(a, 1) == TrialScheduler.CONTINUE
    assert desk.next_leg() is not None  # asked for, and not begun
    stopping.ask()
    assert searcher.suggest("c") is None and not desk.done
    assert hear(b, 1) == TrialScheduler.PAUSE  # as the search says: it may be resumed by the next process
    b.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(tune) is None and b.status == Trial.PAUSED  # others still train
    assert hear(a, 2) == TrialScheduler.STOP
    tune.stop_trial(a)
    assert scheduler.choose_trial_to_run(tune) is None and b.status == Trial.TERMINATED
    assert searcher.suggest("c") == Searcher.FINISHED
    assert source.ended == ["goes on", "pauses"] and source.left == []


def test_asked_to_end_probes_are_finished_and_none_starts() -> None:
    stopping = Stopping()
    search = UpperBoundSearch(100, 0.96, max_clusters=1000, low_spread=0.12)
    searcher = ProbeSearcher(search, 2, stopping)
    first = searcher.suggest("a")
    assert isinstance(first, dict)
    stopping.ask()
    assert searcher.suggest("b") is None  # the first one still runs
    searcher.on_trial_complete("a", {"reading": 0.99})
    assert searcher.suggest("b") == Searcher.FINISHED
    assert [reading.ratio for reading in search.readings] == [0.99] and not search.done
