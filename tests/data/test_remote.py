import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from cedm_ray.data.filesystems import local_path, open_filesystem
from cedm_ray.data.folder import FolderSource
from cedm_ray.data.images import BadImageError
from cedm_ray.data.parquet import ParquetSource
from cedm_ray.data.registry import open_source
from cedm_ray.data.remote import RemoteFolder, list_files
from cedm_ray.errors import UserError
from helpers.ports import free_port

NAMES = ["dog/2.png", "cat/b.jpg", "cat/a.webp", "cat/deep/c.PNG", "Ape/1.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root, rng = tmp_path / "animals", np.random.default_rng(0)
    for name in [*NAMES, ".hidden/x.png", "cat/.y.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / name)
    (root / "cat" / "notes.txt").write_text("no image")
    return root


def over_arrow(root: Path, resolution: int | None = 16, **options: bool) -> RemoteFolder:
    local = fs.LocalFileSystem()
    return RemoteFolder(list_files(local, str(root)), local, str(root), resolution, **options)


@pytest.mark.parametrize("folder_labels", [False, True])
def test_a_folder_of_a_store_is_what_the_local_folder_is(folder_labels: bool, folder: Path) -> None:
    theirs = FolderSource(folder, 16, folder_labels=folder_labels)
    ours = over_arrow(folder, folder_labels=folder_labels)
    np.testing.assert_array_equal(ours.read(0, 5), theirs.read(0, 5))
    np.testing.assert_array_equal(ours.read(2, 4), theirs.read(2, 4))
    assert (len(ours), ours.name, ours.channels) == (5, "animals", 3)
    assert (ours.num_classes, ours.class_names()) == (theirs.num_classes, theirs.class_names())
    if folder_labels:
        np.testing.assert_array_equal(ours.labels(), [0, 1, 1, 1, 2])
        assert ours.class_names() == ("Ape", "cat", "dog")


def test_the_fingerprint_follows_names_sizes_times_labels_and_resolution(folder: Path) -> None:
    keys = [
        over_arrow(folder).fingerprint,
        over_arrow(folder, 8).fingerprint,
        over_arrow(folder, folder_labels=True).fingerprint,
    ]
    assert over_arrow(folder).fingerprint == keys[0]
    os.utime(folder / NAMES[0], ns=(0, 10**18 + 1))
    keys.append(over_arrow(folder).fingerprint)
    (folder / NAMES[0]).rename(folder / "dog" / "3.png")
    keys.append(over_arrow(folder).fingerprint)
    assert len(set(keys)) == 5


def test_bad_images_are_named_and_a_store_that_fails_makes_no_image_bad(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = over_arrow(folder)
    (folder / "cat" / "b.jpg").write_bytes((folder / "cat" / "b.jpg").read_bytes()[:-200])
    with pytest.raises(BadImageError, match=r"animals/cat/b\.jpg is a damaged image"):
        source.read(0, 5)
    (folder / "cat" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"animals/cat/b\.jpg cannot be read .*look at the network") as caught:
        source.read(0, 5)
    assert not isinstance(caught.value, BadImageError)
    monkeypatch.setattr("cedm_ray.data.remote.MAX_FILE_BYTES", 100)
    with pytest.raises(BadImageError, match=r"Ape/1\.png is too large"):
        source.read(0, 1)


def test_a_folder_without_images_or_resolution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image"):
        over_arrow(tmp_path)
    with pytest.raises(UserError, match="needs a resolution"):
        over_arrow(tmp_path, None)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        over_arrow(tmp_path / "nowhere")


def test_a_file_uri_is_the_local_path(folder: Path, tmp_path: Path) -> None:
    theirs = open_source(str(folder), data_dir=tmp_path, resolution=16)
    ours = open_source(folder.as_uri(), data_dir=tmp_path, resolution=16)
    assert isinstance(ours, FolderSource) and ours.fingerprint == theirs.fingerprint
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("s3://a/b") is None
    with pytest.raises(UserError, match="names the machine 'home'"):
        local_path("file://home/me")
    with pytest.raises(UserError, match=r"dataset '/no/such' is unknown"):
        open_source("file:///no/such", data_dir=tmp_path, resolution=16)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://a/b", r"http://a/b has the scheme 'http'; it must be one of s3, gs, file"),
        ("://a", "has the scheme ''"),
        ("s3://[a", "is no valid URI"),
        ("s3://me:hush@bucket/x", r"the URI of s3://bucket/x holds keys, .*give them in the environment"),
        ("s3://bucket/x?no_such=1", r"^s3://bucket/x cannot be read .*no_such"),
        ("s3://bad bucket/x", r"^s3://bad bucket/x cannot be read"),
    ],
)
def test_a_uri_that_holds_keys_or_cannot_be_understood_is_refused(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_filesystem(uri)
    assert "hush" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    endpoint = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^s3://bucket/x cannot be read .*look at the network") as caught:
        open_filesystem(f"s3://bucket/x?endpoint_override={endpoint}&scheme=http&region=us-east-1", timeout_s=30)
    assert time.monotonic() - began < 30
    assert "\n" not in str(caught.value)


def test_a_store_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"^s3://bucket/x has not answered for 2 s; look at the network"):
            open_filesystem(f"s3://bucket/x?endpoint_override={endpoint}&scheme=http&region=us-east-1", timeout_s=2)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[fs.S3FileSystem, str]]:
    """A bucket on an S3 server in this process, and the options that lead to it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "me")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        options = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        s3, _ = fs.FileSystem.from_uri(f"s3://pile?{options}&allow_bucket_creation=true")
        s3.create_dir("pile")
        yield s3, options
    server.stop()


def upload(s3: fs.S3FileSystem, source: Path, target: str) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            with s3.open_output_stream(f"{target}/{path.relative_to(source).as_posix()}") as out:
                out.write(path.read_bytes())


def test_a_bucket_of_images_is_what_the_local_folder_is(
    bucket: tuple[fs.S3FileSystem, str], folder: Path, tmp_path: Path
) -> None:
    s3, options = bucket
    upload(s3, folder, "pile/of/animals")
    theirs = FolderSource(folder, 16, folder_labels=True)
    ours = open_source(f"s3://pile/of/animals?{options}", data_dir=tmp_path, resolution=16, folder_labels=True)
    assert isinstance(ours, RemoteFolder) and ours.name == "animals"
    np.testing.assert_array_equal(ours.read(0, 5), theirs.read(0, 5))
    np.testing.assert_array_equal(ours.labels(), theirs.labels())
    again = open_source(f"s3://pile/of/animals/?{options}", data_dir=tmp_path, resolution=16, folder_labels=True)
    assert again.fingerprint == ours.fingerprint
    s3.delete_file("pile/of/animals/cat/b.jpg")
    with pytest.raises(UserError, match=r"^s3://pile/of/animals/cat/b\.jpg cannot be read"):
        ours.read(0, 5)
    with pytest.raises(UserError, match=r"^s3://pile/of/nothing does not exist"):
        open_source(f"s3://pile/of/nothing?{options}", data_dir=tmp_path, resolution=16)
    with pytest.raises(UserError, match=r"^s3://heap/x (does not exist|cannot be read)"):
        open_source(f"s3://heap/x?{options}", data_dir=tmp_path, resolution=16)
    with pytest.raises(UserError, match=r"a\.webp is a file of no kind that is read from afar"):
        open_source(f"s3://pile/of/animals/cat/a.webp?{options}", data_dir=tmp_path, resolution=16)


def test_parquet_in_a_bucket_is_what_it_is_on_the_disk(bucket: tuple[fs.S3FileSystem, str], tmp_path: Path) -> None:
    s3, options = bucket
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for i in range(2):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels[20 * i : 20 * i + 20])
        table = pa.table({"image": column, "label": pa.array(np.arange(20) % 3)})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=8)
    upload(s3, tmp_path, "pile/tables")
    for path, count in [("tables", 40), ("tables/0.parquet", 20)]:
        source = open_source(f"s3://pile/{path}?{options}", data_dir=tmp_path, resolution=16, folder_labels=True)
        assert isinstance(source, ParquetSource) and source.num_classes == 3
        np.testing.assert_array_equal(source.read(0, count), pixels[:count].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("uri", "asked"),
    [
        ("gs://bucket/x", "gs://bucket/x?retry_limit_seconds=15"),
        ("gs://bucket/x?anonymous=true", "gs://bucket/x?anonymous=true&retry_limit_seconds=15"),
        ("gs://bucket/x?retry_limit_seconds=3", "gs://bucket/x?retry_limit_seconds=3"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_googles_client_gives_up_within_seconds_unless_told_otherwise(
    uri: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def silent(uri: str, *_: object) -> None:
        seen.append(uri)
        raise UserError("silent")

    monkeypatch.setattr("cedm_ray.data.filesystems.knock", silent)
    with pytest.raises(UserError, match="silent"):
        open_filesystem(uri)
    assert seen == [asked]


def test_a_store_that_fails_after_its_first_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cedm_ray.data.filesystems.knock", lambda *_: None)
    with pytest.raises(UserError, match=r"^s3://bucket/x cannot be read \(.*no_such.*\); look at the network"):
        open_filesystem("s3://bucket/x?no_such=1")
