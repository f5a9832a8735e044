"""What a node lends to Ray: shared memory, open files, its local disk."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cedm_ray.diffusion.device_memory import cgroup_limits
from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.storage.storage_errors import bytes_in_words

OBJECT_STORE_SHARE = 0.3
"""Of a node's memory that Ray takes for its object store (``DEFAULT_OBJECT_STORE_MEMORY_PROPORTION``)."""
OBJECT_STORE_CAPPED = 10e9
"""Shared memory, in bytes, above which Ray uses what there is instead of a folder on the disk."""
FILES_ON_A_HEAD = 65_536
"""Open files that Ray's manual asks for on the head of a large cluster, and to which Ray raises the soft limit."""
FILES_WANTED = 8_192
"""Open files that Ray recommends everywhere."""
FILES_AT_REST, FILES_PER_PROCESS = 64, 3
"""Open files of GCS and raylet without work, and what a process more adds to them; measured with Ray 2.60."""
PROCESSES_BESIDE = 16
"""Processes of a search beside those that Ray starts for every CPU: trials, their controllers, readers of images."""
SPILL_STOPS = 0.95
"""Share of a disk above which Ray spills no objects to it any more (``local_fs_capacity_threshold``)."""


def memory_bytes() -> int:
    """Memory of this machine, or of the container that it is."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])


def shared_memory_finding(memory: int, folder: Path = Path("/dev/shm")) -> Finding:
    """Whether Ray's object store fits into shared memory.

    Args:
        memory: Memory of the node, in bytes.
        folder: Where shared memory is.
    """
    name = "shared memory"
    if not sys.platform.startswith("linux"):
        return Finding(name, "ok", "Ray keeps objects in files on this system")
    try:
        shared = os.statvfs(folder)
    except OSError as error:
        fix = "mount a tmpfs there (mount -t tmpfs tmpfs /dev/shm); Ray does not start without it"
        return Finding(name, "fail", f"{folder} cannot be read ({error.strerror})", fix)
    free, wanted = shared.f_frsize * shared.f_bavail, OBJECT_STORE_SHARE * memory
    text = f"{bytes_in_words(free)} free in {folder}, Ray's object store takes up to {bytes_in_words(wanted)}"
    if free >= min(wanted, OBJECT_STORE_CAPPED):
        return Finding(name, "ok", text)
    fix = f"enlarge it (mount -o remount,size=40% {folder}; of a container: --shm-size={wanted * 1.1 / 2**30:.0f}g)"
    return Finding(name, "warn", f"{text}, and so would lie on the disk, which is slow", fix)


def open_files_finding(limit: int, cpus: int) -> Finding:
    """Whether Ray's processes may open as many files and sockets as they need.

    Args:
        limit: What the hard limit allows; Ray raises the soft one to it.
        cpus: CPUs of the machine.
    """
    needed = FILES_AT_REST + FILES_PER_PROCESS * (cpus + PROCESSES_BESIDE)
    text = f"a process may open {limit:,} files"
    fix = (
        f"raise the hard limit: nofile {FILES_ON_A_HEAD} in /etc/security/limits.conf, LimitNOFILE= of a service, "
        f"--ulimit nofile={FILES_ON_A_HEAD}:{FILES_ON_A_HEAD} of a container"
    )
    if limit < needed:
        return Finding("open files", "fail", f"{text}; Ray needs some {needed:,} on {cpus} CPUs", fix)
    if limit < FILES_WANTED:
        return Finding("open files", "warn", f"{text}; Ray recommends {FILES_WANTED:,}", fix)
    hint = "" if limit >= FILES_ON_A_HEAD else f"; the head of a large cluster needs {FILES_ON_A_HEAD:,}"
    return Finding("open files", "ok", text + hint)


def open_files_limit() -> int:
    """The hard limit of open files of a process."""
    import resource  # not on every system

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def local_disk_finding(checkpoint: int, folder: Path | None = None) -> Finding:
    """Whether a node's own disk holds what passes through it: a checkpoint, and the objects that Ray spills.

    Args:
        checkpoint: Size of a checkpoint, in bytes, which is written here before it is moved to the storage path.
        folder: Where temporary files are (None: where Python puts them).
    """
    folder = folder or Path(tempfile.gettempdir())
    disk = shutil.disk_usage(folder)
    text = f"{bytes_in_words(disk.free)} free of {bytes_in_words(disk.total)} in {folder}"
    fix = f"make room in {folder}, or point TMPDIR and RAY_TMPDIR to a larger disk"
    if disk.free < checkpoint:
        return Finding("local disk", "fail", f"{text}; a checkpoint takes {bytes_in_words(checkpoint)}", fix)
    if disk.free < (1 - SPILL_STOPS) * disk.total:
        return Finding("local disk", "warn", f"{text}; above {SPILL_STOPS:.0%} full Ray spills no objects to it", fix)
    return Finding("local disk", "ok", text)


def machine_findings(checkpoint: int) -> list[Finding]:
    """What there is to say of the machine that this process runs on.

    Args:
        checkpoint: Size of a checkpoint, in bytes.
    """
    return [
        shared_memory_finding(memory_bytes()),
        open_files_finding(open_files_limit(), os.cpu_count() or 1),
        local_disk_finding(checkpoint),
    ]
