"""Everything expensive is kept under a key made from its inputs, and is read instead of made the second time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cedm_ray.errors import UserError

FACTS = "facts.json"


def key_of(inputs: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for these inputs (plain JSON values)."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            json.dump(value, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any | None:
    """The value in a JSON file, or None where the file is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


@dataclass(frozen=True)
class Store:
    """A folder of finished things: ``<root>/<kind>/<key>/`` with ``facts.json`` beside the files."""

    root: Path

    def path(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Where the thing that is made from these inputs lies or will lie."""
        return self.root / kind / key_of(inputs)

    def facts(self, path: Path) -> dict[str, Any] | None:
        """The facts of a finished entry, or None where it is missing or not whole (its files are not as listed)."""
        facts = read_json(path / FACTS)
        if facts is None:
            return None
        sizes = {name: (path / name).stat().st_size for name in facts["files"] if (path / name).is_file()}
        return facts if sizes == facts["files"] else None

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
            files = {
                file.relative_to(scratch).as_posix(): file.stat().st_size
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            }
            write_json(scratch / FACTS, {**facts, "inputs": dict(inputs), "files": files})
            if self.facts(path) is None:  # else another process was quicker with the same thing
                shutil.rmtree(path, ignore_errors=True)
                scratch.rename(path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove(self, path: Path) -> None:
        """Forget an entry, if it is there."""
        shutil.rmtree(path, ignore_errors=True)


def prepare_storage(path: Path) -> Path:
    """The absolute storage folder, made if need be and tried for writing.

    Raises:
        UserError: If nothing can be written there.
    """
    path = path.expanduser().absolute()
    probe = path / f".writable-{uuid.uuid4().hex}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"storage path {path} cannot be written ({error.strerror}); give another with --storage-path"
        ) from error
    return path
