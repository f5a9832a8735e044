"""The files of a folder with their sizes and hashes, by which one that is torn or was changed is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

SEAL = "seal"


@dataclass(frozen=True)
class Listing:
    """What a folder is to hold, by paths relative to it."""

    sizes: Mapping[str, int]
    """Bytes of each file."""
    sha256: Mapping[str, str]
    """64 hexadecimal digits of each file; none where they were not kept."""

    @classmethod
    def of(cls, folder: Path) -> Listing:
        """All files below a folder as they are now; each is read once."""
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        return cls(
            {name: file.stat().st_size for name, file in files.items()},
            {name: file_sha256(file) for name, file in files.items()},
        )

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Listing:
        """From plain JSON values: ``files``, the sizes, and ``sha256``.

        Raises:
            ValueError: If they do not hold these.
        """
        sizes, sha256 = values.get("files"), values.get("sha256", {})
        if not isinstance(sizes, dict) or not isinstance(sha256, dict):
            raise ValueError("it lists no files")
        return cls(sizes, sha256)

    def replaced(self, name: str, file: Path) -> Listing:
        """The listing after ``file`` has taken the place of ``name``; both lie directly in the listed folder."""
        sizes = {**self.sizes, file.name: file.stat().st_size}
        sha256 = {**self.sha256, file.name: file_sha256(file)}
        return Listing(
            {each: size for each, size in sizes.items() if each != name},
            {each: digest for each, digest in sha256.items() if each != name},
        )

    def values(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"files": dict(self.sizes), "sha256": dict(self.sha256)}

    def fault(self, folder: Path, names: Iterable[str] | None = None, *, contents: bool = True) -> str | None:
        """What is wrong with the files in a folder, in words; None where nothing is.

        Args:
            folder: Where they lie.
            names: The files to look at (None: all that are listed).
            contents: Read them, too. Within a process a file is read once, unless it is written again.
        """
        for name in self.sizes if names is None else names:
            fault = self._fault(folder / name, name, contents)
            if fault is not None:
                return f"{name} {fault}"
        return None

    def _fault(self, file: Path, name: str, contents: bool) -> str | None:
        try:
            stat = file.stat()
            if name not in self.sizes:
                return "is not listed"
            if stat.st_size != self.sizes[name]:
                return f"has {stat.st_size:,} bytes instead of {self.sizes[name]:,}"
            if contents and name in self.sha256:
                found = _sha256(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)
                return None if found == self.sha256[name] else "has another content than was written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """The hash of a file; a file with another size, time or inode is another one."""
    return file_sha256(file)


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a hash of themselves."""
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != SEAL}))
    return {**plain, SEAL: _seal(plain)}


def seal_fits(values: Mapping[str, Any]) -> bool:
    """Whether values are as they were sealed; those of earlier versions, which have no seal, are taken as they are."""
    return SEAL not in values or values[SEAL] == _seal({name: values[name] for name in values if name != SEAL})


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, by which results are tied to the weights behind them.

    Args:
        path: Any file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
