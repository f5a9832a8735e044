"""From what the user calls a dataset to the images themselves."""

import difflib
from pathlib import Path

from cedm_ray.data.cifar import CIFAR10, CIFAR100, open_cifar
from cedm_ray.data.digits import digits
from cedm_ray.data.folder import FolderSource
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError

KNOWN_DATASETS = {"digits": 8, "cifar10": 32, "cifar100": 32}
"""Datasets that have a name, and their resolution in pixels."""


def open_source(dataset: str, *, data_dir: Path, resolution: int | None, download: bool = True) -> ImageSource:
    """The images of a named dataset or of a folder.

    A folder has the header of each of its images checked at once.

    Args:
        dataset: ``digits``, ``cifar10``, ``cifar100``, or the path of a folder of images. A name goes before a folder
            of the same name (``./digits`` means the folder).
        data_dir: Where the files of named datasets are, or are downloaded to.
        resolution: Side in pixels; needed for a folder; for a named dataset None or its own.
        download: Whether a missing named dataset may be fetched.

    Returns:
        The images, in an order that does not change.

    Raises:
        UserError: If the name is unknown, the resolution does not fit, or the images cannot be read.
    """
    fixed = KNOWN_DATASETS.get(dataset)
    if fixed is None:
        return _open_folder(dataset, resolution)
    if resolution not in (None, fixed):
        raise UserError(f"resolution is {resolution}; {dataset} has {fixed}: give --resolution {fixed} or leave it out")
    if dataset == "digits":
        return digits()
    return open_cifar(CIFAR10 if dataset == "cifar10" else CIFAR100, data_dir, download=download)


def _open_folder(dataset: str, resolution: int | None) -> ImageSource:
    path = Path(dataset).expanduser()
    if path.is_file():
        raise UserError(f"dataset {dataset!r} is a file; give the path of a folder of images")
    if not dataset or not path.is_dir():
        close = difflib.get_close_matches(dataset.lower().replace("-", ""), KNOWN_DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"dataset {dataset!r} is unknown; it must be one of {', '.join(KNOWN_DATASETS)}, "
            f"or the path of a folder of images{hint}"
        )
    source = FolderSource(path, resolution)
    source.check()
    return source
