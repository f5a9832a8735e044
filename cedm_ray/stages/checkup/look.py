"""What a task looks at on its node, and how the driver sees that the node shares the storage path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cedm_ray.errors import UserError
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.machine import machine_findings
from cedm_ray.stages.checkup.ports import jobs_finding, listeners, port_finding
from cedm_ray.stages.checkup.storage import write_probe
from cedm_ray.stages.checkup.versions import asked, version_findings
from cedm_ray.stages.storage.bucket import address, bucket_key, read_object, remove_object, write_object


@dataclass(frozen=True)
class Needs:
    """What a node is asked for; small enough to travel."""

    folder: Path
    """A folder below the storage path, in which each node leaves a file."""
    files: tuple[tuple[str, Path], ...]
    """Flags, and the files that they name, which every node must have."""
    checkpoint: int
    """Size of a checkpoint, in bytes."""
    token: bool
    """Whether Ray asks its clients for a token."""
    session: str
    """Name of the Ray session."""


def look(needs: Needs, file: Path, elsewhere: bool) -> list[Finding]:
    """What a task says of its node; it leaves a file where the driver looks for it.

    Args:
        needs: What the node is asked for.
        file: The file to leave.
        elsewhere: Whether the node is another one than the driver's, which has looked at its own machine already.
    """
    found = [*version_findings(asked()), *machine_findings(needs.checkpoint)] if elsewhere else []
    try:
        if bucket_key(file) is None:
            write_probe(file)
        write_object(file, b"seen")
    except OSError as error:
        text = f"{file.parent.parent} cannot be written ({error.strerror})"
        found.append(Finding("shared storage", "fail", text, "mount the same folder on every node, writable"))
    except UserError as error:
        found.append(Finding.refused("shared storage", error))
    missing = [f"{flag} {path}" for flag, path in needs.files if not os.access(path, os.R_OK)]
    if missing:
        text, fix = f"{missing[0]} cannot be read here", "put weight files where every node can read them"
        found.append(Finding("weight files", "fail", text, fix))
    ports = listeners(needs.session)
    jobs = jobs_finding(ports)
    return [*found, port_finding(ports, token=needs.token), *([jobs] if jobs else [])]


def shared_finding(file: Path) -> Finding:
    """Whether the driver sees what a node wrote to the storage path.

    Args:
        file: What the node wrote.
    """
    storage = address(file.parent.parent)
    if file.is_file() or read_object(file) is not None:
        remove_object(file)
        return Finding("shared storage", "ok", f"what is written to {storage} is seen by the driver")
    text = f"what is written to {storage} is not seen by the driver: it is another folder there"
    return Finding("shared storage", "fail", text, "give a --storage-path that all nodes share")
