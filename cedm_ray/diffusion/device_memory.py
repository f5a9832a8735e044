"""How much memory a training may count on, and whether its images fit into it.

torch is imported where it is needed only: a node is asked for its memory before it is known to have torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESIDENT_SHARE = 0.25
"""Share of a device's memory that the images of all processes on it may take; the rest is for the training."""


def fits(num_bytes: int, device: torch.device, workers_on_device: float = 1) -> bool:
    """Whether images may lie in the memory of a device, each process there with a copy of its own.

    Args:
        num_bytes: Size of the images.
        device: Where training computes: the bound is ``RESIDENT_SHARE`` of a GPU's memory, or of the main memory that
            is available to this process.
        workers_on_device: Processes of all trainings that share that memory.
    """
    import torch

    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else available_memory()
    return num_bytes * workers_on_device <= RESIDENT_SHARE * memory


def available_memory(root: Path = Path("/")) -> int:
    """Main memory that is available to this process, in bytes: what is free, or the limit of its cgroup if lower.

    Args:
        root: Where the system's ``proc`` and ``sys`` are mounted.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return min([int(facts["MemAvailable"].split()[0]) * 1024, *cgroup_limits(root)])


def cgroup_limits(root: Path = Path("/")) -> Iterator[int]:
    """The limits of this process's cgroup and of those around it, in bytes, in versions 1 and 2 of cgroups.

    Args:
        root: Where the system's ``proc`` and ``sys`` are mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.lstrip("/")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # Inside a container the group may be mounted as the top itself, and its own folder not be seen.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / name).exists():
                limit = (folder / name).read_text().strip()
                if limit != "max":
                    yield int(limit)
