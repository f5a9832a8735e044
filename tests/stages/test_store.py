import json
from pathlib import Path

import pytest

from cedm_ray.errors import UserError
from cedm_ray.stages.store import Store, key_of, prepare_storage, read_json, write_json


def test_a_key_depends_on_the_values_and_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": (1, 2), "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_an_entry_is_there_when_its_block_has_ended_and_not_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("things", {"a": 1})
    with store.create(path, {"a": 1}, {"size": 3}) as scratch:
        (scratch / "thing.bin").write_bytes(b"abc")
        assert store.facts(path) is None
    facts = store.facts(path)
    assert facts is not None and facts["size"] == 3 and facts["inputs"] == {"a": 1}
    assert (path / "thing.bin").read_bytes() == b"abc"


def test_an_entry_whose_making_failed_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("things", {})
    with pytest.raises(RuntimeError), store.create(path, {}, {}) as scratch:
        (scratch / "half").write_bytes(b"x")
        raise RuntimeError
    assert store.facts(path) is None and list((tmp_path / "things").iterdir()) == []


def test_an_entry_with_a_cut_off_or_missing_file_counts_as_missing_and_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("things", {})
    for content in (b"abc", b"abcdef"):
        with store.create(path, {}, {}) as scratch:
            (scratch / "thing.bin").write_bytes(content)
        assert store.facts(path) is not None
        (path / "thing.bin").write_bytes(b"a")
        assert store.facts(path) is None
    (path / "thing.bin").unlink()
    assert store.facts(path) is None


def test_the_first_of_two_makers_of_the_same_thing_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("things", {})
    with store.create(path, {}, {}) as slow:
        (slow / "x").write_bytes(b"slow")
        with store.create(path, {}, {}) as quick:
            (quick / "x").write_bytes(b"quick")
    assert (path / "x").read_bytes() == b"quick"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_json_is_replaced_whole_and_torn_json_reads_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    path.write_text(json.dumps({"a": 1})[:-2])
    assert read_json(path) is None and read_json(tmp_path / "none.json") is None


def test_a_storage_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"storage path .*/file/runs cannot be written .*--storage-path"):
        prepare_storage(tmp_path / "file" / "runs")
    assert prepare_storage(tmp_path / "new").is_dir()
