import hashlib
import io
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cedm_ray.data.digits import digits
from cedm_ray.data.images import BadImageError
from cedm_ray.data.pack import load_packed, pack
from cedm_ray.data.registry import open_source
from cedm_ray.data.sources import ArraySource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError


def test_a_packed_source_is_the_source(tmp_path: Path) -> None:
    source = digits()
    assert list(pack(source, tmp_path, block=1000)) == [1000, 1797]
    packed = load_packed(tmp_path)
    np.testing.assert_array_equal(packed.images, source.read(0, 1797))
    np.testing.assert_array_equal(packed.labels(), source.labels())
    np.testing.assert_array_equal(packed.read(5, 9), source.read(5, 9))
    assert isinstance(packed.images, np.memmap)
    assert not packed.images.flags.writeable
    assert (packed.name, packed.fingerprint, len(packed)) == (source.name, source.fingerprint, 1797)
    assert packed.class_names() == source.class_names() == tuple("0123456789")
    assert (packed.superclasses(), packed.facts.skipped) == (None, 0)
    assert packed.facts.pixels_sha256 == hashlib.sha256(source.read(0, 1797).tobytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json", "images.npy", "labels.npy"]


def test_packing_again_without_labels_leaves_none(tmp_path: Path) -> None:
    list(pack(digits(), tmp_path))
    list(pack(ArraySource("plain", "1", np.zeros((3, 3, 8, 8), dtype=np.uint8), None, None), tmp_path))
    assert load_packed(tmp_path).labels() is None
    assert not (tmp_path / "labels.npy").exists()


def test_packing_that_is_cut_off_leaves_no_whole_folder_and_no_rubbish(tmp_path: Path) -> None:
    list(pack(digits(), tmp_path))
    running = pack(digits(), tmp_path, block=100)
    next(running)
    running.close()
    with pytest.raises(UserError, match="does not hold whole packed images"):
        load_packed(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npy", "labels.npy"]


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "facts.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_torn_pack_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    list(pack(digits(), tmp_path))
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "cut" else 0])
    with pytest.raises(UserError, match="delete it and pack again"):
        load_packed(tmp_path)


