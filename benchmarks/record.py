"""How every benchmark ends: one JSON object, printed and, where asked for, written to a file."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``; the description is printed as it is written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON object to this file")
    return parser


def end(figures: Mapping[str, Any], file: Path | None, packages: tuple[str, ...] = ("torch", "numpy")) -> None:
    """Print the record of a benchmark as the last line, and write it to ``file`` if there is one.

    Args:
        figures: What was measured; plain JSON values.
        file: Where to write the record; None to print it only.
        packages: Installed packages whose versions decide the figures.
    """
    record = {
        "machine": machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "figures": dict(figures),
    }
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0]}" if names else f"{platform.machine()}, {platform.processor()}"
