"""Entries of the store in a bucket: kept whole, by a mark that comes last, and fetched by the nodes that need them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cedm_ray.stages.storage.bucket import (
    THREADS,
    asking,
    bucket_key,
    download,
    drop,
    is_inside,
    read_object,
    remove_object,
    upload,
    write_object,
)

MARK = "entry.json"
"""What makes a folder of the bucket an entry: it is written last, and names the files with their sizes and hashes."""
FACTS = "facts.json"


def here(file: Path) -> Path:
    """Bring the entry that a file belongs to onto this node, unless it is here; returns the same path.

    Raises:
        UserError: If the store does not answer.
    """
    if bucket_key(file) is not None and not (file.parent / FACTS).is_file():
        fetch_entry(file.parent)
    return file


def keep_entry(folder: Path, made: Path | None = None) -> bool:
    """Copy a finished folder into the bucket, unless the bucket has it.

    The files go below a name of their own, and the mark is one object: whoever looks sees the entry of one process,
    whole, or none. What a process that was killed has left is never looked at.

    Args:
        folder: The entry.
        made: Where its files are (None: there).

    Returns:
        False where the bucket has the entry of another process, which is the one that counts.

    Raises:
        UserError: If the store does not answer.
    """
    target = bucket_key(folder)
    if target is None:
        return True
    if read_object(folder / MARK) is not None:
        return False
    part, made = uuid.uuid4().hex, made or folder
    files = [file for file in sorted(made.rglob("*")) if file.is_file()]
    names = [file.relative_to(made).as_posix() for file in files]
    with asking(folder, "written"), ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(lambda file, name: upload(file, f"{target}/{part}/{name}"), files, names)
        mark = {"part": part, "files": dict(zip(names, sums, strict=True))}
    if read_object(folder / MARK) is not None:  # another process was quicker with the same thing
        drop(f"{target}/{part}")
        return False
    write_object(folder / MARK, json.dumps(mark).encode())
    return True


def fetch_entry(folder: Path) -> bool:
    """Bring an entry from the bucket to this node, compared with its mark byte by byte.

    Processes of one node take turns, so that one of them fetches. An entry whose files are not what the mark says is
    set aside in the bucket: it counts as missing from then on, and is made again.

    Returns:
        Whether it is here now.

    Raises:
        UserError: If the store does not answer.
    """
    if bucket_key(folder) is None:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data: bytes | None = None
        for _ in range(2):  # an entry that was replaced in the middle has another mark now
            data = read_object(folder / MARK)
            if data is None:
                return False
            mark = _mark(data)
            if mark is not None and (_has(folder, mark) or _fetch(folder, mark)):
                return True
        write_object(folder / f"broken-{uuid.uuid4().hex}.json", data or b"")
        remove_object(folder / MARK)
    return False


def _fetch(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Whether all files of an entry could be brought here as they were kept."""
    scratch, files = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}"), mark["files"]
    source = f"{bucket_key(folder)}/{mark['part']}"
    try:
        with asking(folder, "read"), ThreadPoolExecutor(THREADS) as pool:
            try:
                list(pool.map(lambda name: download(f"{source}/{name}", scratch / name), files))
            except FileNotFoundError:
                return False
        if any(_sums(scratch / name) != kept for name, kept in files.items()):
            return False
        shutil.rmtree(folder, ignore_errors=True)  # not whole, or it would not have been asked for
        scratch.rename(folder)
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sums(file: Path) -> dict[str, Any]:
    with open(file, "rb") as local:
        return {"size": os.fstat(local.fileno()).st_size, "sha256": hashlib.file_digest(local, "sha256").hexdigest()}


def _mark(data: bytes | None) -> dict[str, Any] | None:
    """A mark, if it is one: a bucket may be written to by others."""
    try:
        mark = json.loads(data or b"")
        whole = all(is_inside(name) and kept["size"] >= 0 and kept["sha256"] for name, kept in mark["files"].items())
        return mark if whole and is_inside(mark["part"]) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _has(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Whether another process of this node has fetched the entry in the meantime."""
    files = {name: folder / name for name in mark["files"]}
    return all(file.is_file() and file.stat().st_size == mark["files"][name]["size"] for name, file in files.items())
