"""Files that appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from cedm_ray.weights.whole_file import whole_file


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "numbers.npy"
    file.write_bytes(b"old")
    with whole_file(file) as partial:
        assert partial.parent == tmp_path and partial.name.startswith(".")
        np.save(partial, np.arange(3), allow_pickle=False)  # which adds an ending where there is none
        assert file.read_bytes() == b"old"
    assert np.load(file).tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text("old")
    with pytest.raises(OSError, match="No space left"), whole_file(file) as partial:
        partial.write_text("ne")
        raise OSError("No space left on device")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"
