import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cedm_ray.data.folder import FolderSource
from cedm_ray.data.images import BadImageError
from cedm_ray.errors import UserError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_images_of_the_right_size_come_back_bit_for_bit_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for seed, name in enumerate(["b/1.png", "a.PNG", "c.webp", "b/0.png"]):
        noise(16, 16, seed).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path, 16)
    source.check()
    expected = np.stack([np.asarray(noise(16, 16, seed)).transpose(2, 0, 1) for seed in [1, 3, 0, 2]])
    np.testing.assert_array_equal(source.read(0, 4), expected)
    np.testing.assert_array_equal(source.read(1, 3), expected[1:3])
    assert (len(source), source.channels, source.resolution, source.labels()) == (4, 3, 16, None)


def test_the_crop_is_central_and_the_resize_keeps_flat_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (200, 64), "red")
    image.paste("blue", (68, 0, 132, 64))
    image.save(tmp_path / "wide.png")
    pixels = FolderSource(tmp_path, 32).read(0, 1)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.reshape([0, 0, 255], (1, 3, 1, 1)), (1, 3, 32, 32)))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the top becomes the right
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    pixels = FolderSource(tmp_path, 32).read(0, 1)[0, 0].astype(float)
    assert pixels[:, :14].max() < 10
    assert pixels[:, 18:].min() > 245


def test_grey_16_bit_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 100).save(tmp_path / "0.png")
    Image.fromarray(np.full((16, 16), 100 * 256 + 200, dtype=np.uint16)).save(tmp_path / "1.png")
    Image.new("RGB", (16, 16), (10, 20, 30)).quantize(2).save(tmp_path / "2.png")
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "3.png")
    pixels = FolderSource(tmp_path, 16).read(0, 4)[:, :, 8, 8]
    np.testing.assert_array_equal(pixels, [[100] * 3, [100] * 3, [10, 20, 30], [255] * 3])


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in ["a.png", ".b.png", ".cache/c.png"]:
        noise(16, 16).save(tmp_path / name)
    assert len(FolderSource(tmp_path, 16)) == 1


def test_links_stay_inside_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    noise(16, 16).save(root / "a.png")
    noise(16, 16).save(outside / "b.png")
    (root / "loop").symlink_to(root)
    (root / "elsewhere").symlink_to(outside)
    (root / "same.png").symlink_to(root / "a.png")
    assert len(FolderSource(root, 16)) == 2
    (tmp_path / "alias").symlink_to(root)
    assert FolderSource(tmp_path / "alias", 16).fingerprint == FolderSource(root, 16).fingerprint
    (root / "out.png").symlink_to(outside / "b.png")
    with pytest.raises(UserError, match=r"out\.png leads out of the folder"):
        FolderSource(root, 16)


def test_the_fingerprint_follows_names_sizes_times_and_resolution(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(16, 16).save(path)
    keys = [FolderSource(tmp_path, 16).fingerprint, FolderSource(tmp_path, 8).fingerprint]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    keys.append(FolderSource(tmp_path, 16).fingerprint)
    path.rename(tmp_path / "b.png")
    keys.append(FolderSource(tmp_path, 16).fingerprint)
    assert len(set(keys)) == 4
    assert FolderSource(tmp_path, 16).fingerprint == keys[-1]


@pytest.mark.parametrize("resolution", [4, 260, 30, 0, -8])
def test_a_resolution_out_of_bounds_is_refused(resolution: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"resolution is {resolution}; .*--resolution"):
        FolderSource(tmp_path, resolution)


def test_a_folder_without_a_resolution_or_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resolution"):
        FolderSource(tmp_path, None)
    with pytest.raises(UserError, match="holds no image"):
        FolderSource(tmp_path, 16)


def test_small_broken_and_disguised_images_are_found_by_their_headers(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "0.png")
    path = tmp_path / "1.png"
    noise(40, 24).save(path)
    with pytest.raises(UserError, match=r"1\.png is too small: 40x24 .* at least 32; choose a smaller --resolution"):
        FolderSource(tmp_path, 32).check()
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.png is no readable PNG"):
        FolderSource(tmp_path, 32).check()
    noise(64, 64).save(path, format="GIF")
    with pytest.raises(UserError, match=r"1\.png is no readable PNG"):
        FolderSource(tmp_path, 32).check()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_named_when_it_is_read(suffix: str, tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / f"0.{suffix}")
    path = tmp_path / f"1.{suffix}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"1\.{suffix} is (a damaged|no readable)"):
        FolderSource(tmp_path, 32).read(0, 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 14_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int, tmp_path: Path) -> None:
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png is (too large|no readable)"):
        FolderSource(tmp_path, 32).check()


def test_a_block_outside_the_folder_is_refused(tmp_path: Path) -> None:
    noise(16, 16).save(tmp_path / "a.png")
    with pytest.raises(IndexError):
        FolderSource(tmp_path, 16).read(0, 2)


def test_first_level_folders_are_the_classes_in_sorted_order(tmp_path: Path) -> None:
    for name in ["dog/1.png", "cat/deep/2.png", "Ape/3.png", "cat/0.png", ".hidden/4.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(16, 16).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path, 16, folder_labels=True)
    np.testing.assert_array_equal(source.labels(), [0, 1, 1, 2])  # Ape/3 cat/0 cat/deep/2 dog/1
    assert (source.num_classes, source.class_names(), source.superclasses()) == (3, ("Ape", "cat", "dog"), None)
    plain = FolderSource(tmp_path, 16)
    assert (plain.labels(), plain.num_classes, plain.class_names()) == (None, None, None)
    assert plain.fingerprint != source.fingerprint
    noise(16, 16).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png lies in .* itself, .*or leave --folder-labels out"):
        FolderSource(tmp_path, 16, folder_labels=True)


def test_a_file_that_is_gone_is_no_bad_image(tmp_path: Path) -> None:
    noise(16, 16).save(tmp_path / "a.png")
    source = FolderSource(tmp_path, 16)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png cannot be read \(No such file") as caught:
        source.read(0, 1)
    assert not isinstance(caught.value, BadImageError)


def test_a_name_cannot_break_the_line_of_an_error(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[2Jb.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"a\\n\\x1b\[2Jb\.png is no readable"):
        FolderSource(tmp_path, 16).check()


def test_a_link_to_nothing_and_a_folder_that_cannot_be_listed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    noise(16, 16).save(tmp_path / "a.png")
    scan = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("closed"):  # root may list any folder, so that taking the right away shows nothing
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        with pytest.raises(UserError, match=r"closed cannot be listed \(Permission denied\); allow it to be read"):
            FolderSource(tmp_path, 16)
    for target in ("gone.png", "b.png"):  # the other is a link to itself
        (tmp_path / "b.png").symlink_to(tmp_path / target)
        with pytest.raises(UserError, match=r"b\.png is not a readable file; remove it"):
            FolderSource(tmp_path, 16)
        (tmp_path / "b.png").unlink()
