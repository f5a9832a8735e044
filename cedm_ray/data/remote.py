"""Folders of images in an object store, through the file systems of Arrow, which Ray Data reads with too."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO

from pyarrow import ArrowException, fs

from cedm_ray.data.classes import classes_of_folders
from cedm_ray.data.encoded import EncodedSource
from cedm_ray.data.filesystems import open_filesystem, unreachable
from cedm_ray.data.images import MAX_FILE_BYTES, SUFFIXES, WAY_OUT, BadImageError, checked_resolution
from cedm_ray.data.parquet import ParquetSource
from cedm_ray.data.parquet_names import is_parquet, is_parquet_folder
from cedm_ray.errors import UserError

_VERSION = "1"  # to be raised when the same objects become other pixels
_THREADS = 32  # that wait for the store; an object takes some 30 ms to come


class RemoteFolder(EncodedSource):
    """The images below a path of an object store, sorted by relative path, as ``FolderSource`` has those of a folder.

    Names that begin with a dot, or lie below one that does, are skipped. An object is read as a whole when its image is
    asked for; only the list of names (and of labels) grows with the number of images. The images are looked at when
    they are read, not before, for every header would be a request.

    Args:
        files: What lies below the path, from ``list_files``; only images count.
        filesystem: The store.
        path: Bucket and folder in it.
        resolution: Side of the images in pixels, 8 to 256 and divisible by 4.
        folder_labels: Whether the first-level sub-folders are classes, numbered in sorted order; else no labels.
        prefix: Stands before a path in messages, for example ``s3://``.

    Raises:
        UserError: If the resolution is missing or out of bounds, there is no image, or an image that needs a label lies
            in no sub-folder.
    """

    def __init__(
        self,
        files: Mapping[str, fs.FileInfo],
        filesystem: fs.FileSystem,
        path: str,
        resolution: int | None,
        *,
        folder_labels: bool = False,
        prefix: str = "",
    ) -> None:
        resolution = checked_resolution(resolution, "a folder of images")
        self._filesystem, self._root, self._prefix = filesystem, path.rstrip("/"), prefix
        names = sorted(name for name in files if name.lower().endswith(SUFFIXES))
        if not names:
            raise UserError(f"{prefix}{path} holds no image; PNG, JPEG and WebP files are looked for below it")
        # As for a local folder, sizes and times stand for the contents.
        digest = hashlib.sha256(f"remote {_VERSION} {resolution}{' labels' if folder_labels else ''}\n".encode())
        for name in names:
            digest.update(f"{name}\0{files[name].size} {files[name].mtime_ns}\n".encode(errors="surrogateescape"))
        super().__init__(
            PurePosixPath(path).name or "folder",
            digest.hexdigest(),
            names,
            resolution,
            classes=classes_of_folders(names, f"{prefix}{path}") if folder_labels else None,
            num_threads=_THREADS,
        )

    def _where(self, name: str) -> str:
        return f"{self._prefix}{self._root}/{name}"

    def _open(self, name: str) -> IO[bytes]:
        try:
            with self._filesystem.open_input_file(f"{self._root}/{name}") as remote:
                if remote.size() > MAX_FILE_BYTES:
                    large = f"is too large: it has over {MAX_FILE_BYTES >> 20} MiB"
                    raise BadImageError(f"{self._where(name)} {large}; remove it, {WAY_OUT}")
                return io.BytesIO(remote.read())
        except (OSError, ArrowException) as error:  # never a BadImageError: a store that fails makes no image bad
            raise unreachable(self._where(name), error) from error


def list_files(filesystem: fs.FileSystem, path: str, prefix: str = "") -> dict[str, fs.FileInfo]:
    """Every file below a path, by its own path from there; names that begin with a dot are left out.

    Raises:
        UserError: If the store does not answer.
    """
    root = path.rstrip("/")
    try:
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except (OSError, ArrowException) as error:
        raise unreachable(f"{prefix}{path}", error) from error
    named = {info.path[len(root) :].lstrip("/"): info for info in found if info.type == fs.FileType.File}
    return {name: info for name, info in named.items() if not any(part.startswith(".") for part in name.split("/"))}


def open_remote(
    uri: str, resolution: int | None, *, folder_labels: bool = False, image_column: str = "image"
) -> RemoteFolder | ParquetSource:
    """What lies at ``s3://bucket/path`` or ``gs://bucket/path``: Parquet, as a file or a folder, or a folder of images.

    A folder is Parquet where ``*.parquet`` files and no images lie directly in it.

    Raises:
        UserError: As ``open_filesystem`` and the two sources do, and of any other file.
    """
    filesystem, info, prefix = open_filesystem(uri)
    files = {info.base_name: info}
    if info.type != fs.FileType.File:
        files = list_files(filesystem, info.path, prefix)
    direct = [name for name in files if "/" not in name]
    if is_parquet_folder(direct):
        return ParquetSource(
            [files[name] for name in sorted(filter(is_parquet, direct))],
            filesystem,
            resolution,
            image_column=image_column,
            label_column=folder_labels,
            name=PurePosixPath(info.path).stem,
            prefix=prefix,
        )
    if info.type == fs.FileType.File:
        raise UserError(
            f"{prefix}{info.path} is a file of no kind that is read from afar; give a folder of images or Parquet, or "
            "copy the file to a local disk"
        )
    return RemoteFolder(files, filesystem, info.path, resolution, folder_labels=folder_labels, prefix=prefix)
