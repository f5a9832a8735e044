import dataclasses
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision

from cedm_ray.data.cifar import CIFAR10, CIFAR100, of_split, open_cifar
from cedm_ray.data.cifar_files import CifarLayout
from cedm_ray.errors import UserError

TINY10 = dataclasses.replace(CIFAR10, images_per_file=4)
TINY100 = dataclasses.replace(CIFAR100, images_per_file=6)


def tiny_batches(layout: CifarLayout) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    n = layout.images_per_file
    return [
        (rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, layout.num_classes, n))
        for _ in layout.binary_files
    ]


def coarse(labels: np.ndarray) -> np.ndarray:
    """Any rule does, if it is another than that of the fine labels."""
    return (7 * labels + 3) % 20


def binary_bytes(layout: CifarLayout, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    columns = [coarse(labels)] * (layout.label_bytes - 1) + [labels]  # the coarse label of CIFAR-100 comes first
    return np.concatenate([np.stack(columns, 1).astype(np.uint8), pixels], axis=1).tobytes()


def pickle_bytes(layout: CifarLayout, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    content = {b"data": pixels, layout.python_label_key: labels.tolist(), b"coarse_labels": coarse(labels).tolist()}
    return pickle.dumps(content, protocol=2)


def python2_pickle(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """As Python 2 wrote the official files: byte strings as BINSTRING, numpy's old module name."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(b"J" + n.to_bytes(4, "little") for n in pixels.shape) + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + shape + dtype + b"I00\n" + text(pixels.tobytes()) + b"tb"
    )
    items = b"](" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + items + b"u."


def write_edition(
    layout: CifarLayout, data_dir: Path, edition: str, batches: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    binary = edition.startswith("binary")
    folder, archive = (
        (layout.binary_folder, layout.binary_archive) if binary else (layout.python_folder, layout.python_archive)
    )
    names = layout.binary_files if binary else layout.python_files
    encode = binary_bytes if binary else pickle_bytes
    files = {name: encode(layout, *batch) for name, batch in zip(names, batches, strict=True)}
    if edition.endswith("folder"):
        (data_dir / folder).mkdir()
        for name, data in files.items():
            (data_dir / folder / name).write_bytes(data)
        return
    with tarfile.open(data_dir / archive, "w:gz") as tar:
        for name, data in [("readme.html", b"x"), *reversed(files.items())]:
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("layout", [TINY10, TINY100], ids=lambda layout: layout.name)
@pytest.mark.parametrize("edition", ["binary folder", "binary archive", "python folder", "python archive"])
def test_every_edition_gives_the_same_images_in_order(layout: CifarLayout, edition: str, tmp_path: Path) -> None:
    batches = tiny_batches(layout)
    write_edition(layout, tmp_path, edition, batches)
    before = sorted(tmp_path.rglob("*"))
    source = open_cifar(layout, tmp_path, download=False)
    pixels = np.concatenate([p for p, _ in batches]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(source.read(0, len(source)), pixels)
    np.testing.assert_array_equal(source.labels(), np.concatenate([v for _, v in batches]))
    assert (source.resolution, source.channels, source.num_classes) == (32, 3, layout.num_classes)
    level = source.superclasses()
    if layout.name == "cifar10":
        assert level is None
    else:
        assert level is not None and level[1] == 20
        np.testing.assert_array_equal(level[0], coarse(np.concatenate([v for _, v in batches])))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted
    (tmp_path / "other").mkdir()
    write_edition(layout, tmp_path / "other", "binary folder", batches)
    assert open_cifar(layout, tmp_path / "other", download=False).fingerprint == source.fingerprint


def test_a_pickle_of_python_2_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / TINY10.python_folder).mkdir()
    for name, batch in zip(TINY10.python_files, tiny_batches(TINY10), strict=True):
        (tmp_path / TINY10.python_folder / name).write_bytes(python2_pickle(*batch))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    theirs = torchvision.datasets.CIFAR10(str(tmp_path), train=True)
    ours = open_cifar(TINY10, tmp_path, download=False)
    np.testing.assert_array_equal(ours.read(0, 20).transpose(0, 2, 3, 1), theirs.data)
    np.testing.assert_array_equal(ours.labels(), theirs.targets)


def test_a_batch_that_was_pickled_in_fortran_order_gives_the_same_images(tmp_path: Path) -> None:
    batches = [(np.asfortranarray(pixels), labels) for pixels, labels in tiny_batches(TINY10)]
    write_edition(TINY10, tmp_path, "python folder", batches)
    pixels = np.concatenate([p for p, _ in tiny_batches(TINY10)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(open_cifar(TINY10, tmp_path, download=False).read(0, len(pixels)), pixels)


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.name)
@pytest.mark.parametrize("edition", ["binary folder", "binary archive", "python folder", "python archive"])
def test_the_test_split_is_read_from_its_own_file(layout: CifarLayout, edition: str, tmp_path: Path) -> None:
    test = of_split(layout, "test")
    assert (test.images_per_file, of_split(layout, "train")) == (10_000, layout)
    tiny_test, tiny_train = (dataclasses.replace(part, images_per_file=4) for part in (test, layout))
    batches = [(pixels, labels[::-1]) for pixels, labels in tiny_batches(tiny_test)]
    write_edition(tiny_test, tmp_path, edition, batches)
    source = open_cifar(tiny_test, tmp_path, download=False)
    np.testing.assert_array_equal(source.read(0, 4), batches[0][0].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(source.labels(), batches[0][1])
    assert source.name == f"{layout.name}-test"
    with pytest.raises(UserError, match=r"data_batch_1|train"):
        open_cifar(tiny_train, tmp_path, download=False)


def test_files_of_the_test_split_are_called_as_torchvision_calls_them() -> None:
    for layout, theirs in [(CIFAR10, torchvision.datasets.CIFAR10), (CIFAR100, torchvision.datasets.CIFAR100)]:
        assert of_split(layout, "test").python_files == tuple(name for name, _ in theirs.test_list)
        assert layout.python_files == tuple(name for name, _ in theirs.train_list)


def test_classes_are_numbered_alphabetically() -> None:
    for layout, count, some in [(CIFAR10, 10, {3: "cat", 9: "truck"}), (CIFAR100, 100, {19: "cattle", 99: "worm"})]:
        assert len(set(layout.class_names)) == count and list(layout.class_names) == sorted(layout.class_names)
        assert {i: layout.class_names[i] for i in some} == some


class Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


EVILS = [Evil(os.mkdir, "pwned"), Evil(eval, "1"), Evil(np.load, "x"), Evil(getattr, 1, "real")]


@pytest.mark.parametrize("evil", EVILS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_an_evil_pickle_is_refused_before_it_runs(
    evil: Evil, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / TINY100.python_folder
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": evil}, protocol=protocol))
    with pytest.raises(UserError, match=r"cifar-100-python/train asks for .*no CIFAR file needs"):
        open_cifar(TINY100, tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -1])
@pytest.mark.parametrize("edition", ["binary folder", "python folder", "binary archive", "python archive"])
def test_a_file_cut_off_is_named(edition: str, cut: int, tmp_path: Path) -> None:
    write_edition(TINY100, tmp_path, edition, tiny_batches(TINY100))
    path = next(p for p in tmp_path.rglob("*") if p.is_file())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=path.name):
        open_cifar(TINY100, tmp_path)


def test_flipped_bytes_never_raise_anything_but_a_user_error(tmp_path: Path) -> None:
    write_edition(TINY100, tmp_path, "python folder", tiny_batches(TINY100))
    path = tmp_path / TINY100.python_folder / "train"
    good = path.read_bytes()
    spots = [i for i in range(len(good)) if i < 150 or i > len(good) - 150]  # the opcodes; between them lie pixels
    rng = np.random.default_rng(0)
    for spot in spots:
        path.write_bytes(good[:spot] + bytes([rng.integers(256)]) + good[spot + 1 :])
        try:
            open_cifar(TINY100, tmp_path)
        except UserError as error:
            assert "train" in str(error)


def test_a_label_out_of_range_is_refused(tmp_path: Path) -> None:
    pixels, labels = tiny_batches(TINY100)[0]
    write_edition(TINY100, tmp_path, "binary folder", [(pixels, labels + 100)])
    with pytest.raises(UserError, match=r"train\.bin holds label \d+; it must lie in \[0, 100\)"):
        open_cifar(TINY100, tmp_path)
    path = tmp_path / TINY100.binary_folder / "train.bin"
    path.write_bytes(bytes([20]) + binary_bytes(TINY100, pixels, labels)[1:])
    with pytest.raises(UserError, match=r"train\.bin holds label 20; it must lie in \[0, 20\)"):
        open_cifar(TINY100, tmp_path)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    write_edition(TINY10, tmp_path, "binary folder", tiny_batches(TINY10))
    (tmp_path / TINY10.binary_folder / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3\.bin"):
        open_cifar(TINY10, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not the dictionary of a CIFAR file"),
        ({b"data": b"123"}, "does not hold its images as a uint8 matrix"),
        ({b"data": np.zeros((6, 3072), np.float32)}, "does not hold its images as a uint8 matrix"),
        ({b"data": np.zeros(6 * 3072, np.uint8)}, "does not hold its images as a uint8 matrix"),
        ({b"data": np.zeros((5, 3072), np.uint8)}, r"holds images of shape \(5, 3072\); \(6, 3072\) is due"),
        ({b"data": np.zeros((6, 3072), np.uint8)}, "does not hold one whole-number label per image"),
        ({b"data": np.zeros((6, 3072), np.uint8), b"fine_labels": [0.5] * 6}, "one whole-number label per image"),
    ],
)
def test_a_pickle_that_holds_something_else_is_refused(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / TINY100.python_folder).mkdir()
    (tmp_path / TINY100.python_folder / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=message):
        open_cifar(TINY100, tmp_path)


def test_a_pickle_that_asks_for_an_object_kept_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / TINY100.python_folder).mkdir()
    (tmp_path / TINY100.python_folder / "train").write_bytes(b"Pelsewhere\n.")
    with pytest.raises(UserError, match=r"is cut off or damaged .*a persistent id"):
        open_cifar(TINY100, tmp_path)


def test_a_file_larger_than_any_of_cifar_is_not_read(tmp_path: Path) -> None:
    (tmp_path / TINY100.binary_folder).mkdir()
    with (tmp_path / TINY100.binary_folder / "train.bin").open("wb") as file:
        file.truncate(300 * 2**20)  # a hole: takes no room on disk
    with pytest.raises(UserError, match=r"train\.bin has 314572800 bytes, more than any CIFAR file"):
        open_cifar(TINY100, tmp_path)


def test_there_are_two_splits() -> None:
    with pytest.raises(ValueError, match="split is 'valid'; it must be 'train' or 'test'"):
        of_split(CIFAR10, "valid")  # type: ignore[arg-type]


def test_files_that_are_nowhere_are_listed_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz or cifar-10-python\.tar\.gz .*--data-dir"):
        open_cifar(CIFAR10, tmp_path, download=False)


def test_a_download_that_fails_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"cannot be fetched \(no route to host\): put cifar-100-binary"):
        open_cifar(CIFAR100, tmp_path / "data")
    assert not any(tmp_path.rglob("*.gz"))


def test_a_download_is_checked_against_its_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served"
    served.mkdir()
    write_edition(TINY10, served, "binary archive", tiny_batches(TINY10))
    archive = served / TINY10.binary_archive
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(archive.read_bytes()))

    def copy(url: str, filename: str | Path, **_: object) -> None:
        Path(filename).write_bytes(archive.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", copy)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    with pytest.raises(UserError, match="cannot be fetched"):
        open_cifar(TINY10, tmp_path / "data")
    right = dataclasses.replace(TINY10, binary_md5=hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(open_cifar(right, tmp_path / "data")) == 20
    assert [p.name for p in (tmp_path / "data").iterdir()] == [TINY10.binary_archive]


@pytest.mark.slow
def test_the_official_files_hold_5000_images_per_class() -> None:
    data_dir = Path(os.environ.get("CEDM_RAY_DATA_DIR", "data"))
    if not any((data_dir / name).exists() for name in (CIFAR10.binary_folder, CIFAR10.binary_archive)):
        pytest.skip("set CEDM_RAY_DATA_DIR to a folder that holds the official CIFAR-10 files")
    source = open_cifar(CIFAR10, data_dir, download=False)
    labels = source.labels()
    assert labels is not None
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 5000))
    np.testing.assert_array_equal(labels[:5], [6, 9, 9, 4, 1])
    mean = np.mean([source.read(i, i + 5000).mean(axis=(0, 2, 3)) for i in range(0, 50_000, 5000)], axis=0) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)  # as published everywhere


@pytest.mark.slow
def test_the_official_test_file_holds_1000_images_per_class() -> None:
    data_dir = Path(os.environ.get("CEDM_RAY_DATA_DIR", "data"))
    if not any((data_dir / name).exists() for name in (CIFAR10.binary_folder, CIFAR10.binary_archive)):
        pytest.skip("set CEDM_RAY_DATA_DIR to a folder that holds the official CIFAR-10 files")
    labels = open_cifar(of_split(CIFAR10, "test"), data_dir, download=False).labels()
    assert labels is not None
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 1000))
    np.testing.assert_array_equal(labels[:5], [3, 8, 8, 0, 6])  # a cat, two ships, an airplane, a frog
