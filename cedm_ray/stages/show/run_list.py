"""The runs in a storage folder, read from their files alone: nothing is started, and nothing heavy is imported."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cedm_ray.stages.storage.paths import LOCK_FILE

# Named here again: the modules that own them take seconds to import. A test compares them.
RESULT_FILE, SO_FAR_FILE, CONFIG_FILE = "result.json", "so_far.json", "config.json"


@dataclass(frozen=True)
class RunRow:
    """One run as its folder tells it; None where it does not."""

    name: str
    dataset: str | None
    grouping: str | None
    state: str
    """``complete``, ``running``, ``on HOST`` (which cannot be asked from here), ``interrupted``, or ``unreadable``."""
    best: int | None
    """The best number of clusters, so far or for good."""
    score: float | None
    metric: str | None
    trials: int
    changed: str | None
    """When something was written last, ISO 8601, local time."""


def list_runs(storage: Path) -> list[RunRow]:
    """The runs in a storage folder, the newest last; folders of anything else are left out."""
    if not storage.is_dir():
        return []
    found = [_row(folder) for folder in storage.iterdir() if (folder / CONFIG_FILE).is_file()]
    return sorted(found, key=lambda row: (row.changed or "", row.name))


def _row(folder: Path) -> RunRow:
    config, result = _map(folder / CONFIG_FILE), _map(folder / RESULT_FILE)
    tree = result or _map(folder / SO_FAR_FILE)
    try:
        best, score = (_final if result else _so_far)(tree) if tree else (None, None)
        trials = len(tree.get("trials", ()))
        broken = not config or ((folder / RESULT_FILE).exists() and not result)
    except (KeyError, TypeError, ValueError, AttributeError):
        best, score, trials, broken = None, None, 0, True
    return RunRow(
        name=folder.name,
        dataset=config.get("dataset"),
        grouping=config.get("grouping"),
        state="unreadable" if broken else "complete" if result else _owner(folder) or "interrupted",
        best=best,
        score=score,
        metric=tree.get("metric"),
        trials=trials,
        changed=_changed(folder),
    )


def _map(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none, or a torn one."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _final(tree: Mapping[str, Any]) -> tuple[int | None, float | None]:
    return int(tree["best"]), float(tree["final"]["mean"])


def _so_far(tree: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """The lowest score among the trials that have got furthest; one that has diverged is not among them."""
    own = [trial for trial in tree["trials"] if trial["grouping"] == tree["grouping"] and trial["rungs"]]
    own = [trial for trial in own if math.isfinite(trial["rungs"][-1]["score"])]
    if not own:
        return None, None
    furthest = max(trial["rungs"][-1]["kimg"] for trial in own)
    scored = [trial for trial in own if trial["rungs"][-1]["kimg"] == furthest]
    best = min(scored, key=lambda trial: float(trial["rungs"][-1]["score"]))
    return int(best["num_clusters"]), float(best["rungs"][-1]["score"])


def _owner(folder: Path) -> str | None:
    """Whether a driver holds the folder, as it has written there; a killed one has not taken its name away."""
    owner = _map(folder / LOCK_FILE)
    if not owner:
        return None
    if owner.get("host") != socket.gethostname():
        return f"on {owner.get('host')}"
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return "running"
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return "running"


def _changed(folder: Path) -> str | None:
    times = []
    for name in (RESULT_FILE, SO_FAR_FILE, CONFIG_FILE, "search.log"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return datetime.fromtimestamp(max(times)).isoformat(sep=" ", timespec="minutes") if times else None


def runs_table(rows: Sequence[RunRow]) -> Table:
    """The runs for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "grouping", "state", "best C", "score", "trials", "last written"):
        whole = name in ("run", "last written")
        right = name in ("best C", "trials")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        score = "" if row.score is None else f"{row.metric} {row.score:.4g}"
        best = "" if row.best is None else str(row.best)
        cells = (row.name, row.grouping, row.state, best, score, str(row.trials), row.changed)
        table.add_row(*(Text(str(cell or "")) for cell in cells))
    return table
