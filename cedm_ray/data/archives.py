"""What a ZIP or TAR archive from a stranger must satisfy before a member of it is read.

Nothing is ever extracted to the disk; members are read into memory one by one. All the same an archive that would be
harmful elsewhere is refused as a whole, since nothing that it says can be trusted.
"""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cedm_ray.errors import UserError

MAX_MEMBER_BYTES = 256 * 2**20  # expanded; the largest member of an official archive has 155 MB
MAX_TAR_BYTES = 512 * 2**20  # expanded; the largest official archive has 187 MB
MAX_ZIP_BYTES = 2**40  # expanded; ImageNet at full size has 150 GB
MAX_RATIO = 200  # expanded to stored bytes; PNG and JPEG are compressed already, and JSON reaches some 30
_RATIO_FROM_BYTES = 2**20  # below it a member may be mere zeros
_OTHER = "use an archive from a source that you trust"


def zip_members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The files of a ZIP, in its order, after all its members have been looked at (not read).

    Raises:
        UserError: If a name is absolute, leads upwards or stands there twice; if a member is a link or a device,
            encrypted, compressed by another method than deflate, or expands to more than 256 MiB or 200 times its
            stored size (from 1 MiB on); if all together expand to more than 1 TiB; or if members share stored bytes.
    """
    seen: set[str] = set()
    files, expanded, stored = [], 0, 0
    for member in archive.infolist():
        where = f"{member.filename!r} in {path}"
        _check_name(member.filename, where, seen)
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{where} is a link or a device; only files and folders are read: {_OTHER}")
        if member.is_dir():
            continue
        if member.flag_bits & 0x1:
            raise UserError(f"{where} is encrypted; pack the images again without a password")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{where} is compressed by method {member.compress_type}; pack it again as stored or deflate"
            )
        _check_size(member.file_size, where)
        if member.file_size > max(_RATIO_FROM_BYTES, MAX_RATIO * member.compress_size):
            raise UserError(f"{where} expands to over {MAX_RATIO} times its size, as bombs do; {_OTHER}")
        expanded, stored = expanded + member.file_size, stored + member.compress_size
        files.append(member)
    if expanded > MAX_ZIP_BYTES:
        raise UserError(f"{path} expands to {expanded} bytes; it must stay below {MAX_ZIP_BYTES}: split it")
    if stored > path.stat().st_size:
        raise UserError(f"{path} holds members that share their bytes, as bombs do; {_OTHER}")
    return files


def tar_members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a TAR, in its order, each looked at when its turn comes.

    The caller bounds the size of the whole, by expanding no more than ``MAX_TAR_BYTES``.

    Raises:
        UserError: If a name is absolute, leads upwards or stands there twice; if a member is a link, a device or
            sparse, or has more than 256 MiB.
    """
    seen: set[str] = set()
    for member in archive:
        where = f"{member.name!r} in {path}"
        _check_name(member.name, where, seen)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{where} is a link, a device or sparse; only files and folders are read: {_OTHER}")
        _check_size(member.size, where)
        yield member


def _check_name(name: str, where: str, seen: set[str]) -> None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0][1:2] == ":" or ".." in parts:
        raise UserError(f"{where} has a path that leads out of the archive; {_OTHER}")
    if name in seen:
        raise UserError(f"{where} stands there twice; {_OTHER}")
    seen.add(name)


def _check_size(size: int, where: str) -> None:
    if size > MAX_MEMBER_BYTES:
        raise UserError(f"{where} has {size} bytes; a member must have {MAX_MEMBER_BYTES} at most: {_OTHER}")
