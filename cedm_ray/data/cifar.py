"""CIFAR-10 and CIFAR-100, training or test split, from any of the official archives or their unpacked folders."""

import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from cedm_ray.data import class_names
from cedm_ray.data.cifar_files import RESOLUTION, Batch, CifarLayout, read_archive, read_binary, read_file, read_python
from cedm_ray.data.sources import ArraySource
from cedm_ray.errors import UserError

Split = Literal["train", "test"]

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_PROBE_TIMEOUT_S = 15

CIFAR10 = CifarLayout(
    name="cifar10",
    class_names=class_names.CIFAR10,
    num_superclasses=None,
    images_per_file=10_000,
    binary_folder="cifar-10-batches-bin",
    binary_archive="cifar-10-binary.tar.gz",
    binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
    binary_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    label_bytes=1,
    python_folder="cifar-10-batches-py",
    python_archive="cifar-10-python.tar.gz",
    python_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    python_label_key=b"labels",
    python_superclass_key=b"",
)
CIFAR100 = CifarLayout(
    name="cifar100",
    class_names=class_names.CIFAR100,
    num_superclasses=20,
    images_per_file=50_000,
    binary_folder="cifar-100-binary",
    binary_archive="cifar-100-binary.tar.gz",
    binary_md5="03b5dce01913d631647c71ecec9e9cb8",
    binary_files=("train.bin",),
    label_bytes=2,
    python_folder="cifar-100-python",
    python_archive="cifar-100-python.tar.gz",
    python_files=("train",),
    python_label_key=b"fine_labels",
    python_superclass_key=b"coarse_labels",
)


def of_split(layout: CifarLayout, split: Split) -> CifarLayout:
    """The files of one split: of ``train`` the layout as it stands, of ``test`` that of the 10,000 test images.

    Raises:
        ValueError: Of any other split.
    """
    if split == "train":
        return layout
    if split != "test":
        raise ValueError(f"split is {split!r}; it must be 'train' or 'test'")
    binary, python = ("test_batch.bin", "test_batch") if layout.num_superclasses is None else ("test.bin", "test")
    return replace(
        layout, name=f"{layout.name}-test", images_per_file=10_000, binary_files=(binary,), python_files=(python,)
    )


def open_cifar(layout: CifarLayout, data_dir: Path, *, download: bool = True) -> ArraySource:
    """The images of CIFAR-10 (``CIFAR10``) or CIFAR-100 (``CIFAR100``), in the official order.

    Looks in ``data_dir`` for the unpacked binary files, their archive, the unpacked python files and their archive,
    in that order, and downloads the binary archive when none is there. Archives are read in memory; nothing is
    written from them to the disk. The python files are pickles: they are read by ``safe_pickle``, which looks up
    and calls no code, so that a forged file cannot run anything.

    Args:
        layout: Which dataset, and which split of it: as it stands here the training images.
        data_dir: Folder that holds (or will hold) the official files.
        download: Whether to fetch the archive (162 MB, checked by its MD5) when it is missing.

    Returns:
        50,000 (10,000) colour images of 32x32 pixels with their labels, for CIFAR-100 the fine ones, and its coarse
        ones as superclasses; the fingerprint depends on pixels and labels, not on the edition.

    Raises:
        UserError: If the files are missing, incomplete, damaged or forged; it names the file.
    """
    batches = _find(layout, data_dir)
    if batches is None and download:
        _download(layout, data_dir)
        batches = _find(layout, data_dir)
    if batches is None:
        raise UserError(f"{layout.name} is not in {data_dir}: {_way_out(layout)}")
    images = np.concatenate([batch.pixels.reshape(-1, 3, RESOLUTION, RESOLUTION) for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    coarse = [batch.superclasses for batch in batches if batch.superclasses is not None]
    return ArraySource(
        layout.name,
        "1",
        images,
        labels,
        layout.num_classes,
        superclasses=(np.concatenate(coarse), layout.num_superclasses) if layout.num_superclasses else None,
        class_names=layout.class_names,
    )


def _way_out(layout: CifarLayout) -> str:
    return (
        f"put {layout.binary_archive} or {layout.python_archive} there, or the unpacked folder "
        f"{layout.binary_folder} or {layout.python_folder}, or name the folder that has one of them with --data-dir"
    )


def _find(layout: CifarLayout, data_dir: Path) -> list[Batch] | None:
    def binary(data: bytes, where: str) -> Batch:
        return read_binary(layout, data, where)

    def python(data: bytes, where: str) -> Batch:
        return read_python(layout, data, where)

    editions: list[tuple[str, str, tuple[str, ...], Callable[[bytes, str], Batch]]] = [
        (layout.binary_folder, layout.binary_archive, layout.binary_files, binary),
        (layout.python_folder, layout.python_archive, layout.python_files, python),
    ]
    for folder, archive, names, reader in editions:
        if (data_dir / folder).is_dir():
            return [reader(read_file(data_dir / folder / name), str(data_dir / folder / name)) for name in names]
        if (data_dir / archive).is_file():
            members = read_archive(data_dir / archive, names)
            return [reader(members[name], f"{name} in {data_dir / archive}") for name in names]
    return None


def _download(layout: CifarLayout, data_dir: Path) -> None:
    url = f"{CIFAR_URL}{layout.binary_archive}"
    try:
        # torchvision's helper waits for ever where a firewall swallows packets, so knock first.
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_TIMEOUT_S).close()
        from torchvision.datasets.utils import download_url

        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as partial:
            download_url(url, partial, layout.binary_archive, layout.binary_md5)
            os.replace(Path(partial) / layout.binary_archive, data_dir / layout.binary_archive)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{layout.name} is not in {data_dir} and {url} cannot be fetched ({error}): {_way_out(layout)}"
        ) from error
