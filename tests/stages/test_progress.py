import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cedm_ray.stages import progress
from cedm_ray.stages.progress import Terminal, Work, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (360000, "100 h 00 min")],
)
def test_durations_are_said_in_the_two_largest_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_time_left_follows_from_what_was_done_since_the_start() -> None:
    work = Work("C=17", 96, 200, "kimg", started_s=100.0, started_done=90.0)
    assert work.text(112.0) == "C=17 96/200 kimg, 3 min 28 s left"  # 104 kimg at 0.5 kimg/s
    assert Work("C=17", 200, 200, "kimg", 100.0).text(112.0) == "C=17 200/200 kimg"


def test_a_terminal_that_is_none_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.02)
    out = io.StringIO()
    terminal = Terminal(Console(file=out, highlight=False))

    class Works:
        def works(self) -> list[Work]:
            return [Work("half", 5, 10, "kimg", 0.0)]

    with terminal.stage("training", Works(), lambda: "1 of 2 trials done"):
        while "half" not in out.getvalue():
            pass
    assert "training" in out.getvalue() and "1 of 2 trials done; half 5/10 kimg" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_noise_goes_to_the_log_and_our_lines_to_the_screen(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from cedm_ray.stages.progress import Terminal, noise_to
terminal = Terminal()
with noise_to(Path({str(tmp_path / "log")!r}), terminal):
    os.write(2, b"from C++\\n"); print("from Python"); terminal.line("ours")
print("after")
os.write(2, b"error after\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["ours", "after"]
    assert done.stderr == "error after\n"
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["from C++", "from Python"]
