"""Whether what a search makes can be kept: the storage path and the tracking store."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cedm_ray.stages.checkup.finding import Finding
from cedm_ray.stages.checkup.web import answer_of
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.storage.storage_errors import Disk, Need
from cedm_ray.weights.whole_file import whole_file

PROBE_BYTES = 2**20
DATABASE_TIMEOUT_S = 2.0
_SQLITE = "sqlite:///"


@contextmanager
def scratch_folder(storage: Path) -> Iterator[Path]:
    """A folder below the storage path for the length of the block; what had to be made for it goes with it.

    Raises:
        OSError: If it cannot be made.
    """
    folder = storage / f".checkup-{uuid.uuid4().hex[:8]}"
    made = [folder, *(path for path in folder.parents if not path.exists())]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        for file in folder.iterdir():
            file.unlink()
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def write_probe(file: Path) -> None:
    """Write a file as checkpoints are written: beside its place, through to the disk, then moved there.

    Raises:
        OSError: If the folder is missing, read-only or full.
    """
    with whole_file(file) as partial, partial.open("wb") as out:
        out.write(bytes(PROBE_BYTES))
        out.flush()
        os.fsync(out.fileno())


def the_search() -> Need:
    """What is to be written where nothing is known of the search."""
    return Need("what a search stores", PROBE_BYTES)


def storage_finding(storage: Path, need: Callable[[], Need] = the_search) -> Finding:
    """Whether this process can write to the storage path.

    Args:
        storage: The folder; it is made for the probe if need be.
        need: Says what is to be written there; asked when it is wanted.
    """
    try:
        with scratch_folder(storage) as folder:
            write_probe(folder / "probe")
    except OSError as error:
        fault = find_fault(error)
        if fault is not None and fault.kind != "refused":
            return Finding.refused("storage", Disk.storage(storage).error(fault, need()))
        return Finding(
            "storage", "fail", f"{storage} cannot be written ({error.strerror})",
            "give another folder with --storage-path, or see to its rights and its room",
        )  # fmt: skip
    return Finding("storage", "ok", f"{storage} can be written")


def is_server(uri: str) -> bool:
    """Whether a tracking URI is of a server, which is asked over the network."""
    return uri.startswith(("http://", "https://"))


def store_finding(uri: str) -> Finding:
    """Whether a tracking store without a server can be written.

    Args:
        uri: Tracking URI: ``sqlite:///`` with a path, or any other but a server's.
    """
    scheme = uri.partition(":")[0]
    if uri.startswith(_SQLITE):
        return _database_finding(uri)
    if scheme == "file" or ("://" not in uri and scheme != "databricks"):
        fix = "give --tracking-uri sqlite:///FILE or http://HOST:PORT"
        return Finding("tracking", "fail", f"{uri} is a folder, to which MLflow writes no longer", fix)
    fix = "start the search: it says at once whether the store answers"
    return Finding("tracking", "warn", f"a store of the kind {scheme} is not tried here", fix)


def _database_finding(uri: str) -> Finding:
    file = Path(uri.removeprefix(_SQLITE))
    there = file.exists()
    try:
        if there:
            with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=DATABASE_TIMEOUT_S,
                                         isolation_level=None)) as database:  # fmt: skip
                database.execute("BEGIN IMMEDIATE")
                database.execute("CREATE TABLE checkup_probe (x)")  # a lock alone is granted on a read-only file too
                database.execute("ROLLBACK")
        else:
            with scratch_folder(file.absolute().parent) as folder:
                write_probe(folder / "probe")
    except (sqlite3.Error, OSError) as error:
        fix = "end whoever holds it, see to its rights, or give another --tracking-uri"
        return Finding("tracking", "fail", f"{file} cannot be written ({error})", fix)
    return Finding("tracking", "ok", f"{file} can be written" + ("" if there else " and will be made"))


def server_finding(uri: str) -> Finding:
    """Whether an MLflow server answers.

    Args:
        uri: Tracking URI, ``http://`` or ``https://``.
    """
    scheme, _, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    uri = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"  # a name and password are for nobody to read
    fix = "start it (mlflow server), see to the address and the network, or give another --tracking-uri"
    try:
        status = answer_of(f"{uri.rstrip('/')}/health").status
    except OSError as error:
        return Finding("tracking", "fail", f"{uri} does not answer ({error})", fix)
    if status == 200:
        return Finding("tracking", "ok", f"{uri} answers")
    if status in (401, 403):
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for the search"
        return Finding("tracking", "warn", f"{uri} answers and asks who is there (status {status})", fix)
    return Finding("tracking", "fail", f"{uri} answers /health with status {status}; it is no MLflow server", fix)
