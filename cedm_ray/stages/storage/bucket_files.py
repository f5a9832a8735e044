"""Files of which a node has a copy and a bucket the original: brought here, and kept there.

Of a path that is in no copy of a bucket all of this does nothing (:mod:`cedm_ray.stages.storage.bucket`).
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cedm_ray.stages.storage.bucket import (
    THREADS,
    asking,
    bucket_key,
    download,
    drop,
    listed,
    read_object,
    remove_object,
    upload,
)
from cedm_ray.weights.whole_file import whole_file


def keep_file(file: Path) -> None:
    """Copy a file, which may change later, into the bucket."""
    target = bucket_key(file)
    if target is not None:
        with asking(file, "written"):
            upload(file, target)


def keep_files(folder: Path, last: str | None = None) -> None:
    """Copy the files of a folder, which may change later, into the bucket; one by name after all others."""
    if bucket_key(folder) is None:
        return
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(keep_file, (file for file in files if file.name != last)))
    if last is not None:
        keep_file(folder / last)


def forget_files(folder: Path) -> None:
    """Remove everything below a folder from the bucket, and nothing here."""
    target = bucket_key(folder)
    if target is not None:
        drop(target)


def fetch_file(file: Path) -> None:
    """Bring one file from the bucket in place of what is here.

    Raises:
        UserError: If the bucket does not have it, or does not answer.
    """
    source = bucket_key(file)
    if source is None:
        return
    with asking(file, "read"), whole_file(file) as partial:
        download(source, partial)


def fetch_files(folder: Path, names: Collection[str] | None = None, *, fresh: bool = False) -> None:
    """Bring files below a folder from the bucket.

    Args:
        folder: Of which the files are.
        names: Paths from there (None: all that there are).
        fresh: Also those that are here in the same size.

    Raises:
        UserError: If the store does not answer.
    """
    if bucket_key(folder) is None:
        return
    sizes = {folder / name: info.size for name, info in listed(folder).items() if names is None or name in names}
    missing = [file for file, size in sizes.items() if fresh or not file.is_file() or file.stat().st_size != size]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch_file, missing))


def look_for(file: Path) -> Path:
    """Bring a small file from the bucket if only the bucket has it; returns the path, which may still not exist."""
    if bucket_key(file) is not None and not file.is_file():
        data = read_object(file)
        if data is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as partial:  # processes of one node may look for it at once
                partial.write_bytes(data)
    return file


def follow(folder: Path, mark: str) -> None:
    """Do in the bucket what was done here to folders that are kept there: what is new first, then what is gone.

    Args:
        folder: The folder with these folders.
        mark: A file that each of them has here when it is whole; others are left alone.
    """
    if bucket_key(folder) is None:
        return
    there = {name: info for name, info in listed(folder).items() if (folder / name.split("/")[0] / mark).is_file()}
    for file in sorted(folder.glob("*/*")):
        info = there.get(file.relative_to(folder).as_posix())
        if file.is_file() and (file.parent / mark).is_file() and (info is None or info.size != file.stat().st_size):
            keep_file(file)
    for name in there:
        if not (folder / name).is_file():
            remove_object(folder / name)