def test_images_that_do_not_fit_the_facts_are_refused(tmp_path: Path) -> None:
    list(pack(digits(), tmp_path))
    facts = json.loads((tmp_path / "facts.json").read_text())
    (tmp_path / "facts.json").write_text(json.dumps(facts | {"n": 1796}))
    with pytest.raises(UserError, match="is due"):
        load_packed(tmp_path)
    np.save(tmp_path / "images.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UserError, match="does not hold whole"):
        load_packed(tmp_path)


class Endless:
    """24 MiB of images that are made as they are read."""

    name, fingerprint, resolution, channels, num_classes = "endless", "0", 64, 3, None

    def __len__(self) -> int:
        return 2048

    def labels(self) -> None:
        return None

    superclasses = class_names = labels

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.full((stop - start, 3, 64, 64), start % 256, dtype=np.uint8)


def test_packing_needs_the_memory_of_some_blocks_only(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for _ in pack(Endless(), tmp_path, block=64):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 2**20


def two_levels() -> ArraySource:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8), np.arange(30) % 6
    return ArraySource("two", "1", images, labels, 6, superclasses=(labels // 2, 3), class_names=tuple("abcdef"))


def test_superclasses_and_names_are_packed(tmp_path: Path) -> None:
    source = two_levels()
    list(pack(source, tmp_path))
    packed = load_packed(tmp_path)
    for images in (packed, FirstImages(packed, 30)):
        level = images.superclasses()
        assert level is not None and level[1] == 3
        np.testing.assert_array_equal(level[0], np.arange(30) % 6 // 2)
        assert images.class_names() == tuple("abcdef")
    (tmp_path / "superclasses.npy").unlink()
    with pytest.raises(UserError, match="delete it and pack again"):
        load_packed(tmp_path)


class Moody:
    """A source of which some images are bad."""

    def __init__(self, source: ArraySource, bad: set[int]) -> None:
        self._source, self._bad = source, bad

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, start: int, stop: int) -> np.ndarray:
        for i in range(start, stop):
            if i in self._bad:
                raise BadImageError(f"image {i} is bad\nvery bad")
        return self._source.read(start, stop)


@pytest.mark.parametrize("block", [1, 7, 10, 1024])
@pytest.mark.parametrize("bad", [set(), {0}, {29}, {3, 4, 5, 20}, set(range(10)), set(range(0, 30, 2))])
def test_bad_images_are_left_out_with_their_labels(block: int, bad: set[int], tmp_path: Path) -> None:
    source, kept = two_levels(), [i for i in range(30) if i not in bad]
    assert list(pack(Moody(source, bad), tmp_path, block=block, on_bad_image="skip"))[-1] == 30
    packed, level = load_packed(tmp_path), load_packed(tmp_path).superclasses()
    np.testing.assert_array_equal(packed.images, source.read(0, 30)[kept])
    np.testing.assert_array_equal(packed.labels(), np.arange(30)[kept] % 6)
    assert level is not None
    np.testing.assert_array_equal(level[0], np.arange(30)[kept] % 6 // 2)
    assert (len(packed), packed.facts.skipped, packed.num_classes) == (30 - len(bad), len(bad), 6)
    assert packed.facts.pixels_sha256 == hashlib.sha256(source.read(0, 30)[kept].tobytes()).hexdigest()
    if bad:
        lines = (tmp_path / "skipped.txt").read_text().splitlines()
        assert lines == [rf"image {i} is bad\nvery bad" for i in sorted(bad)]
    else:
        assert not (tmp_path / "skipped.txt").exists()


def test_more_than_half_bad_images_end_the_packing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16 of the 30 images of two are bad, more than half .*image 15 is bad"):
        list(pack(Moody(two_levels(), set(range(16))), tmp_path, on_bad_image="skip"))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_image_ends_the_packing_unless_it_may_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="image 7 is bad"):
        list(pack(Moody(two_levels(), {7}), tmp_path))


def test_what_was_skipped_is_forgotten_when_the_folder_is_packed_again(tmp_path: Path) -> None:
    list(pack(Moody(two_levels(), {7}), tmp_path, on_bad_image="skip"))
    list(pack(two_levels(), tmp_path, on_bad_image="skip"))
    assert not (tmp_path / "skipped.txt").exists() and load_packed(tmp_path).facts.skipped == 0


def test_bad_files_members_and_rows_are_skipped_alike(tmp_path: Path) -> None:
    files = []
    for i in range(6):
        file = io.BytesIO()
        side = 4 if i == 1 else 16
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "png")
        files.append(file.getvalue()[: 200 if i == 4 else None])
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, data in enumerate(files):
            (tmp_path / "folder" / f"{i}.png").write_bytes(data)
            archive.writestr(f"{i}.png", data)
    pd.DataFrame({"image": files}).to_parquet(tmp_path / "a.parquet")
    pixels = set()
    for name in ("folder", "a.zip", "a.parquet"):
        source = open_source(str(tmp_path / name), data_dir=tmp_path, resolution=16, on_bad_image="skip")
        list(pack(FirstImages(source, 6), tmp_path / "packed", on_bad_image="skip"))
        facts = load_packed(tmp_path / "packed").facts
        assert (facts.n, facts.skipped) == (4, 2)
        reasons = (tmp_path / "packed" / "skipped.txt").read_text().splitlines()
        assert "too small" in reasons[0] and "damaged" in reasons[1] and all(name in line for line in reasons)
        pixels.add(facts.pixels_sha256)
    assert len(pixels) == 1


def test_nothing_to_pack_and_blocks_of_nothing_are_refused(tmp_path: Path) -> None:
    empty = ArraySource("empty", "1", np.zeros((0, 1, 8, 8), np.uint8), None, None)
    with pytest.raises(ValueError, match="empty holds no images"):
        list(pack(empty, tmp_path))
    with pytest.raises(ValueError, match="block is 0; it must be at least 1"):
        list(pack(two_levels(), tmp_path, block=0))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_reads_other_images_than_it_says_is_refused(tmp_path: Path) -> None:
    class Lying(Moody):
        def read(self, start: int, stop: int) -> np.ndarray:
            return self._source.read(start, stop)[:, :1]

    with pytest.raises(ValueError, match=r"read gave uint8 \(30, 1, 8, 8\); uint8 \(30, 3, 8, 8\) is due"):
        list(pack(Lying(two_levels(), set()), tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"more": 1}, "facts.json does not hold exactly channels, class_names"),
        ({"class_names": ["a", "b"]}, "facts.json holds 2 class names for 6 classes"),
        ({"n": 29}, r"images.npy is uint8 \(30, 3, 8, 8\); uint8 \(29, 3, 8, 8\) is due"),
        ({"num_superclasses": 2}, r"labels span 0 to 2; they must lie in \[0, 2\)"),
    ],
)
def test_facts_that_are_not_those_of_the_files_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    list(pack(two_levels(), tmp_path))
    packed = load_packed(tmp_path)
    assert (packed.resolution, packed.channels, packed.num_classes) == (8, 3, 6)
    facts = json.loads((tmp_path / "facts.json").read_text())
    (tmp_path / "facts.json").write_text(json.dumps({**facts, **changed}))
    with pytest.raises(UserError, match=message):
        load_packed(tmp_path)
