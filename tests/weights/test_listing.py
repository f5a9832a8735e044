import hashlib
import json
import os
from pathlib import Path

import pytest

from cedm_ray.weights.listing import Listing, file_sha256, seal_fits, sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "sub" / "b.bin").write_bytes(bytes(1000))
    return tmp_path


def rewrite(file: Path, content: bytes) -> None:
    """Another file in its place, as one that was written later is: of another time."""
    file.write_bytes(content)
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


def test_a_listing_holds_every_file_below_the_folder_with_its_size_and_hash(folder: Path) -> None:
    listing = Listing.of(folder)
    assert listing.sizes == {"a.bin": 3, "sub/b.bin": 1000}
    assert listing.sha256["a.bin"] == hashlib.sha256(b"abc").hexdigest()
    assert Listing.read(json.loads(json.dumps(listing.values()))) == listing
    assert listing.fault(folder) is None


@pytest.mark.parametrize("values", [{}, {"files": [1]}, {"files": {"a": 1}, "sha256": "x"}])
def test_values_that_list_no_files_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="it lists no files"):
        Listing.read(values)


def test_every_change_of_a_file_is_told_in_words(folder: Path) -> None:
    listing, file = Listing.of(folder), folder / "a.bin"
    rewrite(file, b"abd")
    assert listing.fault(folder) == "a.bin has another content than was written"
    assert listing.fault(folder, contents=False) is None  # the size alone is right
    assert listing.fault(folder, ["sub/b.bin"]) is None
    rewrite(file, b"abcd")
    assert listing.fault(folder, contents=False) == "a.bin has 4 bytes instead of 3"
    file.unlink()
    assert listing.fault(folder) == "a.bin is missing"
    (folder / "new.bin").write_bytes(b"")
    assert listing.fault(folder, ["new.bin"]) == "new.bin is not listed"
    (folder / "sub" / "loop").symlink_to("loop")
    assert (listing.fault(folder, ["sub/loop"]) or "").startswith("sub/loop cannot be read (")


def test_a_file_without_a_hash_is_told_by_its_size_alone(folder: Path) -> None:
    listing = Listing.read({"files": {"a.bin": 3}})
    rewrite(folder / "a.bin", b"xyz")
    assert listing.fault(folder) is None


def test_a_file_that_is_written_again_is_read_again(folder: Path) -> None:
    listing = Listing.of(folder)
    assert listing.fault(folder) is None
    rewrite(folder / "a.bin", b"xyz")
    assert listing.fault(folder) is not None
    rewrite(folder / "a.bin", b"abc")
    assert listing.fault(folder) is None


def test_a_file_takes_the_place_of_another_in_the_listing(folder: Path) -> None:
    (folder / "c.bin").write_bytes(b"12345")
    listing = Listing.of(folder).replaced("a.bin", folder / "c.bin")
    assert listing.sizes == {"sub/b.bin": 1000, "c.bin": 5} and set(listing.sha256) == set(listing.sizes)
    (folder / "a.bin").unlink()
    assert listing.fault(folder) is None


def test_a_seal_fits_the_values_that_it_was_made_of_and_no_others() -> None:
    values = sealed({"kimg": 5, "more": {"b": 1.5, "a": (1, 2)}})
    stored = json.loads(json.dumps(values))
    assert seal_fits(stored) and sealed(stored) == stored
    assert not seal_fits({**stored, "kimg": 6})
    assert not seal_fits({**stored, "new": None})
    assert seal_fits({"kimg": 5})  # of an earlier version, which had no seals


def test_file_hashes_are_the_standard_ones(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-4's example
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
