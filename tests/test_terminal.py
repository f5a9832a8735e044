"""What is shown while a search runs: live, plain and as JSON; none of it needs Ray."""

import fcntl
import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from cedm_ray.stages.cluster.gpu_use import gpu_use, use_of
from cedm_ray.stages.show import progress, screens
from cedm_ray.stages.show.progress import DecisionFacts, TrialFacts, Work
from cedm_ray.stages.show.screens import ScreenConsole
from cedm_ray.stages.show.stopping import Stopped, Stopping
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.show.terminal_view import HINT, Moment, view

ROOT = str(Path(__file__).parent.parent)


def trial(label: str, state: str, kimg: int = 5, score: float | None = None) -> TrialFacts:
    return TrialFacts(label, "temi", 17, state, kimg, "fid", {} if score is None else {"fid": score, "fdd": 100.0})


MANY = tuple(trial(f"C={c}", "paused", 5, float(c)) for c in range(2, 60))
LONG = Moment("  1:00", 0.0, "s" * 99, "o" * 99, (), MANY, "n" * 99)
BUSY = Moment(
    clock="  3:12",
    now_s=1000.0,
    stage="searching over C in [2, 148)",
    outlook="C tried: 5, 0.065 Mimg of 0.1008 Mimg, at most about 3 min 05 s left",
    works=(
        Work("C=17", 7, 20, "kimg", 900, gpu="93 %, 31 of 80 GB"),
        Work("C=5 scoring", 150, 1800, "images", 990),
        Work("clustering into 150", 3, 60, "epochs", 900),
    ),
    trials=(
        trial("unconditional", "complete", 20, 12.345),
        trial("C=17", "running", 5, 14.2),
        trial("C=44", "failed", 5, math.nan),
        trial("C=5", "running", 15, 13.2),
        trial("C=9", "paused", 5, 11.5),
        trial("C=3", "running", 0),
    ),
)


def drawn(moment: Moment, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, record=True, file=io.StringIO(), force_terminal=True)
    console.print(view(moment, width, height))
    return console.export_text().splitlines()


def test_the_view_shows_stage_budget_trials_scores_and_time_left() -> None:
    lines = drawn(BUSY, 110, 24)
    assert lines[0] == "  3:12 searching over C in [2, 148)" and "0.065 Mimg of 0.1008 Mimg" in lines[1]
    header, rows = lines[2].split(), [line.split("  ") for line in lines[3:-1]]
    assert header == ["state", "done", "fid", "left", "GPU"] and lines[-1] == HINT
    said = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    # 7 kimg in 100 s leave 13 for 186 s; 150 images in 10 s leave 1,650 for 110 s.
    assert said == [
        ["C=17", "training", "7/20 kimg", "14.2", "3 min 06 s", "93 %, 31 of 80 GB"],
        ["C=5", "scoring", "150/1,800 images", "13.2", "1 min 50 s"],
        ["C=3", "starting", "0 kimg"],
        ["clustering into 150", "3/60 epochs", "31 min 40 s"],
        ["C=9", "paused", "5 kimg", "11.5"],
        ["unconditional", "complete", "20 kimg", "12.35"],
        ["C=44", "failed", "5 kimg", "nan"],
    ]


@pytest.mark.parametrize("size", [(200, 60), (80, 24), (60, 12), (40, 10), (20, 5), (10, 3), (1, 1)])
@pytest.mark.parametrize("moment", [BUSY, LONG, Moment(" ", 0.0)], ids=["busy", "long", "empty"])
def test_the_view_fits_any_terminal(moment: Moment, size: tuple[int, int]) -> None:
    width, height = size
    lines = drawn(moment, width, height)
    assert max(map(len, lines)) <= width and len(lines) <= max(height - 1, 3)


def test_a_view_without_room_says_how_many_trials_it_leaves_out() -> None:
    lines = drawn(Moment("  1:00", 0.0, "training", trials=MANY), 80, 12)
    assert [line.split()[0] for line in lines[2:-2]] == [f"C={c}" for c in range(2, 9)]  # the best scores
    assert lines[-2] == f"and {len(MANY) - 7} more"


def test_a_label_is_text_and_no_markup() -> None:
    moment = Moment("", 0.0, works=(Work("[bold]x[/bold]", 1, 2, "kimg", 0.0),))
    assert any(line.startswith("[bold]x[/bold]") for line in drawn(moment, 80, 9))


