import io
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from cedm_ray.data.registry import open_source
from cedm_ray.errors import UserError


def test_names_and_folders_open(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert open_source("digits", data_dir=tmp_path, resolution=None).resolution == 8
    assert open_source("digits", data_dir=tmp_path, resolution=8).num_classes == 10
    assert open_source(str(tmp_path), data_dir=tmp_path, resolution=16).resolution == 16


@pytest.mark.parametrize(
    ("dataset", "resolution", "message"),
    [
        (
            "digit",
            None,
            r"one of digits, cifar10, cifar100, ffhq64, afhq64, or the path of a folder .*; did you mean digits",
        ),
        ("CIFAR-10", None, "did you mean cifar10"),
        ("", None, "unknown"),
        ("/nowhere/at/all", 64, "unknown"),
        ("digits", 16, "resolution is 16; digits has 8: give --resolution 8 or leave it out"),
        ("cifar100", 64, "give --resolution 32"),
        (__file__, 64, "is a file of no known kind; give the path of a folder of images, of a ZIP of images or of"),
        ("FFHQ-64", None, "did you mean ffhq64"),
        ("ffhq64", 32, "resolution is 32; ffhq64 has 64"),
        (
            "ffhq64",
            None,
            r"get the images from https://\S+/ffhq-dataset, make ffhq-64x64\.zip .*dataset_tool.*--data-dir",
        ),
        ("afhq64", None, r"get the images from https://\S+/stargan-v2, make afhqv2-64x64\.zip"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_way_out(
    dataset: str, resolution: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_source(dataset, data_dir=tmp_path, resolution=resolution, download=False)


def test_a_folder_is_checked_when_it_is_opened(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too small"):
        open_source(str(tmp_path), data_dir=tmp_path, resolution=32)


@pytest.mark.parametrize("dataset", ["digits", "ffhq64", "."])
def test_only_cifar_has_a_test_split(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split is 'test'; only cifar10 and cifar100 have another than train"):
        open_source(dataset, data_dir=tmp_path, resolution=None, split="test")


def test_the_test_split_of_cifar_is_looked_for_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(bytes(3074 * 10_000))
    source = open_source("cifar100", data_dir=tmp_path, resolution=None, split="test", download=False)
    level = source.superclasses()
    assert (len(source), source.name, level is not None and level[1]) == (10_000, "cifar100-test", 20)
    names = source.class_names()
    assert names is not None and len(names) == source.num_classes == 100


def square_zip(path: Path, side: int, count: int = 3) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (side, side), (i, 0, 0)).save(file, "png")
            archive.writestr(f"00000/img{i:08d}.png", file.getvalue())


@pytest.mark.parametrize(("dataset", "archive"), [("ffhq64", "ffhq-64x64"), ("afhq64", "afhqv2-64x64")])
def test_ffhq_and_afhq_are_found_as_an_archive_or_as_a_folder(dataset: str, archive: str, tmp_path: Path) -> None:
    for folder in (archive, dataset):  # each goes before the last
        (tmp_path / folder).mkdir()
        for i in range(2 if folder == dataset else 1):
            Image.new("RGB", (80, 64)).save(tmp_path / folder / f"{i}.png")
        source = open_source(dataset, data_dir=tmp_path, resolution=None)
        assert (len(source), source.name, source.resolution) == (2 if folder == dataset else 1, dataset, 64)
    square_zip(tmp_path / f"{archive}.zip", 64)
    source = open_source(dataset, data_dir=tmp_path, resolution=64)
    assert (len(source), source.name, source.resolution) == (3, dataset, 64)
    with pytest.raises(UserError, match="holds no labels"):
        open_source(dataset, data_dir=tmp_path, resolution=64, folder_labels=True)


def test_every_kind_of_path_opens(tmp_path: Path) -> None:
    def shape(dataset: Path, resolution: int | None = 16, **options: Any) -> tuple[object, ...]:
        source = open_source(str(dataset), data_dir=tmp_path, resolution=resolution, **options)
        return len(source), source.resolution, source.num_classes

    square_zip(tmp_path / "a.ZIP", 24)
    assert shape(tmp_path / "a.ZIP") == (3, 16, None)
    assert shape(tmp_path / "a.ZIP", None) == (3, 24, None)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "a.ZIP") as archive:
        archive.extractall(tmp_path / "images" / "cat")
        encoded = [archive.read(name) for name in archive.namelist()]
    assert shape(tmp_path / "images", folder_labels=True) == (3, 16, 1)
    (tmp_path / "tables").mkdir()
    for i in range(2):
        frame = pd.DataFrame({"picture": encoded, "label": [0, 1, 4]})
        frame.to_parquet(tmp_path / "tables" / f"{i}.parquet")
    assert shape(tmp_path / "tables" / "0.parquet", image_column="picture", folder_labels=True) == (3, 16, 5)
    assert shape(tmp_path / "tables", image_column="picture") == (6, 16, None)
    for name in ("old.parquet", "photo.png"):  # folders; files alone say what a folder is
        (tmp_path / "tables" / name).mkdir()
    (tmp_path / "tables" / ".hidden.png").write_bytes(b"")
    assert shape(tmp_path / "tables", image_column="picture") == (6, 16, None)
    Image.new("RGB", (16, 16)).save(tmp_path / "tables" / "an_image.png")
    assert shape(tmp_path / "tables") == (1, 16, None)  # a folder of images, with tables in it
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.hidden\.parquet' is a file of no known kind"):
        shape(tmp_path / ".hidden.parquet")


def test_an_archive_is_checked_when_it_is_opened_unless_bad_images_are_skipped(tmp_path: Path) -> None:
    square_zip(tmp_path / "a.zip", 16)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("0.png", b"no image")
    with pytest.raises(UserError, match=r"^0\.png in .*a\.zip is no readable"):
        open_source(str(tmp_path / "a.zip"), data_dir=tmp_path, resolution=None)
    source = open_source(str(tmp_path / "a.zip"), data_dir=tmp_path, resolution=None, on_bad_image="skip")
    assert (len(source), source.resolution) == (4, 16)
