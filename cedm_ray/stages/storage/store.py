"""Everything expensive is kept under a key made from its inputs, and is read instead of made the second time."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError
from cedm_ray.stages.storage import bucket
from cedm_ray.stages.storage.bucket_entries import FACTS, fetch_entry, keep_entry
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.storage.storage_errors import Disk, Need
from cedm_ray.weights.listing import Listing, seal_fits, sealed
from cedm_ray.weights.whole_file import whole_file

_LOG = logging.getLogger(__name__)


def key_of(inputs: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for these inputs (plain JSON values)."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def read_json(path: Path) -> Any | None:
    """The value in a JSON file, or None where the file is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Store:
    """A folder of finished things: ``<root>/<kind>/<key>/`` with ``facts.json`` beside the files."""

    root: Path

    def path(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Where the thing that is made from these inputs lies or will lie."""
        return self.root / kind / key_of(inputs)

    def facts(self, path: Path) -> dict[str, Any] | None:
        """The facts of a finished entry, or None where there is none.

        An entry that is not as its facts list it is set aside first: its folder is renamed, and it counts as missing.
        Sizes are looked at every time; a file's content is read once per process, and again if it was written since.
        """
        facts, fault = _look(path)
        if fault is not None:
            set_aside(path, fault)
        if facts is None and fetch_entry(path):
            facts, _ = _look(path)
        return facts

    @contextmanager
    def create(self, path: Path, inputs: Mapping[str, Any], facts: dict[str, Any]) -> Iterator[Path]:
        """A scratch folder that becomes the entry when the block ends without an error.

        Args:
            path: The entry, from :meth:`path`.
            inputs: What the key was made from; kept in the facts.
            facts: More facts; the block may still add to the dictionary.
        """
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            scratch.mkdir(parents=True)
            yield scratch
            listed = Listing.of(scratch).values()
            write_json(scratch / FACTS, sealed({**facts, "inputs": dict(inputs), **listed}))
            if self.facts(path) is None:  # else another process was quicker with the same thing
                if keep_entry(path, scratch):
                    _into_place(scratch, path)
                else:
                    fetch_entry(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _look(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The facts of an entry that is whole, or what is wrong with it; neither where there is none."""
    if not path.is_dir():
        return None, None
    facts = read_json(path / FACTS)
    if not isinstance(facts, dict):
        return None, f"{FACTS} is missing or torn"
    try:
        fault = Listing.read(facts).fault(path) if seal_fits(facts) else f"{FACTS} was changed"
    except ValueError as error:
        fault = f"{FACTS}: {error}"
    return (facts, None) if fault is None else (None, fault)


def set_aside(path: Path, fault: str) -> None:
    """Rename the folder of something that is not whole, and say so; only one of several processes does.

    Args:
        path: The folder; ``<name>.torn-1`` and so on are where it may go.
        fault: What is wrong with it.
    """
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.torn-{number}")
        if aside.exists():
            continue
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was quicker
            return
        except OSError:
            if aside.exists():  # another process took the name
                continue
            raise
        break
    if _look(aside)[0] is not None:  # made anew by another process since it was looked at
        _into_place(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        return
    _LOG.warning("%s is not whole (%s): kept as %s, and made anew", path, fault, aside.name)


def _into_place(folder: Path, path: Path) -> None:
    """Rename a whole folder to its place, unless another process has put the same thing there just now."""
    try:
        folder.rename(path)
    except OSError:
        if _look(path)[0] is None:
            raise


@contextmanager
def for_this_user() -> Iterator[None]:
    """What is made inside, also by processes that are started there, is open to this user alone.

    Processes on other nodes have a mask of their own, but write below folders that were made here.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def prepare_storage(path: Path) -> Path:
    """The absolute storage folder, made if need be (for this user alone) and tried for writing.

    Raises:
        UserError: If nothing can be written there.
    """
    path = path.expanduser().absolute()
    probe = path / f".writable-{uuid.uuid4().hex}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        fault = find_fault(error)
        if fault is not None:
            raise Disk.storage(path).error(replace(fault, path=None), Need("what a search stores", 0)) from error
        raise UserError(
            f"storage path {path} cannot be written ({error.strerror}); give another with --storage-path"
        ) from error
    bucket.refuse_if_unwritable(path)
    return path
