import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cedm_ray.data.images import BadImageError, check_size, decode, decode_bytes, open_header, read_encoded
from cedm_ray.errors import UserError


def encoded(kind: str, side: int = 32) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that is nothing but a header with a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95])
def test_an_image_that_is_cut_off_is_named(kind: str, share: float) -> None:
    data = encoded(kind)
    with pytest.raises(BadImageError, match=r"^x\.img is (a damaged|no readable) .*--on-bad-image skip$"):
        decode_bytes(data[: int(len(data) * share)], "x.img", 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_flipped_bytes_raise_nothing_but_a_bad_image(kind: str) -> None:
    data, rng = bytearray(encoded(kind)), np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(data)
        for spot in rng.integers(0, min(len(data), 400), 3):
            broken[spot] = rng.integers(256)
        try:
            assert decode_bytes(bytes(broken), "x", 16).shape == (3, 16, 16)
        except BadImageError as error:
            assert str(error).startswith("x ") and "\n" not in str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9_500, 9_500), (60_000, 60_000), (2**31 - 1, 16)])
def test_a_header_that_promises_too_many_pixels_is_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match=r"^bomb\.png is (too large|no readable)"):
        open_header(io.BytesIO(png_header(*size)), "bomb.png", 16)


def test_an_image_has_to_have_the_resolution() -> None:
    with pytest.raises(BadImageError, match=r"x is too small: 20x40 pixels, and its smaller side must be at least 24"):
        check_size(20, 40, "x", 24)
    check_size(24, 24, "x", 24)


def test_other_formats_are_refused_whatever_they_are_called() -> None:
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(BadImageError, match="no readable PNG, JPEG or WebP"):
            decode_bytes(encoded(kind), "x.png", 16)


def test_one_channel_stays_grey_and_keeps_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    sixteen_bits = pixels.astype(np.uint16) * 256 + 77
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("RGB"), Image.fromarray(sixteen_bits)):
        np.testing.assert_array_equal(decode(image, "x", 16, channels=1), pixels[None])


def test_an_encoded_image_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cedm_ray.data.images.MAX_FILE_BYTES", 2**20)
    assert len(read_encoded(io.BytesIO(bytes(2**20)), "x")) == 2**20
    with pytest.raises(BadImageError, match="x is too large: it has over 1 MiB"):
        read_encoded(io.BytesIO(bytes(2**20 + 1)), "x")


def test_a_disk_that_fails_makes_no_image_bad() -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match="x cannot be read") as caught:
        read_encoded(Failing(), "x")
    assert not isinstance(caught.value, BadImageError)
