import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from cedm_ray.errors import UserError
from cedm_ray.stages.storage.store import Store, key_of, prepare_storage, read_json, set_aside, write_json
from cedm_ray.weights import listing
from cedm_ray.weights.listing import file_sha256

HOWS = ("truncate", "flip", "zero", "delete")


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


def entry(store: Store, content: bytes = b"abcdef" * 100) -> Path:
    path = store.path("things", {})
    with store.create(path, {}, {"ratio": 0.25}) as scratch:
        (scratch / "part").mkdir()
        (scratch / "part" / "thing.bin").write_bytes(content)
    return path


def damaged(content: bytes, how: str, rng: random.Random) -> bytes | None:
    at = rng.randrange(len(content))
    if how == "delete":
        return None
    if how == "truncate":
        return content[:at]
    if how == "flip":
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]


@pytest.mark.parametrize("name", ["part/thing.bin", "facts.json"])
def test_an_entry_that_is_not_as_listed_is_set_aside_and_made_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found: Counter[str] = Counter()
    for seed in range(20):
        store, rng, how = Store(tmp_path / str(seed)), random.Random(seed), HOWS[seed % 4]
        path = entry(store)
        whole = (path / name).read_bytes()
        torn = damaged(whole, how, rng)
        if torn is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(torn)
        caplog.clear()
        assert store.facts(path) is None and not path.exists()
        aside = path.with_name(f"{path.name}.torn-1")
        assert aside.is_dir() and (how == "delete" or (aside / name).read_bytes() == torn)
        assert store.facts(path) is None and len(caplog.messages) == 1  # told once
        assert re.match(rf"{path} is not whole \(.+\): kept as .*torn-1, and made anew", caplog.messages[0])
        found[how] += 1
        entry(store)
        facts = store.facts(path)
        assert facts is not None and facts["ratio"] == 0.25 and (path / name).read_bytes() == whole
    print(f"{name}: 20 seeds, set aside by kind of damage: {dict(found)}")
    assert sum(found.values()) == 20


def test_what_is_written_again_after_it_was_looked_at_is_looked_at_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = entry(store)
    assert store.facts(path) is not None
    file = path / "part" / "thing.bin"
    file.write_bytes(b"abcdeF" * 100)
    os.utime(file, ns=(1, 1))
    assert store.facts(path) is None


def test_a_file_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = Store(tmp_path), list[Path]()
    path = entry(store)

    def reading(file: Path) -> str:
        read.append(file)
        return file_sha256(file)

    monkeypatch.setattr(listing, "file_sha256", reading)
    assert [store.facts(path) for _ in range(9)][8] is not None
    assert read == [path / "part" / "thing.bin"]


def test_entries_of_earlier_versions_are_judged_by_their_sizes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("things", {"a": 1})
    path.mkdir(parents=True)
    (path / "thing.bin").write_bytes(b"abc")
    write_json(path / "facts.json", {"size": 3, "inputs": {"a": 1}, "files": {"thing.bin": 3}})
    assert (store.facts(path) or {})["size"] == 3
    (path / "thing.bin").write_bytes(b"ab")
    assert store.facts(path) is None and path.with_name(f"{path.name}.torn-1").is_dir()


def test_a_second_torn_entry_does_not_take_the_place_of_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        path = entry(store)
        (path / "part" / "thing.bin").write_bytes(b"torn" * number)
        assert store.facts(path) is None
        aside = path.with_name(f"{path.name}.torn-{number}")
        assert (aside / "part" / "thing.bin").read_bytes() == b"torn" * number


def test_of_two_processes_that_see_a_torn_entry_one_sets_it_aside_and_none_takes_a_whole_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = entry(store)
    (path / "part" / "thing.bin").write_bytes(b"torn")
    assert store.facts(path) is None
    set_aside(path, "seen by the second process before the first one moved it")  # it is gone
    entry(store)
    set_aside(path, "seen by a third process before it was made anew")
    assert store.facts(path) is not None
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, f"{path.name}.torn-1"]


def test_processes_that_race_for_a_torn_entry_leave_one_whole_and_one_aside(tmp_path: Path) -> None:
    rounds, code = 5, (
        "import sys, time; from pathlib import Path; from cedm_ray.stages.storage.store import Store\n"
        "store = Store(Path(sys.argv[1])); time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "for n in range(5):\n"
        "    path = store.path('things', {'n': n})\n"
        "    if store.facts(path) is None:\n"
        "        with store.create(path, {'n': n}, {}) as scratch:\n"
        "            (scratch / 'x').write_bytes(b'whole')\n"
        "    assert (path / 'x').read_bytes() == b'whole'\n"
    )  # fmt: skip
    store = Store(tmp_path)
    for n in range(rounds):
        path = store.path("things", {"n": n})
        with store.create(path, {"n": n}, {}) as scratch:
            (scratch / "x").write_bytes(b"whole")
        (path / "x").write_bytes(b"thorn")
    start = str(time.time() + 2)
    racers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), start]) for _ in range(4)]
    assert [racer.wait(timeout=60) for racer in racers] == [0] * 4
    names = Counter(each.name.split(".torn-")[-1] for each in (tmp_path / "things").iterdir())
    assert names.pop("1") == rounds and len(names) == rounds and set(names.values()) == {1}


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
