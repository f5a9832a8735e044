"""From what the user calls a dataset to the images themselves."""

from pathlib import Path
from typing import Literal

from cedm_ray.data.cifar import CIFAR10, CIFAR100, Split, of_split, open_cifar
from cedm_ray.data.digits import digits
from cedm_ray.data.edm_datasets import AFHQ64, FFHQ64, open_edm_dataset
from cedm_ray.data.edm_zip import EdmZip
from cedm_ray.data.folder import FolderSource
from cedm_ray.data.parquet_names import files_in, is_parquet, is_parquet_folder
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError, did_you_mean

KNOWN_DATASETS = {"digits": 8, "cifar10": 32, "cifar100": 32, "ffhq64": 64, "afhq64": 64}
"""Datasets that have a name, and their resolution in pixels."""

TEST_SPLITS = ("cifar10", "cifar100")
"""Datasets that have test images too."""

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_EDM = {each.name: each for each in (FFHQ64, AFHQ64)}
_KINDS = "the path of a folder of images, of a ZIP of images or of Parquet files, or s3:// or gs:// with such a path"


def open_source(
    dataset: str,
    *,
    data_dir: Path,
    resolution: int | None,
    download: bool = True,
    split: Split = "train",
    folder_labels: bool = False,
    image_column: str = "image",
    on_bad_image: Literal["stop", "skip"] = "stop",
) -> ImageSource:
    """The images of a named dataset, a folder, a ZIP, Parquet files or an object store.

    A local folder and a ZIP have the header of each of their images checked at once, unless bad images are to be
    skipped. A folder with ``*.parquet`` files and no image directly in it is taken as Parquet.

    Args:
        dataset: ``digits``, ``cifar10``, ``cifar100``, ``ffhq64``, ``afhq64``; the path of a folder of images, of a ZIP
            in EDM's layout, of a Parquet file or of a folder of them; or a URI: ``s3://``, ``gs://`` (folders of images
            and Parquet) or ``file://`` (a local path). A name goes before a folder of the same name (``./digits`` means
            the folder).
        data_dir: Where the files of named datasets are, or are downloaded to.
        resolution: Side in pixels; needed for folders and Parquet; None is a ZIP's or a named dataset's own.
        download: Whether a missing named dataset may be fetched.
        split: ``test`` for the test images of ``cifar10`` or ``cifar100``.
        folder_labels: Whether the first-level sub-folders of a folder are its classes, and the column ``label`` those
            of Parquet; a ZIP must have labels then. Named datasets and ZIPs have the labels that they have in any case.
        image_column: Column of Parquet that holds the images.
        on_bad_image: ``skip`` leaves the look at the headers out; give it to ``pack`` too.

    Returns:
        The images, in an order that does not change.

    Raises:
        UserError: If the name is unknown, the resolution does not fit, there is no such split, or the images cannot be
            read.
    """
    if split != "train" and dataset not in TEST_SPLITS:
        raise UserError(
            f"split is {split!r}; only {' and '.join(TEST_SPLITS)} have another than train, and {dataset!r} has none"
        )
    if dataset in KNOWN_DATASETS:
        source = _open_named(dataset, data_dir, resolution, download, split, folder_labels)
    elif "://" in dataset:
        source = _open_uri(dataset, resolution, folder_labels, image_column)
    else:
        source = _open_path(dataset, Path(dataset).expanduser(), resolution, folder_labels, image_column)
    if on_bad_image == "stop" and isinstance(source, FolderSource | EdmZip):
        source.check()
    return source


def _open_named(
    dataset: str, data_dir: Path, resolution: int | None, download: bool, split: Split, folder_labels: bool
) -> ImageSource:
    fixed = KNOWN_DATASETS[dataset]
    if resolution not in (None, fixed):
        raise UserError(f"resolution is {resolution}; {dataset} has {fixed}: give --resolution {fixed} or leave it out")
    if dataset == "digits":
        return digits()
    if dataset in _CIFAR:
        return open_cifar(of_split(_CIFAR[dataset], split), data_dir, download=download)
    return open_edm_dataset(_EDM[dataset], data_dir, folder_labels=folder_labels)


def _open_path(dataset: str, path: Path, resolution: int | None, folder_labels: bool, image_column: str) -> ImageSource:
    if dataset and path.is_dir() and not is_parquet_folder(files_in(path)):
        return FolderSource(path, resolution, folder_labels=folder_labels)
    if path.is_file() and path.suffix.lower() == ".zip":
        return EdmZip(path, resolution, need_labels=folder_labels)
    if dataset and (path.is_dir() or (path.is_file() and is_parquet(path.name))):
        from cedm_ray.data.parquet import open_local_parquet  # Arrow takes a while to import

        return open_local_parquet(path, resolution, image_column=image_column, label_column=folder_labels)
    if path.is_file():
        raise UserError(f"dataset {dataset!r} is a file of no known kind; give {_KINDS}")
    hint = did_you_mean(dataset.lower().replace("-", ""), KNOWN_DATASETS)
    raise UserError(f"dataset {dataset!r} is unknown; it must be one of {', '.join(KNOWN_DATASETS)}, or {_KINDS}{hint}")


def _open_uri(uri: str, resolution: int | None, folder_labels: bool, image_column: str) -> ImageSource:
    from cedm_ray.data.filesystems import local_path
    from cedm_ray.data.remote import open_remote

    path = local_path(uri)
    if path is not None:
        return _open_path(str(path), path, resolution, folder_labels, image_column)
    return open_remote(uri, resolution, folder_labels=folder_labels, image_column=image_column)
