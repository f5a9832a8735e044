import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from cedm_ray.config import fingerprint_tree, load
from cedm_ray.data.storage import storage_folder
from cedm_ray.errors import UserError
from cedm_ray.stages.storage import bucket, bucket_files
from cedm_ray.stages.storage.bucket_entries import MARK, fetch_entry, here, keep_entry
from cedm_ray.stages.storage.checkpoints import keep_in_bucket, newest_whole
from cedm_ray.stages.storage.claim import claimed
from cedm_ray.stages.storage.mirror import Mirror
from cedm_ray.weights.whole_file import whole_file

boto3 = pytest.importorskip("boto3")


def copy_of(server: tuple[str, Any], machine: Path, prefix: str) -> Path:
    return storage_folder(Path(f"s3://{server[0]}/{prefix}"), machine)


def make(folder: Path, seed: int = 0, size: int = 1000) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("a.npy", "deep/b.bin", "facts.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(size))
    (folder / "empty").touch()
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def objects(server: tuple[str, Any], prefix: str = "") -> dict[str, bytes]:
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=server[0], Prefix=prefix)
    keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
    return {key: client.get_object(Bucket=server[0], Key=key)["Body"].read() for key in keys if not key.endswith("/")}


@pytest.mark.parametrize(
    ("given", "folder", "address"),
    [
        ("s3://pile/runs/mine", "/copies/s3:/pile/runs/mine", "s3://pile/runs/mine"),
        ("s3://pile", "/copies/s3:/pile", "s3://pile"),
        ("/copies/s3:/pile/runs", "/copies/s3:/pile/runs", "s3://pile/runs"),
        ("file:///mnt/runs", "/mnt/runs", "/mnt/runs"),
        ("/mnt/runs", "/mnt/runs", "/mnt/runs"),
    ],
)
def test_a_storage_path_has_a_folder_that_says_where_its_bucket_is(given: str, folder: str, address: str) -> None:
    found = storage_folder(Path(given), Path("/copies"))
    assert str(found) == folder and bucket.address(found) == address
    assert bucket.bucket_key(found) == (address.removeprefix("s3://") if address.startswith("s3") else None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://pile/runs", "has the scheme 'gs'; it must be a folder, file:///... or s3://..."),
        (
            "s3://me:hush@pile/runs",
            "storage path s3://pile must be s3://bucket/prefix and no more; .*AWS_ACCESS_KEY_ID",
        ),
        ("s3://pile/runs?endpoint_override=x:1", "s3://pile must be s3://bucket/prefix and no more; .*AWS_ENDPOINT"),
        ("s3://", "must be s3://bucket/prefix"),
    ],
)
def test_other_storage_addresses_are_refused_without_their_keys(given: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        storage_folder(Path(given), Path("/copies"))
    assert "hush" not in str(caught.value)


def test_an_entry_is_the_same_on_another_machine(server: tuple[str, Any], asked: Any, tmp_path: Path) -> None:
    one, two = (copy_of(server, tmp_path / name, "same") / "kind" / "key" for name in ("one", "two"))
    make(one)
    assert not fetch_entry(two) and not two.exists()
    asked.clear()
    assert keep_entry(one)
    # The mark is looked for twice, and each of the four files and the mark goes in one request.
    assert (asked.count("HEAD"), asked.count("PUT"), len(asked)) == (2, 5, 7)
    asked.clear()
    assert here(two / "a.npy") == two / "a.npy"
    assert contents(two) == contents(one) and len(contents(two)) == 4
    assert asked.count("HEAD") == 5 and len(asked) <= 10
    asked.clear()
    here(two / "a.npy")
    assert not asked  # what is here costs nothing
    assert not keep_entry(two) and len(asked) <= 2  # nor is it written twice
    assert [path.name for path in two.parent.iterdir() if not path.name.endswith(".lock")] == ["key"]


def test_a_large_file_is_fetched_in_pieces(
    server: tuple[str, Any], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_PIECE", 1 << 18)
    one, two = (copy_of(server, tmp_path / name, "large") / "entry" for name in ("one", "two"))
    make(one, size=(5 << 17) + 1)
    assert keep_entry(one)
    asked.clear()
    assert fetch_entry(two) and contents(two) == contents(one)
    assert asked.count("GET") >= 3 * 3


@pytest.mark.slow
def test_the_list_of_2500_objects_takes_three_requests(server: tuple[str, Any], asked: Any, tmp_path: Path) -> None:
    folder = copy_of(server, tmp_path, "many")
    client = boto3.client("s3")
    for number in range(2500):
        client.put_object(Bucket=server[0], Key=f"many/{number:04d}.json", Body=b"{}")
    asked.clear()
    assert len(bucket.listed(folder)) == 2500 and len(asked) == 3


UPLOAD = """
import sys
from pathlib import Path
from cedm_ray.stages.storage.bucket_entries import keep_entry
print(keep_entry(Path(sys.argv[1])))
"""


def uploading(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", UPLOAD, str(folder)], stdout=subprocess.PIPE, text=True)


def test_an_upload_killed_between_its_files_is_invisible_and_the_next_one_is_whole(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    one, two = (copy_of(server, tmp_path / name, "torn") / "entry" for name in ("one", "two"))
    make(one)
    for number in range(30):
        (one / f"{number}.bin").write_bytes(os.urandom(2000))
    seen, child = [], uploading(one)

    def kill(request: str) -> None:
        if request.startswith("PUT"):
            seen.append(request)
            if len(seen) == 12:
                child.kill()

    asked.on_request = kill
    child.wait()
    asked.on_request = lambda request: None
    left = objects(server, "torn/")
    assert child.returncode == -signal.SIGKILL and 5 <= len(left) < 34
    assert not fetch_entry(two) and not two.exists()
    assert keep_entry(one) and fetch_entry(two) and contents(two) == contents(one)


def test_two_processes_that_keep_the_same_entry_leave_one_whole(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    folders = [copy_of(server, tmp_path / str(number), "both") / "entry" for number in range(3)]
    for seed in range(2):
        make(folders[seed], seed, size=200_000)
    said = [child.communicate(timeout=60)[0] for child in [uploading(folder) for folder in folders[:2]]]
    assert "True\n" in said and set(said) <= {"True\n", "False\n"}
    assert fetch_entry(folders[2])
    assert contents(folders[2]) in [contents(folder) for folder in folders[:2]]


def test_processes_of_one_machine_fetch_an_entry_once(server: tuple[str, Any], asked: Any, tmp_path: Path) -> None:
    one, two = (copy_of(server, tmp_path / name, "once") / "entry" for name in ("one", "two"))
    keep_entry(make(one))
    asked.clear()
    threads = [threading.Thread(target=here, args=(two / "a.npy",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(two) == contents(one)
    assert len([request for request in asked if request.startswith("GET") and request.endswith("a.npy")]) == 1


@pytest.mark.parametrize("harm", ["shorter", "other bytes", "gone"])
def test_an_entry_whose_files_are_damaged_in_the_bucket_is_set_aside_and_made_again(
    harm: str, server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    prefix = f"harm-{harm.replace(' ', '-')}"
    one, two = (copy_of(server, tmp_path / name, prefix) / "entry" for name in ("one", "two"))
    keep_entry(make(one))
    (key,) = (key for key in objects(server, prefix) if key.endswith("a.npy"))
    data, client = objects(server, key)[key], boto3.client("s3")
    if harm == "gone":
        client.delete_object(Bucket=server[0], Key=key)
    else:
        changed = data[:-1] if harm == "shorter" else bytes([data[0] ^ 1]) + data[1:]
        client.put_object(Bucket=server[0], Key=key, Body=changed)
    assert not fetch_entry(two) and not two.exists()
    assert [name for name in bucket.listed(two) if name.startswith("broken-")]
    assert keep_entry(one) and fetch_entry(two) and contents(two) == contents(one)


@pytest.mark.parametrize(
    "mark",
    [
        b"no JSON",
        b"[]",
        b'{"part": "p", "files": {"../../evil": {"size": 1, "sha256": "x"}}}',
        b'{"part": "p", "files": {"/tmp/evil": {"size": 1, "sha256": "x"}}}',
        b'{"part": "../other", "files": {"a": {"size": 1, "sha256": "x"}}}',
    ],
)
def test_a_mark_that_is_none_or_leads_elsewhere_is_not_followed(
    mark: bytes, server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    folder = copy_of(server, tmp_path, "evil") / "entry"
    bucket.write_object(folder / MARK, mark)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert not fetch_entry(folder)
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert before == after and not bucket.exists(folder / MARK)


def test_a_bucket_that_is_not_there_or_does_not_answer_is_one_line(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    folder = storage_folder(Path("s3://no-such-bucket-here/runs"), tmp_path)
    with pytest.raises(UserError, match=r"^s3://no-such-bucket-here/runs/\.writable-\w+ cannot be written") as caught:
        bucket.refuse_if_unwritable(folder)
    assert "\n" not in str(caught.value)
    bucket.refuse_if_unwritable(copy_of(server, tmp_path, "fine"))
    assert objects(server, "fine") == {}


HOLD = """
import sys, time
from pathlib import Path
from cedm_ray.stages.storage.claim import claimed
with claimed(Path(sys.argv[1]), renew_s=0.5, expire_s=4):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_driver_is_refused_until_the_claim_of_a_killed_one_ends(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    theirs, run = (copy_of(server, tmp_path / name, "claims") / "digits-1" for name in ("one", "two"))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(theirs)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    owner = rf"^s3://\S+/digits-1 belongs to the search of process {holder.pid} on \S+, which runs since .* UTC; wait"
    for _ in range(2):
        with pytest.raises(UserError, match=owner), claimed(run, expire_s=4):
            pytest.fail("two drivers hold the folder")
        time.sleep(3)  # longer in all than a claim counts: it is renewed
    holder.kill()
    holder.wait()
    deadline_s, waited = time.monotonic() + 30, 0
    while time.monotonic() < deadline_s:
        try:
            with claimed(run, expire_s=4):
                assert len(bucket.listed(run / "drivers")) == 1
                break
        except UserError:
            waited += 1
            time.sleep(0.5)
    else:
        pytest.fail("the claim of a killed driver never ends")
    assert waited >= 2 and bucket.listed(run / "drivers") == {}


def test_a_driver_that_was_killed_on_this_machine_does_not_have_to_be_waited_for(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    run = copy_of(server, tmp_path, "same-copy") / "digits-1"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with claimed(run):
        assert len(bucket.listed(run / "drivers")) == 1


def test_of_drivers_that_start_at_once_at_most_one_goes_on(server: tuple[str, Any], asked: Any, tmp_path: Path) -> None:
    together, held, refused = threading.Barrier(5), [], []

    def start(machine: str) -> None:
        together.wait()
        try:
            with claimed(copy_of(server, tmp_path / machine, "at-once") / "digits-1"):
                held.append(1)
                time.sleep(1.5)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=start, args=(str(number),)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) <= 1 and len(held) + len(refused) == 5


def test_a_driver_that_was_held_up_and_finds_another_in_its_place_ends(
    server: tuple[str, Any], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lost = copy_of(server, tmp_path, "held-up") / "digits-1", threading.Event()
    with claimed(run, renew_s=0.2, expire_s=100, on_lost=lost.set):
        mine = next(iter(bucket.listed(run / "drivers")))
        bucket.write_object(run / "drivers" / "other.json", b'{"host": "h", "pid": 1, "since": "s"}')
        assert not lost.wait(1)  # in time: it is the other one that goes
        now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr("cedm_ray.stages.storage.claim._now_s", lambda: now_s + 1000)
        assert lost.wait(5)
        assert mine in bucket.listed(run / "drivers")


def test_a_claim_is_renewed_again_after_whatever_went_wrong(
    server: tuple[str, Any], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lost, tried = copy_of(server, tmp_path, "trouble") / "digits-1", threading.Event(), threading.Event()

    def too_many(file: Path, data: bytes) -> None:
        tried.set()
        raise OSError(errno.EMFILE, "Too many open files")

    with claimed(run, renew_s=0.1, expire_s=100, on_lost=lost.set):
        with monkeypatch.context() as trouble:
            trouble.setattr("cedm_ray.stages.storage.claim.write_object", too_many)
            assert tried.wait(5)
        asked.clear()
        time.sleep(1)
        assert asked.count("PUT") > 0 and not lost.is_set()


def test_a_mirror_goes_on_after_whatever_went_wrong(
    server: tuple[str, Any], asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = copy_of(server, tmp_path, "mirror-trouble") / "digits-1", []
    run.mkdir(parents=True)
    (run / "trials.json").write_text("{}")
    mirror = Mirror(run)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with mirror.pushing(told.append, every_s=0.1):
        with monkeypatch.context() as trouble:
            trouble.setattr(mirror, "_send", full)
            time.sleep(1)
        time.sleep(1)
        assert bucket.exists(run / "trials.json")
    assert full.call_count > 1 and told == ["[Errno 28] No space left on device; it is tried again"]


def test_what_a_driver_writes_is_in_the_bucket_and_on_the_next_machine(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    one, two = (copy_of(server, tmp_path / name, "mirror") for name in ("one", "two"))
    run = one / "digits-1"
    for name in ("export/model.bin", "ray/tune.json", "drivers/x.json", "mlflow-outbox.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "trials.json").write_text(json.dumps([str(run / "export"), "s3://elsewhere/images"]))
    (one / "store" / "trials" / "k").mkdir(parents=True)
    (one / "store" / "trials" / "k" / "trial.json").write_text('{"checkpoint": 1}')
    first = Mirror(run)
    first.fetch()
    first.own()
    assert first.push() == 4 and first.push() == 0
    (run / "trials.json").write_text(json.dumps([str(run / "export"), 2]))
    assert first.push() == 1
    kept = objects(server, "mirror/")
    assert json.loads(kept["mirror/digits-1/trials.json"]) == [f"s3://{server[0]}/mirror/digits-1/export", 2]
    assert not [key for key in kept if "/ray/" in key or "/drivers/" in key]
    Mirror(two / "digits-1").fetch()
    assert json.loads((two / "digits-1" / "trials.json").read_text()) == [str(two / "digits-1" / "export"), 2]
    assert (two / "digits-1" / "export" / "model.bin").read_text() == "export/model.bin"
    assert (two / "store" / "trials" / "k" / "trial.json").read_text() == '{"checkpoint": 1}'
    (run / "trials.json").write_text("[]")  # not pushed before the driver was killed
    Mirror(run).fetch()
    assert (run / "trials.json").read_text() == "[]"  # the same copy is at least as new
    second = Mirror(two / "digits-1")
    second.own()
    second.push()
    Mirror(run).fetch()
    assert len(json.loads((run / "trials.json").read_text())) == 2  # a driver elsewhere has gone on since


def test_a_record_that_is_being_written_does_not_go_to_the_bucket(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    one, two = (copy_of(server, tmp_path / name, "half-written") for name in ("one", "two"))
    trial = one / "store" / "trials" / "k"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text('{"checkpoint": 1}')
    first = Mirror(one / "digits-1")
    first.own()
    with whole_file(trial / "trial.json") as partial:
        partial.write_text('{"checkp')
        assert first.push() == 1
        bucket_files.keep_file(partial)  # an earlier driver may have left one there
    Mirror(two / "digits-1").fetch()
    assert contents(two / "store").keys() == {"trials/k/trial.json"}


def test_the_result_reaches_the_bucket_after_everything_that_it_speaks_of(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    run = copy_of(server, tmp_path, "order") / "digits-1"
    mirror, told = Mirror(run), []
    run.mkdir(parents=True)
    (run / "so-far.json").write_text("{}")
    with mirror.pushing(told.append, every_s=0.2):
        time.sleep(0.7)
        assert bucket.exists(run / "so-far.json")
        (run / "so-far.json").unlink()
        for number in range(20):
            (run / f"z{number}.png").write_bytes(b"x" * 1000)
        (run / "result.json").write_text("{}")
        logged = run.parent / "mlflow-artifacts" / "result.json"  # another file of that name is one as all others
        logged.parent.mkdir()
        logged.write_text("{}")
    written = [request for request in asked if request.startswith("PUT") and "digits-1" in request]
    # Arrow marks the folder of what it removes, so that the folder stays.
    assert [request for request in written if not request.endswith("/")][-1].endswith("result.json")
    assert len(bucket.listed(run)) == 21 and bucket.exists(logged) and told == []


def test_checkpoints_that_are_thinned_here_are_thinned_in_the_bucket_and_others_are_left_alone(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    one, two = (copy_of(server, tmp_path / name, "thinned") / "train" for name in ("one", "two"))
    made = tmp_path / "made"
    make(made)
    (made / "manifest.json").write_text("long: state")
    kept = [keep_in_bucket(made, one) for _ in range(2)]
    assert kept[0] is not None and kept[1] is not None and kept[0] < kept[1]
    puts = [request for request in asked if request.startswith("PUT")]
    assert puts[-1].endswith("manifest.json") and contents(kept[0]) == contents(made)
    bucket.write_object(one / "checkpoint_of_another_node" / "state", b"x")
    (kept[0] / "a.npy").unlink()
    (kept[0] / "averaged").write_bytes(b"y")
    (kept[0] / "manifest.json").write_text("averaged")
    bucket_files.follow(one, "manifest.json")
    bucket_files.fetch_files(two)
    assert (two / "checkpoint_of_another_node" / "state").read_bytes() == b"x"
    for folder in kept:
        assert contents(two / folder.name) == contents(folder)
    bucket_files.fetch_files(tmp_path / "not-in-a-bucket")
    assert keep_in_bucket(made, tmp_path / "not-in-a-bucket") is None


def test_a_checkpoint_for_which_there_is_no_room_leaves_nothing_and_what_a_killed_process_left_is_removed(
    server: tuple[str, Any], tmp_path: Path, small_disk: Any
) -> None:
    train, made = copy_of(server, small_disk("1m").path, "unfinished") / "train", make(tmp_path / "made", size=400_000)
    with pytest.raises(shutil.Error, match="No space left"):
        keep_in_bucket(made, train)
    assert list(train.iterdir()) == []
    (train / ".checkpoint_2026-01-01_00-00-00.000000").mkdir()
    (train / ".checkpoint_2026-01-01_00-00-00.000000" / "state.safetensors").write_bytes(b"half of it")
    assert newest_whole(train) == (None, []) and list(train.iterdir()) == []


def test_small_files_are_looked_for_and_files_by_name_are_fetched_alone(
    server: tuple[str, Any], asked: Any, tmp_path: Path
) -> None:
    one, two = (copy_of(server, tmp_path / name, "small") for name in ("one", "two"))
    make(one)
    bucket_files.keep_files(one, "facts.json")
    bucket_files.fetch_files(two, ("a.npy",))
    assert set(contents(two)) == {"a.npy"}
    (two / "a.npy").write_bytes(bytes(1000))
    bucket_files.fetch_files(two, ("a.npy",))
    assert (two / "a.npy").read_bytes() == bytes(1000)  # the same size: it is taken as it is
    bucket_files.fetch_files(two, ("a.npy",), fresh=True)
    assert (two / "a.npy").read_bytes() == (one / "a.npy").read_bytes()
    assert bucket_files.look_for(two / "facts.json").read_bytes() == (one / "facts.json").read_bytes()
    assert not bucket_files.look_for(two / "nothing.json").exists()
    bucket_files.forget_files(one)
    assert objects(server, "small") == {} and set(contents(one)) == {"a.npy", "deep/b.bin", "facts.json", "empty"}


def test_the_settings_know_a_bucket_and_a_shared_folder_by_their_addresses(tmp_path: Path) -> None:
    flags = ["--storage-path", "s3://pile/runs", "--storage-copies", str(tmp_path)]
    assert load(flags).storage_path == tmp_path / "s3:" / "pile" / "runs"
    assert load(["--storage-path", f"file://{tmp_path}/runs"]).storage_path == tmp_path / "runs"
    plain = load(["--storage-path", "runs"])
    assert plain.storage_path == Path("runs") and fingerprint_tree(plain) == fingerprint_tree(load(flags))
    with pytest.raises(UserError, match="scheme 'gs'"):
        load(["--storage-path", "gs://pile/runs"])
