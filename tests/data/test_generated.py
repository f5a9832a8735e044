import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cedm_ray.data.digits import digits
from cedm_ray.data.generated import open_generated
from cedm_ray.data.sources import ArraySource
from cedm_ray.errors import UserError

COLOUR = ArraySource("colour", "1", np.zeros((2, 3, 8, 8), np.uint8), None, None)


def write(folder: Path, side: int = 8, mode: str = "RGB") -> np.ndarray:
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).convert(mode).save(folder / f"{i}.png")
    return images.transpose(0, 3, 1, 2)


def test_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    written = write(tmp_path / "made")
    assert np.array_equal(open_generated(str(tmp_path / "made"), COLOUR).read(0, 3), written)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_is_made_grey_or_colour_as_the_real_images_are(mode: str, tmp_path: Path) -> None:
    write(tmp_path / "made", mode=mode)
    opened = [Image.open(path) for path in sorted((tmp_path / "made").iterdir())]
    grey, colour = (open_generated(str(tmp_path / "made"), like) for like in (digits(), COLOUR))
    assert (grey.channels, colour.channels) == (1, 3) and grey.fingerprint != colour.fingerprint
    np.testing.assert_array_equal(grey.read(0, 3)[:, 0], [np.asarray(image.convert("L")) for image in opened])
    expected = [np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in opened]
    np.testing.assert_array_equal(colour.read(0, 3), expected)


def test_no_image_is_resized(tmp_path: Path) -> None:
    write(tmp_path / "made", side=16)
    with pytest.raises(UserError, match=r"0\.png has 16x16 pixels; 8x8 are due"):
        open_generated(str(tmp_path / "made"), COLOUR).read(0, 1)


def test_a_zip_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "made", mode="L")
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.write(tmp_path / "made" / "0.png", "0.png")
    with pytest.raises(UserError, match=r"have 8 pixels and 1 channels; colour has 8 and 3"):
        open_generated(str(tmp_path / "made.zip"), COLOUR)
    assert len(open_generated(str(tmp_path / "made.zip"), digits())) == 1


def test_what_is_no_folder_and_no_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.tar").write_bytes(b"")
    for name in ("made.tar", "nowhere", "nowhere.zip"):
        with pytest.raises(UserError, match=f"{name}' are no folder and no ZIP"):
            open_generated(str(tmp_path / name), COLOUR)
