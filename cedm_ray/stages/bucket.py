"""A bucket as the storage path: its objects, and the files of which a node has a copy.

The copy of ``s3://bucket/prefix`` lies in a folder whose path ends in ``s3:/bucket/prefix``, so that a path says by
itself where its original is, in every process; of a path without ``s3:`` all of this does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException, fs

from cedm_ray.data.filesystems import knock, unreachable
from cedm_ray.data.storage import BUCKET_PART
from cedm_ray.errors import UserError

_PIECE = 16 * 2**20  # bytes that one request asks for
THREADS = 8


def place(path: Path) -> str | None:
    """``bucket/prefix/...`` of a path in the copy of a bucket; None for any other path."""
    parts = path.parts
    return "/".join(parts[parts.index(BUCKET_PART) + 1 :]) if BUCKET_PART in parts else None


def address(path: Path) -> str:
    """Where Ray keeps what belongs to a path: in the bucket, or at the path itself."""
    found = place(path)
    return str(path) if found is None else f"s3://{found}"


def copy_id(root: Path) -> str:
    """What tells this machine's copy of a storage path from those of others."""
    file = root / ".copy"
    if not file.is_file():
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex)
    return file.read_text()


def forget_files(folder: Path) -> None:
    """Remove everything below a folder from the bucket, and nothing here."""
    target = place(folder)
    if target is not None:
        drop(target)


def keep_file(file: Path) -> None:
    """Copy a file, which may change later, into the bucket."""
    target = place(file)
    if target is not None:
        with asking(file, "written"):
            upload(file, target)


def keep_files(folder: Path, last: str | None = None) -> None:
    """Copy the files of a folder, which may change later, into the bucket; one by name after all others."""
    if place(folder) is None:
        return
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(keep_file, (file for file in files if file.name != last)))
    if last is not None:
        keep_file(folder / last)


def fetch_files(folder: Path, names: Collection[str] | None = None, *, fresh: bool = False) -> None:
    """Bring files below a folder from the bucket.

    Args:
        folder: Of which the files are.
        names: Paths from there (None: all that there are).
        fresh: Also those that are here in the same size.

    Raises:
        UserError: If the store does not answer.
    """
    if place(folder) is None:
        return
    sizes = {folder / name: info.size for name, info in listed(folder).items() if names is None or name in names}
    missing = [file for file, size in sizes.items() if fresh or not file.is_file() or file.stat().st_size != size]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch_file, missing))


def follow(folder: Path, mark: str) -> None:
    """Do in the bucket what was done here to folders that are kept there: what is new first, then what is gone.

    Args:
        folder: The folder with these folders.
        mark: A file that each of them has here when it is whole; others are left alone.
    """
    if place(folder) is None:
        return
    there = {name: info for name, info in listed(folder).items() if (folder / name.split("/")[0] / mark).is_file()}
    for file in sorted(folder.glob("*/*")):
        info = there.get(file.relative_to(folder).as_posix())
        if file.is_file() and (file.parent / mark).is_file() and (info is None or info.size != file.stat().st_size):
            keep_file(file)
    for name in there:
        if not (folder / name).is_file():
            remove_object(folder / name)


def look_for(file: Path) -> Path:
    """The same path, when a small file has been brought from the bucket, if it is there and not here."""
    if place(file) is not None and not file.is_file():
        data = read_object(file)
        if data is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    return file


def fetch_file(file: Path) -> None:
    """Bring one file from the bucket in place of what is here.

    Raises:
        UserError: If the bucket does not have it, or does not answer.
    """
    source = place(file)
    if source is None:
        return
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with asking(file, "read"):
            download(source, scratch)
            scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def listed(folder: Path) -> dict[str, fs.FileInfo]:
    """What the bucket has below a folder, by path from there; one request for a thousand objects.

    Raises:
        UserError: If the store does not answer.
    """
    target = place(folder)
    if target is None:
        return {}
    with asking(folder, "read"):
        found = filesystem_of(target).get_file_info(fs.FileSelector(target, allow_not_found=True, recursive=True))
    names = {info.path.removeprefix(f"{target}/"): info for info in found if info.type == fs.FileType.File}
    return {name: info for name, info in names.items() if is_inside(name)}


def exists(file: Path) -> bool:
    """Whether the bucket has this object."""
    target = place(file)
    if target is None:
        return False
    with asking(file, "read"):
        return bool(filesystem_of(target).get_file_info(target).type == fs.FileType.File)


def read_object(file: Path) -> bytes | None:
    """What the bucket has of a file, or None.

    Raises:
        UserError: If the store does not answer.
    """
    target = place(file)
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
    target = place(file)
    if target is not None:
        with asking(file, "written"), filesystem_of(target).open_output_stream(target) as remote:
            remote.write(data)


def remove_object(file: Path) -> None:
    """Remove an object, if it is there."""
    target = place(file)
    if target is not None:
        with asking(file, "written"), contextlib.suppress(FileNotFoundError):
            filesystem_of(target).delete_file(target)


def refuse_if_unwritable(root: Path) -> None:
    """Write, read and remove an object below the storage path.

    Raises:
        UserError: If one of that is not possible.
    """
    if place(root) is None:
        return
    knock(address(root), address(root))
    probe = root / f".writable-{uuid.uuid4().hex}"
    write_object(probe, b"x")
    if read_object(probe) != b"x":
        raise UserError(f"{address(root)} does not give back what is written to it; name another --storage-path")
    remove_object(probe)


@functools.lru_cache(maxsize=8)
def _opened(bucket: str) -> fs.FileSystem:
    # Kept, for credentials and connections take longer than a request; small objects go in one request, not in three.
    return fs.FileSystem.from_uri(f"s3://{bucket}?allow_delayed_open=true")[0]


def filesystem_of(target: str) -> fs.FileSystem:
    return _opened(target.split("/")[0])


@contextlib.contextmanager
def asking(path: Path, doing: str) -> Iterator[None]:
    """Turns what the store's client says into one line; what this machine's disk says stays what it is."""
    try:
        yield
    except (OSError, ArrowException) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, FileNotFoundError):
            raise
        raise unreachable(address(path), error, doing) from error


def upload(file: Path, target: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as local, filesystem_of(target).open_output_stream(target) as remote:
        while piece := local.read(_PIECE):
            digest.update(piece)
            remote.write(piece)
        return {"size": local.tell(), "sha256": digest.hexdigest()}


def download(source: str, file: Path) -> None:
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


def drop(target: str) -> None:
    with contextlib.suppress(OSError, ArrowException):  # it is in nobody's way
        filesystem_of(target).delete_dir(target)
