import gzip
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from cedm_ray.data.archives import tar_members, zip_members
from cedm_ray.data.cifar_files import read_archive
from cedm_ray.errors import UserError


def write_zip(path: Path, *members: tuple[str, bytes], mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, data)
    return path


def members_of(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [member.filename for member in zip_members(archive, path)]


def test_a_plain_zip_is_listed_in_its_order_without_its_folders(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ("d/", b""), ("d/b..png", b"1"), ("a.png", b"2"), mode=stat.S_IFREG | 0o644)
    assert members_of(path) == ["d/b..png", "a.png"]


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "..\\x.png", "C:/x.png", "c:\\x.png", "\\x.png", ".."]
)
def test_a_path_out_of_the_archive_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.zip has a path that leads out of the archive"):
        members_of(write_zip(tmp_path / "x.zip", ("a.png", b""), (name, b"")))
    with pytest.raises(UserError, match=r"x\.tar\.gz has a path that leads out"):
        read_archive(write_tar(tmp_path / "x.tar.gz", tarfile.TarInfo(name)), ("a",))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused(kind: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'a\.png' in .*x\.zip is a link or a device"):
        members_of(write_zip(tmp_path / "x.zip", ("a.png", b"/etc/passwd"), mode=kind | 0o777))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_in_a_zip_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'a\.png' in .* stands there twice"):
        members_of(write_zip(tmp_path / "x.zip", ("a.png", b"1"), ("a.png", b"2")))


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", ("a.png", b"1"))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption in the central directory
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"'a\.png' in .* is encrypted; pack the images again without a password"):
        members_of(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(method: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"compressed by method {method}"):
        members_of(write_zip(tmp_path / "x.zip", ("a.png", b"1"), method=method))


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    assert members_of(write_zip(tmp_path / "ok.zip", ("a.png", bytes(2**20)))) == ["a.png"]
    with pytest.raises(UserError, match=r"'a\.png' in .* expands to over 200 times its size"):
        members_of(write_zip(tmp_path / "x.zip", ("a.png", bytes(2**20 + 1))))


def test_sizes_of_members_and_of_the_whole_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write_zip(tmp_path / "x.zip", ("a.png", bytes(100)), ("b.png", bytes(100)), method=zipfile.ZIP_STORED)
    monkeypatch.setattr("cedm_ray.data.archives.MAX_ZIP_BYTES", 199)
    with pytest.raises(UserError, match="expands to 200 bytes; it must stay below 199"):
        members_of(stored)
    monkeypatch.setattr("cedm_ray.data.archives.MAX_MEMBER_BYTES", 99)
    with pytest.raises(UserError, match=r"'a\.png' in .* has 100 bytes; a member must have 99 at most"):
        members_of(stored)
    info = tarfile.TarInfo("a.png")
    info.size = 100
    with pytest.raises(UserError, match=r"'a\.png' in .* has 100 bytes; a member must have 99 at most"):
        read_archive(write_tar(tmp_path / "x.tar.gz", info), ("a.png",))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.png", bytes(range(256)) * 40)
        for i in range(1, 5):
            twin = zipfile.ZipInfo(f"{i}.png")
            first = archive.filelist[0]
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(first, name))
            archive.filelist.append(twin)
    with pytest.raises(UserError, match="share their bytes"):
        members_of(path)


def write_tar(path: Path, *infos: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
    return path


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("cifar/train.bin")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match=r"'cifar/train\.bin' in .* is a link, a device or sparse"):
        read_archive(write_tar(tmp_path / "x.tar.gz", info), ("train.bin",))


def test_a_name_that_stands_in_a_tar_twice_is_refused(tmp_path: Path) -> None:
    twice = write_tar(tmp_path / "x.tar.gz", tarfile.TarInfo("a/train.bin"), tarfile.TarInfo("a/train.bin"))
    with pytest.raises(UserError, match="twice"):
        read_archive(twice, ("train.bin",))
    elsewhere = write_tar(tmp_path / "y.tar.gz", tarfile.TarInfo("a/train.bin"), tarfile.TarInfo("b/train.bin"))
    with pytest.raises(UserError, match=r"holds train\.bin twice"):
        read_archive(elsewhere, ("train.bin",))


def test_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    folder, file = tarfile.TarInfo("cifar"), tarfile.TarInfo("cifar/train.bin")
    folder.type, file.size = tarfile.DIRTYPE, 5
    assert read_archive(write_tar(tmp_path / "x.tar.gz", folder, file), ("train.bin",)) == {"train.bin": bytes(5)}


def test_a_sparse_member_that_claims_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("train.bin")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(2**40)} | {
        "GNU.sparse.map": "0,0",
        "GNU.sparse.numblocks": "1",
    }
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with (
        tarfile.open(path) as tar,
        pytest.raises(UserError, match="link, a device or sparse"),
    ):
        list(tar_members(tar, path))


def test_what_unpacks_to_too_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cedm_ray.data.cifar_files.MAX_TAR_BYTES", 2**20)
    with gzip.open(tmp_path / "x.tar.gz", "wb") as packed:
        packed.write(bytes(2**21))
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        read_archive(tmp_path / "x.tar.gz", ("train.bin",))
