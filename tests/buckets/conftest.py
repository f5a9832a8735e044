"""An S3 server in this process, which counts what it is asked; for the tests of buckets as storage."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from pyarrow import fs


class Asked(list[str]):
    """The requests, as ``METHOD /bucket/key``; ``on_request`` is called before each is answered."""

    on_request: Callable[[str], None] = staticmethod(lambda request: None)

    def count(self, method: str) -> int:  # type: ignore[override]
        return sum(request.startswith(f"{method} ") for request in self)


@contextmanager
def _serving(environment: pytest.MonkeyPatch) -> Iterator[tuple[str, Asked]]:
    """A bucket of its own on a server, to which the environment leads this process and its children."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    app, asked = server._server.app, Asked()

    def counting(request: dict[str, Any], start: Any) -> Any:
        said = f"{request['REQUEST_METHOD']} {request['PATH_INFO']}"
        asked.append(said)
        asked.on_request(said)
        return app(request, start)

    server._server.app = counting
    environment.setenv("AWS_ACCESS_KEY_ID", "me")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"pile-{uuid4().hex[:8]}"
    fs.FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true")[0].create_dir(bucket)
    try:
        yield bucket, asked
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Asked]]:
    with pytest.MonkeyPatch.context() as environment, _serving(environment) as found:
        yield found


@pytest.fixture
def asked(server: tuple[str, Asked]) -> Iterator[Asked]:
    server[1].clear()
    yield server[1]
    server[1].on_request = lambda request: None
