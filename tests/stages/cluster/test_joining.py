"""Clusters that are not there, are none, or do not let one in: told within seconds."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cedm_ray.config import load
from cedm_ray.errors import UserError
from cedm_ray.stages.cluster import joining
from cedm_ray.stages.cluster.connection import connected
from cedm_ray.stages.cluster.joining import knock, token_file


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    monkeypatch.setattr(joining, "TIMEOUT_S", 0.5)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_something_that_is_no_ray_is_told_apart(silent: str) -> None:
    with pytest.raises(ConnectionError, match=f"something listens at {silent}, but no Ray"):
        knock(silent, {})
    knock(f"ray://{silent}", {})  # Ray Client speaks otherwise: only the port is tried
    knock("auto", {})
    knock("local", {})


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "surely.invalid:6379"])
def test_a_search_is_told_in_one_line_that_its_cluster_is_not_there(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray is asked"))
    started_s = time.monotonic()
    with pytest.raises(UserError, match=f"^the cluster at {address} does not answer ") as caught, connected(load([])):
        pass
    assert "RAY_ADDRESS" in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - started_s < 60


def test_what_ray_says_on_the_way_in_is_one_line(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with\n    Ray: 2.1")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(UserError) as caught, connected(load([])):
        pass
    assert str(caught.value).startswith(
        "the cluster at auto does not answer (Version mismatch: The cluster was started"
    )


def test_the_token_is_looked_for_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert joining._token({"RAY_AUTH_MODE": "token"}) is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home\n")
    (tmp_path / "other").write_text("of the path")
    mode = {"RAY_AUTH_MODE": "token"}
    assert joining._token(mode) == "of the home"
    assert joining._token({**mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}) == "of the path"
    assert joining._token({**mode, "RAY_AUTH_TOKEN_PATH": "x", "RAY_AUTH_TOKEN": "given"}) == "given"
    assert joining._token({"RAY_AUTH_TOKEN": "given"}) is None  # Ray shows none then


def test_the_token_has_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = tmp_path / ".ray" / "auth_token"
    assert token_file({}) == token_file({"RAY_AUTH_TOKEN_PATH": ""}) == usual
    assert token_file({"RAY_AUTH_TOKEN_PATH": "~/mine"}, Path("/home/other")) == tmp_path / "mine"
    assert token_file({}, Path("/home/other")) == Path("/home/other/.ray/auth_token")
