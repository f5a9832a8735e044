"""A bucket as the storage path: which of its objects a path stands for, and what can be asked of the store.

The copy of ``s3://bucket/prefix`` lies in a folder whose path ends in ``s3:/bucket/prefix``, so that a path says by
itself where its original is, in every process; of a path without ``s3:`` all of this does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException, fs

from cedm_ray.data.filesystems import knock, unreachable
from cedm_ray.data.storage import BUCKET_PART
from cedm_ray.errors import UserError

_PIECE = 16 * 2**20  # bytes that one request asks for
THREADS = 8
"""Requests at once."""


def bucket_key(path: Path) -> str | None:
    """``bucket/prefix/...`` of a path in the copy of a bucket; None for any other path."""
    parts = path.parts
    return "/".join(parts[parts.index(BUCKET_PART) + 1 :]) if BUCKET_PART in parts else None


def address(path: Path) -> str:
    """Where Ray keeps what belongs to a path: in the bucket, or at the path itself."""
    found = bucket_key(path)
    return str(path) if found is None else f"s3://{found}"


def copy_id(root: Path) -> str:
    """What tells this machine's copy of a storage path from those of others."""
    file = root / ".copy"
    if not file.is_file():
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


def refuse_if_unwritable(root: Path) -> None:
    """Write, read and remove an object below the storage path.

    Raises:
        UserError: If one of that is not possible.
    """
    if bucket_key(root) is None:
        return
    knock(address(root), address(root))
    probe = root / f".writable-{uuid.uuid4().hex}"
    write_object(probe, b"x")
    if read_object(probe) != b"x":
        raise UserError(f"{address(root)} does not give back what is written to it; name another --storage-path")
    remove_object(probe)


def listed(folder: Path) -> dict[str, fs.FileInfo]:
    """What the bucket has below a folder, by path from there; one request for a thousand objects.

    Raises:
        UserError: If the store does not answer.
    """
    target = bucket_key(folder)
    if target is None:
        return {}
    with asking(folder, "read"):
        found = filesystem_of(target).get_file_info(fs.FileSelector(target, allow_not_found=True, recursive=True))
    names = {info.path.removeprefix(f"{target}/"): info for info in found if info.type == fs.FileType.File}
    return {name: info for name, info in names.items() if is_inside(name)}


def exists(file: Path) -> bool:
    """Whether the bucket has this object."""
    target = bucket_key(file)
    if target is None:
        return False
    with asking(file, "read"):
        return bool(filesystem_of(target).get_file_info(target).type == fs.FileType.File)


def read_object(file: Path) -> bytes | None:
    """What the bucket has of a file, or None.

    Raises:
        UserError: If the store does not answer.
    """
    target = bucket_key(file)
    if target is None:
        return None
    with asking(file, "read"):
        try:
            with filesystem_of(target).open_input_file(target) as remote:
                return bytes(remote.read())
        except FileNotFoundError:
            return None


def write_object(file: Path, data: bytes) -> None:
    """Write an object in one request: a reader sees the old one or the new one.

    Raises:
        UserError: If the store does not answer, or refuses.
    """
    target = bucket_key(file)
    if target is not None:
        with asking(file, "written"), filesystem_of(target).open_output_stream(target) as remote:
            remote.write(data)


def remove_object(file: Path) -> None:
    """Remove an object, if it is there."""
    target = bucket_key(file)
    if target is not None:
        with asking(file, "written"), contextlib.suppress(FileNotFoundError):
            filesystem_of(target).delete_file(target)


def drop(target: str) -> None:
    """Remove all objects below ``bucket/prefix``, as far as the store lets itself be asked."""
    with contextlib.suppress(OSError, ArrowException):  # it is in nobody's way
        filesystem_of(target).delete_dir(target)


def upload(file: Path, target: str) -> dict[str, Any]:
    """Copy a file to ``bucket/key``; returns its ``size`` in bytes and its ``sha256``."""
    digest = hashlib.sha256()
    with open(file, "rb") as local, filesystem_of(target).open_output_stream(target) as remote:
        while piece := local.read(_PIECE):
            digest.update(piece)
            remote.write(piece)
        return {"size": local.tell(), "sha256": digest.hexdigest()}


def download(source: str, file: Path) -> None:
    """Copy ``bucket/key`` to a file, a large one in several requests at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with filesystem_of(source).open_input_file(source) as remote, open(file, "wb") as local:
        size = remote.size()
        if size <= _PIECE:
            local.write(remote.read())
            return

        def fetch(start: int) -> None:
            os.pwrite(local.fileno(), remote.read_at(min(_PIECE, size - start), start), start)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, range(0, size, _PIECE)))


def is_inside(name: str) -> bool:
    """Whether a name from the bucket stays in the folder that it is to lie in."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


@contextlib.contextmanager
def asking(path: Path, doing: str) -> Iterator[None]:
    """Turns what the store's client says into one line; what this machine's disk says stays what it is."""
    try:
        yield
    except (OSError, ArrowException) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, FileNotFoundError):
            raise
        raise unreachable(address(path), error, doing) from error


def filesystem_of(target: str) -> fs.FileSystem:
    """The store's client for ``bucket/key``."""
    return _opened(target.split("/")[0])


@functools.lru_cache(maxsize=8)
def _opened(bucket: str) -> fs.FileSystem:
    # Kept, for credentials and connections take longer than a request; small objects go in one request, not in three.
    return fs.FileSystem.from_uri(f"s3://{bucket}?allow_delayed_open=true")[0]
