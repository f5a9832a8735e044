"""python -m cedm_ray.search: from a pile of images to its visual groups."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cedm_ray.addresses import without_credentials
from cedm_ray.errors import UserError
from cedm_ray.stages.show.progress import ErrorFacts, ResultFacts, RunsFacts, StoppedFacts
from cedm_ray.stages.show.screens import json_line, standard_console
from cedm_ray.stages.show.stopping import INTERRUPTED, Signals, Stopped
from cedm_ray.stages.show.terminal import Mode, Terminal
from cedm_ray.usage import short_help

if TYPE_CHECKING:  # torch, Ray and MLflow take seconds to import, which help and a list of runs do not need
    from cedm_ray.config import SearchConfig
    from cedm_ray.stages.results.result import SearchResult

VIEWS: dict[str, Mode] = {"--plain": "plain", "--json": "json"}
"""Flags that change what is shown and nothing else; they are no settings."""


def run(config: SearchConfig, terminal: Terminal | None = None) -> SearchResult:
    """Search for the visual groups of a dataset; a search that was begun goes on, one that is done is read.

    Args:
        config: The settings, from :func:`cedm_ray.config.load`.
        terminal: Where progress is shown.

    Returns:
        C_max, every trial and the best of them.

    Raises:
        UserError: If the settings cannot work; nothing was computed then.
    """
    from cedm_ray.stages import driver

    return driver.run(config, terminal)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    flags = list(sys.argv[1:] if argv is None else argv)
    if "-h" in flags or "--help" in flags:
        print(short_help(), end="")
        return 0
    mode = next((VIEWS[flag] for flag in flags if flag in VIEWS), None)
    settings = ["--help" if flag == "--help-all" else flag for flag in flags if flag not in VIEWS]
    if "--list-runs" in settings:
        try:
            return _list_runs(settings, mode)
        except UserError as error:
            with _console(mode) as console:
                return _failed(Terminal(console, mode), str(error), 2)
    resume = without_credentials(shlex.join(["python", "-m", "cedm_ray.search", *flags]))
    with _console(mode) as console:
        return _answer(settings, Terminal(console, mode), resume)


def _answer(settings: Sequence[str], terminal: Terminal, resume: str) -> int:
    """Search, and say how it has ended."""
    try:
        return _search(settings, terminal, resume)
    except UserError as error:
        # An error that comes out of a Ray task carries the task's traceback; its cause is the line for the user.
        return _failed(terminal, str(getattr(error, "cause", error)), 2)
    except KeyboardInterrupt as end:
        how = "stopped after the current checkpoints" if isinstance(end, Stopped) else "stopped"
        _say(terminal, f"{how}; go on with: {resume}", StoppedFacts(resume))
        return INTERRUPTED
    except Exception as error:
        if terminal.mode == "json":
            _failed(terminal, f"{type(error).__name__}: {error}", 1)
        raise


def _search(settings: Sequence[str], terminal: Terminal, resume: str) -> int:
    from cedm_ray.config import load
    from cedm_ray.stages import driver
    from cedm_ray.stages.dry_run import dry_run
    from cedm_ray.stages.results.printed import show

    config = load(settings)
    if config.dry_run:
        dry_run(config, terminal)
        return 0
    last_words = f"stopped; go on with: {resume}"
    signals = Signals(terminal.stopping, lambda: terminal.leave(last_words, StoppedFacts(resume)))
    result = driver.run(config, terminal, signals)
    if terminal.mode == "json":
        terminal.tell(result.sentence(), _facts(result))
    else:
        show(result, Console(highlight=False))
    return 0


def _facts(result: SearchResult) -> ResultFacts:
    return ResultFacts(
        name=result.name,
        folder=result.folder,
        best=result.best,
        metric=result.metric,
        score=result.final.mean,
        score_std=result.final.std,
        kimg=result.final.kimg,
        c_max=result.c_max,
        tie_set=result.tie_set.clusters,
        model=result.final.export,
    )


def _list_runs(flags: Sequence[str], mode: Mode | None) -> int:
    """Print the runs in the storage folder, or in this machine's copy of a bucket; of the other flags only
    ``--storage-path`` and ``--storage-copies`` count."""
    from cedm_ray.data.storage import DEFAULT_COPIES_FOLDER, storage_folder
    from cedm_ray.flags import flag_value
    from cedm_ray.stages.show.run_list import list_runs, runs_table

    place, copies = flag_value(flags, "--storage-path"), flag_value(flags, "--storage-copies")
    storage = storage_folder(Path(place or "runs"), Path(copies or DEFAULT_COPIES_FOLDER)).expanduser()
    rows = list_runs(storage)
    if mode == "json":
        print(json_line(f"{len(rows)} runs in {storage}", RunsFacts(tuple(asdict(row) for row in rows))), end="")
    elif rows:
        width = None if sys.stdout.isatty() else 200
        Console(highlight=False, width=width).print(runs_table(rows))
    else:
        print(f"no runs in {storage}; --storage-path names the folder of others")
    return 0


@contextmanager
def _console(mode: Mode | None) -> Iterator[Console]:
    """For JSON a standard output of its own: what libraries print there goes to standard error instead."""
    if mode != "json":
        yield standard_console()
        return
    sys.stdout.flush()
    kept = os.dup(1)
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as own:
        os.dup2(2, 1)
        try:
            yield Console(file=own)
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def _failed(terminal: Terminal, message: str, status: int) -> int:
    _say(terminal, f"error: {message}", ErrorFacts(status))
    return status


def _say(terminal: Terminal, text: str, facts: ErrorFacts | StoppedFacts) -> None:
    """A last line: on standard error for people, among the others for programs."""
    if terminal.mode == "json":
        terminal.tell(text.removeprefix("error: "), facts)
    else:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
