import errno
import io
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cedm_ray.data.edm_zip import EdmZip
from cedm_ray.data.folder import FolderSource
from cedm_ray.data.images import BadImageError
from cedm_ray.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
LABELS = [3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png", compress_level=0, optimize=False)
    return file.getvalue()


def name_of(i: int) -> str:
    return f"{i // 5:05d}/img{i:08d}.png"


def write(path: Path, members: dict[str, bytes], content: object = None, method: int = zipfile.ZIP_STORED) -> Path:
    """As EDM's tool writes a dataset: uncompressed PNGs of a thousand (here five) to a folder, then dataset.json."""
    with zipfile.ZipFile(path, "w", compression=method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if content is not None:
            archive.writestr("dataset.json", json.dumps(content))
    return path


def edm(path: Path, labels: list[int] | None = LABELS, pixels: np.ndarray = PIXELS) -> Path:
    pairs = None if labels is None else [[name_of(i), label] for i, label in enumerate(labels)]
    return write(path, {name_of(i): png(image) for i, image in enumerate(pixels)}, {"labels": pairs})


def test_an_archive_of_edm_comes_back_bit_for_bit_with_its_labels(tmp_path: Path) -> None:
    source = EdmZip(edm(tmp_path / "cifar10-16x16.zip"))
    source.check()
    np.testing.assert_array_equal(source.read(0, 12), PIXELS.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.read(4, 7), PIXELS[4:7].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.labels(), LABELS)
    assert (source.name, source.resolution, source.channels) == ("cifar10-16x16", 16, 3)
    assert (source.num_classes, source.class_names(), source.superclasses()) == (4, None, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10-16x16.zip"]  # nothing was extracted
    with pytest.raises(IndexError):
        source.read(0, 13)


def test_images_are_sorted_by_name_and_labels_go_with_the_names(tmp_path: Path) -> None:
    members = {name: png(PIXELS[i]) for i, name in enumerate(["b/2.png", "b/10.png", "a.png", "B.png"])}
    content = {"labels": [["a.png", 2], ["B.png", 3], ["b/2.png", 0], ["b/10.png", 1], ["gone.png", 9]]}
    source = EdmZip(write(tmp_path / "x.zip", members, content))
    order = [3, 2, 1, 0]  # B.png a.png b/10.png b/2.png
    np.testing.assert_array_equal(source.read(0, 4), PIXELS[order].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(source.labels(), [3, 2, 1, 0])


@pytest.mark.parametrize("labels", ["null", "no file"])
def test_an_archive_without_labels_has_none(labels: str, tmp_path: Path) -> None:
    path = edm(tmp_path / "x.zip", None) if labels == "null" else write(tmp_path / "x.zip", {"a.png": png(PIXELS[0])})
    assert EdmZip(path).labels() is None and EdmZip(path).num_classes is None
    with pytest.raises(UserError, match=r"x\.zip holds no labels .*leave --folder-labels out"):
        EdmZip(path, need_labels=True)


def test_grey_images_keep_their_one_channel(tmp_path: Path) -> None:
    source = EdmZip(edm(tmp_path / "mnist.zip", pixels=PIXELS[..., 0]))
    assert source.channels == 1
    np.testing.assert_array_equal(source.read(0, 12), PIXELS[:, None, :, :, 0])


def test_other_resolutions_are_made_as_for_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with zipfile.ZipFile(edm(tmp_path / "x.zip")) as archive:
        archive.extractall(folder)
    np.testing.assert_array_equal(EdmZip(tmp_path / "x.zip", 8).read(0, 12), FolderSource(folder, 8).read(0, 12))
    assert EdmZip(tmp_path / "x.zip", 8).fingerprint != EdmZip(tmp_path / "x.zip").fingerprint
    with pytest.raises(UserError, match=r"resolution is 32; the images of .*x\.zip have 16 pixels: lower --resolution"):
        EdmZip(tmp_path / "x.zip", 32)
    with pytest.raises(UserError, match="resolution is 10; it must lie in"):
        EdmZip(tmp_path / "x.zip", 10)


def test_the_fingerprint_follows_the_contents_and_not_the_place(tmp_path: Path) -> None:
    path = edm(tmp_path / "x.zip")
    (tmp_path / "other").mkdir()
    shutil.copyfile(path, tmp_path / "other" / "y.zip")
    changed = PIXELS.copy()
    changed[3, 5, 5, 0] ^= 1
    keys = [
        EdmZip(path).fingerprint,
        EdmZip(edm(tmp_path / "a.zip", None)).fingerprint,
        EdmZip(edm(tmp_path / "b.zip", LABELS[::-1])).fingerprint,
        EdmZip(edm(tmp_path / "c.zip", pixels=changed)).fingerprint,
    ]
    assert len(set(keys)) == 4
    assert EdmZip(tmp_path / "other" / "y.zip").fingerprint == keys[0]


def test_several_threads_may_read_at_once(tmp_path: Path) -> None:
    source = EdmZip(edm(tmp_path / "x.zip"))
    with ThreadPoolExecutor(8) as pool:
        for i, images in enumerate(pool.map(lambda i: source.read(i % 12, i % 12 + 1), range(240))):
            np.testing.assert_array_equal(images[0], PIXELS[i % 12].transpose(2, 0, 1))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named_with_its_archive(method: int, tmp_path: Path) -> None:
    members = {name_of(i): png(PIXELS[i]) for i in range(3)}
    path = write(tmp_path / "x.zip", members, method=method)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name_of(1)).header_offset
    data = bytearray(path.read_bytes())
    data[offset + 500] ^= 0xFF
    path.write_bytes(data)
    source = EdmZip(path)
    assert source.read(0, 1).shape == source.read(2, 3).shape
    with pytest.raises(BadImageError, match=r"img00000001\.png in .*x\.zip is"):
        source.read(0, 3)


def test_a_disk_that_fails_makes_no_image_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = EdmZip(edm(tmp_path / "x.zip"))

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile.ZipFile, "open", failing)
    said = r"img00000000\.png in .*x\.zip cannot be read \(Input/output error\); try again"
    with pytest.raises(UserError, match=said) as caught:
        source.read_each(0, 12)
    assert not isinstance(caught.value, BadImageError)


def test_of_an_archive_whose_beginning_is_lost_the_rest_is_read(tmp_path: Path) -> None:
    path = edm(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[100:])
    first, *rest = EdmZip(path).read_each(0, 12)
    assert isinstance(first, BadImageError) and "img00000000.png" in str(first)
    np.testing.assert_array_equal(np.stack(rest), PIXELS[1:].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS[0][:8], "is a RGB image of 16x8 pixels, in an archive of RGB images of 16x16|is too small"),
        (np.zeros((20, 16, 3), np.uint8), "is a RGB image of 16x20 pixels"),
        (np.zeros((32, 32, 3), np.uint8), "is a RGB image of 32x32 pixels"),
        (PIXELS[0][..., 0], "is a L image of 16x16 pixels"),
        (np.zeros((16, 16, 4), np.uint8), "is a RGBA image"),
    ],
)
def test_images_of_another_size_or_kind_are_refused(image: np.ndarray, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", {"0.png": png(PIXELS[0]), "1.png": png(image)})
    for look in (EdmZip(path).check, lambda: EdmZip(path).read(0, 2)):
        with pytest.raises(BadImageError, match=rf"^1\.png in .*x\.zip ({message})"):
            look()


def test_an_archive_of_images_that_are_not_square_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", {"0.png": png(np.zeros((20, 16, 3), np.uint8))})
    with pytest.raises(UserError, match=r"0\.png in .* must be square, and grey \(L\) or RGB"):
        EdmZip(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [["0.png", 1]]}, r"dataset\.json in .*x\.zip has no label for 1\.png"),
        ({"labels": [["0.png", 1], ["1.png", -1]]}, r"holds label -1; it must lie in \[0, 100000\)"),
        ({"labels": [["0.png", 1], ["1.png", 10**9]]}, "holds label 1000000000"),
        ({"labels": [["0.png", 1], ["1.png", 10**30]]}, "labels must be whole numbers"),
        ({"labels": [["0.png", 1], ["1.png", 1.5]]}, r"holds label 1\.5; labels must be whole numbers"),
        ({"labels": [["0.png", 1], ["1.png", True]]}, "holds label True"),
        ({"labels": [["0.png", 1], ["1.png", [0, 1]]]}, r"holds label \[0, 1\]"),
        ({"labels": [["0.png"], ["1.png"]]}, "as pairs of a name and a number"),
        ({"labels": 5}, "as pairs of a name and a number"),
        ({"labels": [[["0.png"], 1]]}, "as pairs of a name and a number"),
    ],
)
def test_wrong_labels_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", {f"{i}.png": png(PIXELS[i]) for i in range(2)}, content)
    with pytest.raises(UserError, match=message):
        EdmZip(path)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\xfd", b"[" * 200_000])
def test_a_dataset_json_that_is_none_is_named(text: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", {"0.png": png(PIXELS[0]), "dataset.json": text})
    with pytest.raises(UserError, match=r"dataset\.json in .*x\.zip is no readable JSON"):
        EdmZip(path)


def test_hidden_files_are_skipped_and_an_empty_archive_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", {"__MACOSX/._a.png": b"", ".b/c.png": b"", "readme.txt": b""})
    with pytest.raises(UserError, match="holds no image"):
        EdmZip(path)


@pytest.mark.parametrize("cut", [0, 10, 3000, -1, -30])
def test_an_archive_that_is_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    path = edm(tmp_path / "x.zip")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"x\.zip is no readable ZIP"):
        EdmZip(path)


def test_flipped_bytes_never_raise_anything_but_a_user_error(tmp_path: Path) -> None:
    path = edm(tmp_path / "x.zip", LABELS[:4], PIXELS[:4])
    good, rng = path.read_bytes(), np.random.default_rng(0)
    start = good.index(b"PK\x01\x02")
    spots = [*range(start, len(good)), *range(40), *rng.integers(0, start, 50)]
    failures = 0
    for spot in spots:
        path.write_bytes(good[:spot] + bytes([good[spot] ^ (1 << rng.integers(8))]) + good[spot + 1 :])
        try:
            EdmZip(path).read(0, 4)
        except UserError as error:
            failures += 1
            assert "x.zip" in str(error) and "\n" not in str(error)
        except IndexError:
            pass  # one image fewer: a name that no longer counts
    assert failures > 100
