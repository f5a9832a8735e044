"""Folders, databases and servers that take what a search makes, and those that do not."""

import errno
import os
import sqlite3
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cedm_ray.stages.checkup.storage import (
    is_server,
    scratch_folder,
    server_finding,
    storage_finding,
    store_finding,
)
from cedm_ray.stages.checkup.web import answer_of


def closed_port() -> int:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_port)


def test_a_folder_that_can_be_written_is_well_and_left_as_it_was(tmp_path: Path) -> None:
    for storage in (tmp_path, tmp_path / "new" / "runs"):
        assert storage_finding(storage).level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_into_a_new_folder_meanwhile_stays(tmp_path: Path) -> None:
    storage = tmp_path / "new" / "runs"
    with scratch_folder(storage) as folder:
        (folder / "probe").touch()
        (storage / "other").touch()
    assert [path.name for path in storage.iterdir()] == ["other"]


def test_a_read_only_file_system_is_told(small_disk: Any) -> None:
    disk = small_disk("1m")
    disk.close()
    finding = storage_finding(disk.path / "runs")
    assert finding.level == "fail" and finding.text.startswith(f"the storage {disk.path}/runs is read-only")
    assert "--storage-path" in finding.fix
    assert store_finding(f"sqlite:///{disk.path}/mlflow.db").level == "fail"


def test_a_full_disk_is_told_and_what_was_begun_is_removed(small_disk: Any) -> None:
    mounted = small_disk("1m").path
    (mounted / "data").write_bytes(bytes(700_000))
    finding = storage_finding(mounted)
    assert finding.level == "fail" and f"the storage {mounted} is full" in finding.text
    assert [path.name for path in mounted.iterdir()] == ["data"]


def test_a_disk_that_is_full_when_data_is_flushed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert f"the storage {tmp_path} is full" in storage_finding(tmp_path).text and list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = storage_finding(tmp_path / "file" / "runs")
    assert finding.level == "fail" and "Not a directory" in finding.text


def test_a_database_that_can_be_written_is_well_and_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE runs (id)")
    before = file.read_bytes()
    assert store_finding(f"sqlite:///{file}").level == "ok"
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_database_that_is_not_there_will_be_made(tmp_path: Path) -> None:
    finding = store_finding(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert finding.level == "ok" and finding.text.endswith("will be made") and list(tmp_path.iterdir()) == []


def test_a_database_that_another_process_holds_is_told(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("CREATE TABLE runs (id)")
    holder.execute("BEGIN EXCLUSIVE")
    finding = store_finding(f"sqlite:///{file}")
    holder.close()
    assert finding.level == "fail" and "database is locked" in finding.text and "--tracking-uri" in finding.fix


def test_a_read_only_database_and_a_file_that_is_none_are_told(small_disk: Any) -> None:
    disk = small_disk("1m")
    mounted = disk.path
    sqlite3.connect(mounted / "mlflow.db").execute("CREATE TABLE runs (id)").connection.close()
    (mounted / "text.db").write_text("these are words, not a database; " * 99)
    assert "not a database" in store_finding(f"sqlite:///{mounted}/text.db").text
    disk.close()
    finding = store_finding(f"sqlite:///{mounted}/mlflow.db")
    assert finding.level == "fail" and "readonly database" in finding.text


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "/tmp/mlruns"])
def test_a_folder_is_no_tracking_store_any_more(uri: str) -> None:
    finding = store_finding(uri)
    assert finding.level == "fail" and "sqlite:///FILE" in finding.fix


@pytest.mark.parametrize("uri", ["postgresql://host/mlflow", "databricks", "databricks://profile"])
def test_stores_of_other_kinds_are_not_judged(uri: str) -> None:
    assert store_finding(uri).level == "warn" and not is_server(uri)


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (401, "warn"), (403, "warn"), (404, "fail"), (500, "fail")])
def test_a_tracking_server_is_judged_by_its_health(web_server: Any, status: int, level: str) -> None:
    uri = web_server(lambda path: status if path == "/health" else 418).url
    finding = server_finding(f"{uri}/")
    assert is_server(uri) and finding.level == level and (finding.fix == "") == (level == "ok")


def test_a_tracking_server_that_is_down_is_told() -> None:
    uri = f"http://127.0.0.1:{closed_port()}"
    finding = server_finding(uri)
    assert finding.level == "fail" and finding.text.startswith(f"{uri} does not answer (") and "refused" in finding.text


def test_a_password_in_the_address_of_a_server_is_not_told(web_server: Any) -> None:
    for status in (200, 401):
        uri = web_server(status).url
        finding = server_finding(uri.replace("://", "://user:secret@"))
        assert finding.text.startswith(f"{uri} answers") and "secret" not in str(finding)
    assert "secret" not in str(server_finding(f"http://user:secret@127.0.0.1:{closed_port()}"))


def test_a_url_that_is_none_is_an_error_of_the_network() -> None:
    for url in ("http://127.0.0.1:port/", "http://[::1/"):
        with pytest.raises(OSError):
            answer_of(url)