class Works:
    def works(self) -> list[Work]:
        return [Work("half", 5, 10, "kimg", 0.0, gpu="50 %, 1 of 80 GB")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(screens, "TOLD_EVERY_S", 0.02)


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline_s, "nothing came in 10 s"
        time.sleep(0.005)


def test_a_terminal_that_is_none_gets_plain_lines(quick: None) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, highlight=False, width=200))
    assert terminal.mode == "plain"
    with terminal.stage("training", Works(), lambda: "1 of 2 trials done"):
        until(lambda: "half" in out.getvalue())
    assert "training" in out.getvalue() and "1 of 2 trials done; half 5/10 kimg" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_json_is_one_object_a_line_with_documented_names(quick: None) -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out), "json")
    with terminal.stage("training", Works(), lambda: "1 of 2"):
        terminal.line("  C=17: 5 kimg", "bold", trial("C=17", "running", 5, math.nan))
        terminal.line("a note")
        terminal.tell("", DecisionFacts(17, (9, 17), 9))
        until(lambda: "progress" in out.getvalue())
    events = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in out.getvalue().splitlines()
    ]
    by_name = {event["event"]: event for event in events}
    assert [event["event"] for event in events][:4] == ["stage", "trial", "line", "decision"]
    assert all(event["time"].endswith("+00:00") and "text" in event for event in events)
    assert by_name["stage"]["stage"] == "training"
    assert {name: by_name["trial"][name] for name in ("label", "state", "kimg", "metric", "scores")} == {
        "label": "C=17", "state": "running", "kimg": 5, "metric": "fid", "scores": {"fid": None, "fdd": 100.0},
    }  # fmt: skip
    assert by_name["decision"]["tie_set"] == [9, 17]
    (work,) = by_name["progress"]["works"]
    assert work["label"] == "half" and work["gpu"] == "50 %, 1 of 80 GB" and work["left_s"] > 0


