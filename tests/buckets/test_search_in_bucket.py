"""The digits search with a bucket as its storage: what a folder gives, on machines that share nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.ports import free_port
from helpers.results import MEASURED, result_of

boto3 = pytest.importorskip("boto3")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

SMALL = [
    "--plain", "--temi.epochs=8", "--temi.warmup-epochs=1", "--bound.c-max=12", "--granularity.rule=fitted",
    "--granularity.num-trials=2", "--granularity.share=0.2", "--granularity.total-kimg=4",
    "--granularity.grace-kimg=2", "--granularity.startup-trials=2", "--score.num-images=200", "--score.num-steps=4",
    "--final.total-kimg=5", "--final.num-images=150", "--final.num-sets=2",
]  # fmt: skip
TIMEOUT_S = 1500
UNLIKE = MEASURED | {"device", "checkpoint_path"}
"""Of a rung: what depends on where it was made and is kept."""


def command(storage: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "cedm_ray.search", "--storage-path", storage, *SMALL, *flags]


def search(storage: str, *flags: str, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        command(storage, *flags), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def scores_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a result must not depend on where it is kept."""
    trials = {
        trial["label"]: [{name: rung[name] for name in rung if name not in UNLIKE} for rung in trial["rungs"]]
        for trial in result["trials"]
    }
    names = ("mean", "std", "scores", "num_clusters", "kimg")
    final = {name: result["final"][name] for name in names}
    return {"trials": trials, "best": result["best"], "tie_set": result["tie_set"], "final": final}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The result of a search in a folder, which a ``file://`` address names, and the weights that it has exported."""
    storage = tmp_path_factory.mktemp("shared") / "runs"
    search(storage.as_uri())
    (weights,) = storage.glob("digits-*/export/model.safetensors")
    return result_of(storage), weights.read_bytes()


def test_a_search_whose_driver_and_copy_are_lost_goes_on_from_the_bucket_alone(
    server: tuple[str, Any], asked: Any, reference: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    uri, first, second = f"s3://{server[0]}/lost", tmp_path / "first", tmp_path / "second"
    log = tmp_path / "first.log"
    with open(log, "w") as out:
        driver = subprocess.Popen(
            command(uri, "--storage-copies", str(first)), stdout=out, stderr=out, start_new_session=True
        )
        deadline_s = time.monotonic() + TIMEOUT_S
        while "unconditional: 4 kimg" not in log.read_text() and driver.poll() is None:
            assert time.monotonic() < deadline_s, log.read_text()[-4000:]
            time.sleep(0.5)
        time.sleep(8)  # longer than records wait until they are in the bucket
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert driver.returncode == -signal.SIGKILL, log.read_text()[-4000:]
    shutil.rmtree(first)
    time.sleep(90)  # the claim of the killed driver ends
    kept = len(asked)
    said = search(uri, "--storage-copies", str(second))
    assert "unconditional: 2 kimg" not in said and "unconditional: 4 kimg" not in said  # nothing is repeated
    assert "reading 1,797 images" not in said
    storage = second / "s3:" / server[0] / "lost"
    result = result_of(storage)
    assert scores_of(result) == scores_of(reference[0])
    (weights,) = storage.glob("digits-*/export/model.safetensors")
    assert weights.read_bytes() == reference[1]
    client = boto3.client("s3")
    key = f"lost/{weights.parents[1].name}"
    there = json.loads(client.get_object(Bucket=server[0], Key=f"{key}/result.json")["Body"].read())
    assert there["final"]["export"] == f"{uri}/{weights.parents[1].name}/export"
    again = search(uri, "--storage-copies", str(tmp_path / "third"))
    assert "all is done" in again
    print(f"requests: {kept} until the driver was killed, {len(asked) - kept} after it")


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A head without CPUs and a worker that sees another, empty folder where the head has its copies."""
    copies = tmp_path / "copies"
    copies.mkdir()
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted to this user")
    port = free_port()
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    address = f"127.0.0.1:{port}"
    env = {**os.environ, "RAY_TMPDIR": f"/tmp/ray-two-{port}", "RAY_AUTH_MODE": "disabled"}
    env["RAY_ADDRESS"] = address  # for the actors, should other instances of Ray run on this host
    head = [*ray, "--head", f"--port={port}", "--num-cpus=0", "--node-ip-address=127.0.0.1", "--dashboard-port=0"]
    worker = [*ray, f"--address={address}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    apart = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(copies), *worker]
    started = []
    try:
        for call, wait_s in ((head, 15), (apart, 15)):
            with open(tmp_path / f"node-{len(started)}.log", "w") as log:
                started.append(subprocess.Popen(
                    call, env=env, stdout=log, stderr=log, start_new_session=True,
                ))  # fmt: skip
            time.sleep(wait_s)
        yield address, copies
    finally:
        for node in reversed(started):
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def test_nodes_that_share_nothing_but_the_bucket_find_the_same(
    server: tuple[str, Any], asked: Any, two_nodes: tuple[str, Path], reference: tuple[dict[str, Any], bytes]
) -> None:
    address, copies = two_nodes
    search(
        f"s3://{server[0]}/two", "--storage-copies", str(copies),
        env={"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    storage = copies / "s3:" / server[0] / "two"
    assert scores_of(result_of(storage)) == scores_of(reference[0])
    assert not list(storage.glob("store/trials/*/features"))  # they were made, and read, on the other node alone
    print(f"requests: {len(asked)}")