def test_every_event_is_in_the_documentation() -> None:
    text = (Path(ROOT) / "docs" / "terminal.md").read_text()

    def kinds(base: type[progress.Facts]) -> Iterator[type[progress.Facts]]:
        yield base
        for kind in base.__subclasses__():
            yield from kinds(kind)

    for kind in kinds(progress.Facts):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{kind.event}` |")]
        for each in fields(kind):
            assert f"`{each.name}`" in row, f"{kind.event}: {each.name}"


def test_a_search_that_is_asked_to_end_says_what_it_waits_for_and_starts_no_stage(quick: None) -> None:
    out, stopping = io.StringIO(), Stopping()
    terminal = Terminal(Console(file=out, width=200), stopping=stopping)
    with terminal.stage("training", Works()):
        stopping.ask()
        until(lambda: "stopping" in out.getvalue())
    assert "stopping: waits for half to come to a checkpoint; Ctrl-C again stops now" in out.getvalue()
    assert out.getvalue().count("stopping") == 1
    with pytest.raises(Stopped), terminal.stage("the next one"):
        pytest.fail("it was started")
    assert "the next one" not in out.getvalue()


def test_a_stage_does_not_end_while_its_works_are_read(quick: None) -> None:
    reading, ended = threading.Event(), threading.Event()

    class Slow:
        def works(self) -> list[Work]:
            reading.set()
            time.sleep(0.1)
            assert not ended.is_set(), "the cluster may be gone"
            return []

    terminal = Terminal(Console(file=io.StringIO()))
    with terminal.shown(), terminal.stage("embedding", Slow()):
        assert reading.wait(10)
    ended.set()
    time.sleep(0.15)


LIVE = """
import time
from cedm_ray.stages.show import progress
progress.TICK_S = 0.02
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.progress import Work
from cedm_ray.stages.show.terminal import Terminal
import os, sys
from pathlib import Path
class Works:
    def works(self): return [Work("C=17", 5, 10, "kimg", time.time() - 5)]
terminal = Terminal()
assert terminal.mode == "live", terminal.mode
with output_to(Path(sys.argv[1]), terminal.console), terminal.shown():
    for number in range(3):
        with terminal.stage(f"stage {number}", Works()):
            for line in range(8):
                os.write(1, b"noise"); os.write(2, b"noise")
                terminal.line(f"line {number}.{line} " + "word " * 12)
                time.sleep(0.03)
print("after")
"""


def in_a_terminal(argv: list[str], columns: int, lines: int) -> bytes:
    """All that a program writes to a terminal of that size."""
    child, fd = pty.fork()
    if child == 0:  # pragma: no cover
        os.environ.update({"TERM": "xterm", "PYTHONPATH": ROOT})
        os.execv(argv[0], argv)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    said = b""
    try:
        while part := os.read(fd, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    _, status = os.waitpid(child, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0, said.decode()
    return said


@pytest.mark.parametrize(("columns", "lines"), [(100, 30), (40, 10)])
def test_on_a_real_terminal_lines_scroll_above_the_view_and_the_view_is_taken_away(
    columns: int, lines: int, tmp_path: Path
) -> None:
    said = in_a_terminal([sys.executable, "-c", LIVE, str(tmp_path / "log")], columns, lines).decode()
    assert "noise" not in said and (tmp_path / "log").read_text().count("noise") == 48
    for number in range(3):
        for line in range(8):
            assert said.count(f"line {number}.{line} ") == 1
    assert "C=17" in said and "\x1b[?25l" in said
    # At the end the view is erased and the cursor is back.
    last = said[said.rindex("\x1b[?25h") :]
    assert "C=17" not in last and last.endswith("after\r\n")


def test_the_size_is_that_of_the_terminal_that_is_written_to(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as file:
        os.set_blocking(ours, False)
        fcntl.ioctl(file, termios.TIOCSWINSZ, struct.pack("HHHH", 17, 61, 0, 0))
        assert tuple(ScreenConsole(file=file).size) == (61, 17)
    os.close(ours)
    with open(tmp_path / "file", "w") as file:
        assert ScreenConsole(file=file).size == Console(file=file).size


def test_a_view_costs_less_than_a_tenth_of_a_core() -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, force_terminal=True, width=100, height=30), "live")
    for facts in (*BUSY.trials, *MANY):
        terminal.tell("", facts)
    with terminal.stage("training", Works()):
        terminal.tick()
        started_s = time.thread_time()
        for _ in range(20):
            terminal.tick()
        spent_s = (time.thread_time() - started_s) / 20
    print(f"one redraw takes {1000 * spent_s:.1f} ms of CPU, one a second")
    assert spent_s < 0.1


def test_noise_goes_to_the_log_and_our_lines_to_the_screen(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.terminal import Terminal
terminal = Terminal()
with output_to(Path({str(tmp_path / "log")!r}), terminal.console):
    os.write(2, b"from C++\\n"); print("from Python"); terminal.line("ours")
print("after")
os.write(2, b"error after\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["ours", "after"]
    assert done.stderr == "error after\n"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["from C++", "from Python"]


def test_gpu_use_is_told_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    class Rates:
        gpu = 93

    class Memory:
        used, total = 31.2e9, 80e9

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: Rates)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: Memory)
    assert use_of("handle") == "93 %, 31 of 80 GB"

    def refuses(gpu: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", refuses)
    assert use_of("handle") == "" and use_of(None) == ""
    assert gpu_use() == ""  # this process computes on none


NOTEBOOK_CELL = """
import logging, os, sys
from pathlib import Path
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.terminal import Terminal
logger = logging.getLogger("library")
logger.addHandler(logging.StreamHandler())  # keeps the kernel's stream, as Ray's does
terminal = Terminal()
with output_to(Path("log"), terminal.console), terminal.shown():
    print("noise")
    print("noise", file=sys.stderr)
    os.write(1, b"noise\\n")
    logger.warning("noise")
    terminal.line("ours", "bold")
print("after")
logger.warning("after too")
"""


def test_a_notebook_shows_our_lines_as_text_and_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # where it is set, a kernel leaves out what goes to the descriptors
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK_CELL)])
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = notebook.cells[0].outputs
    assert {each.output_type for each in said} == {"stream"}
    assert "".join(each.text for each in said if each.name == "stdout") == "  0:00 ours\nafter\n"
    assert "".join(each.text for each in said if each.name == "stderr") == "after too\n"
    assert (tmp_path / "log").read_text() == "noise\n" * 4
