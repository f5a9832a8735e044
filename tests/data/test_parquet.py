import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cedm_ray.data.folder import FolderSource
from cedm_ray.data.images import BadImageError
from cedm_ray.data.parquet import ParquetSource, open_local_parquet
from cedm_ray.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
BLOCK = PIXELS.transpose(0, 3, 1, 2)


def encode(pixels: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True)
    return file.getvalue()


PNGS = [encode(image) for image in PIXELS]


def hugging_face(path: Path, images: list[object], labels: list[int] | None = None, names: object = None) -> Path:
    """As Hugging Face writes a dataset of images: structs of bytes and path, and features in the metadata."""
    columns = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=100)
    return path


def test_what_pandas_writes_comes_back_bit_for_bit(tmp_path: Path) -> None:
    images = [encode(image, "webp" if i % 2 else "png") for i, image in enumerate(PIXELS)]
    frame = pd.DataFrame({"image": images, "label": np.arange(300) % 7, "more": 1.5})
    frame.to_parquet(tmp_path / "data.parquet", row_group_size=70)
    source = open_local_parquet(tmp_path / "data.parquet", 16)
    np.testing.assert_array_equal(source.read(0, 300), BLOCK)
    assert (len(source), source.name, source.channels, source.labels(), source.num_classes) == (
        300,
        "data",
        3,
        None,
        None,
    )
    labelled = open_local_parquet(tmp_path / "data.parquet", 16, label_column=True)
    np.testing.assert_array_equal(labelled.labels(), frame["label"])
    assert (labelled.num_classes, labelled.class_names(), labelled.superclasses()) == (7, None, None)


def test_structs_of_pandas_and_hugging_face_are_read(tmp_path: Path) -> None:
    structs = [{"bytes": data, "path": None} for data in PNGS[:10]]
    pd.DataFrame({"picture": structs}).to_parquet(tmp_path / "a.parquet")
    np.testing.assert_array_equal(
        open_local_parquet(tmp_path / "a.parquet", 16, image_column="picture").read(0, 10), BLOCK[:10]
    )
    hugging_face(tmp_path / "b.parquet", structs, [1, 0] * 5, ["cat", "dog", "wild"])
    source = open_local_parquet(tmp_path / "b.parquet", 16, label_column=True)
    np.testing.assert_array_equal(source.read(0, 10), BLOCK[:10])
    assert (source.num_classes, source.class_names()) == (3, ("cat", "dog", "wild"))


def test_tensors_are_read_in_every_order_of_their_axes(tmp_path: Path) -> None:
    grey = np.repeat(PIXELS[:6, :, :, :1], 3, axis=3).transpose(0, 3, 1, 2)
    for tensors, expected in [
        (PIXELS[:6], BLOCK[:6]),
        (BLOCK[:6], BLOCK[:6]),
        (PIXELS[:6, :, :, 0], grey),
        (PIXELS[:6, :, :, :1], grey),
        (BLOCK[:6, :1], grey),
    ]:
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(tensors))
        pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet", row_group_size=4)
        np.testing.assert_array_equal(open_local_parquet(tmp_path / "a.parquet", 16).read(0, 6), expected)
    with pytest.raises(BadImageError, match=r"row 0 of .*a\.parquet is too small: 16x16"):
        open_local_parquet(tmp_path / "a.parquet", 32).read(0, 1)


def test_files_of_a_folder_follow_one_another_by_name(tmp_path: Path) -> None:
    for name, part in [("b.parquet", PNGS[100:]), (".c.parquet", PNGS[:3]), ("a.parquet", PNGS[:100])]:
        pd.DataFrame({"image": part}).to_parquet(tmp_path / name, row_group_size=33)
    (tmp_path / "readme.md").write_text("x")
    source = open_local_parquet(tmp_path, 16)
    assert (len(source), source.name) == (300, tmp_path.name)
    np.testing.assert_array_equal(source.read(90, 110), BLOCK[90:110])


def test_any_blocks_in_any_order_are_those_of_the_whole(tmp_path: Path) -> None:
    for name, part in [("a.parquet", PNGS[:130]), ("b.parquet", PNGS[130:])]:
        pd.DataFrame({"image": part}).to_parquet(tmp_path / name, row_group_size=100)
    source, rng = open_local_parquet(tmp_path, 16), np.random.default_rng(0)
    spots = [(0, 0), (300, 300), (299, 300), (0, 1), (1, 2), (130, 131), (100, 100), (63, 65), (0, 300), (300, 300)]
    spots += [tuple(sorted(rng.integers(0, 301, 2).tolist())) for _ in range(20)]
    for start, stop in spots:
        np.testing.assert_array_equal(source.read(start, stop), BLOCK[start:stop])
    with pytest.raises(IndexError):
        source.read(0, 301)


def test_a_row_group_of_any_size_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    image = encode(noise)  # 196 kB, and 1,000 of them in one row group
    column = pa.DictionaryArray.from_arrays(pa.array(np.arange(1000) % 2), [image, image[:-1]]).cast(pa.binary())
    pq.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    del column
    pool, source = pa.default_memory_pool(), open_local_parquet(tmp_path / "a.parquet", 8)
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 1
    peak, before = 0, pool.bytes_allocated()
    for start in range(0, 1000, 100):
        for part in source._rows.read(start, start + 100):
            assert len(part) <= 64
            peak = max(peak, pool.bytes_allocated() - before)
    assert peak < 60 * 2**20  # of 196 MB


def test_a_bad_row_is_named_and_the_others_can_be_read(tmp_path: Path) -> None:
    images = [*PNGS[:40], PNGS[40][:80], b"", None, *PNGS[43:200]]
    pd.DataFrame({"image": images}).to_parquet(tmp_path / "a.parquet")
    source = open_local_parquet(tmp_path / "a.parquet", 16)
    with pytest.raises(BadImageError, match=r"row 40 of .*a\.parquet is a damaged image"):
        source.read(0, 200)
    with pytest.raises(BadImageError, match=r"row 41 of .*a\.parquet is no readable"):
        source.read(41, 42)
    with pytest.raises(BadImageError, match=r"row 42 of .*a\.parquet holds no image but null"):
        source.read(42, 43)
    np.testing.assert_array_equal(source.read(43, 200), BLOCK[43:200])
    np.testing.assert_array_equal(source.read(0, 40), BLOCK[:40])
    with pytest.raises(BadImageError, match=r"row 0 of .* is too small: 16x16 pixels"):
        open_local_parquet(tmp_path / "a.parquet", 32).read(0, 1)


def test_a_struct_without_bytes_is_a_bad_image(tmp_path: Path) -> None:
    structs = [{"bytes": PNGS[0], "path": None}, {"bytes": None, "path": "somewhere.png"}, None]
    source = open_local_parquet(hugging_face(tmp_path / "a.parquet", structs), 16)
    for row in (1, 2):
        with pytest.raises(BadImageError, match=rf"row {row} of .* holds no image but null"):
            source.read(row, row + 1)
    np.testing.assert_array_equal(source.read(0, 1), BLOCK[:1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": PNGS[:2]}, r"a\.parquet has no column 'image'; name the one .* --image-column, of 'img'"),
        ({"image": ["a.png", "b.png"]}, r"column 'image' of .*a\.parquet holds .*string; it must hold encoded images"),
        ({"image": [[1.0], [2.0]]}, "it must hold encoded images"),
        ({"image": [{"path": "a.png"}]}, "it must hold encoded images"),
    ],
)
def test_columns_that_hold_no_images_are_refused(
    columns: dict[str, list[object]], message: str, tmp_path: Path
) -> None:
    pd.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        open_local_parquet(tmp_path / "a.parquet", 16)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet holds no rows"):
        open_local_parquet(tmp_path / "a.parquet", 16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0, -1]), r"a\.parquet holds label -1; it must lie in \[0, 100000\)"),
        (pa.array([0, 100_000]), "holds label 100000"),
        (pa.array([0, 2**64 - 1], pa.uint64()), "cannot be read as Parquet"),
        (pa.array([0, None], pa.int64()), "has rows without a label"),
        (pa.array([0.0, 1.0]), "has no column 'label' of whole numbers; leave --folder-labels out"),
        (None, "has no column 'label' of whole numbers"),
    ],
)
def test_wrong_labels_are_refused(labels: pa.Array | None, message: str, tmp_path: Path) -> None:
    columns = {"image": pa.array(PNGS[:2])} | ({} if labels is None else {"label": labels})
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        open_local_parquet(tmp_path / "a.parquet", 16, label_column=True)


def test_a_label_that_has_no_name_is_refused(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "a.parquet", [{"bytes": PNGS[0], "path": None}], [3], ["cat", "dog", "wild"])
    with pytest.raises(UserError, match=r"holds label 3; it must lie in \[0, 3\)"):
        open_local_parquet(path, 16, label_column=True)


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_a_file_that_is_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    pd.DataFrame({"image": PNGS}).to_parquet(tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet"):
        open_local_parquet(path, 16)


def test_flipped_bytes_never_raise_anything_but_a_user_error(tmp_path: Path) -> None:
    path = hugging_face(tmp_path / "a.parquet", [{"bytes": data, "path": None} for data in PNGS[:20]], [0] * 20)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    spots = [*range(60), *rng.integers(0, len(good), 200)]
    for spot in spots:
        path.write_bytes(good[:spot] + bytes([good[spot] ^ (1 << rng.integers(8))]) + good[spot + 1 :])
        try:
            source = open_local_parquet(path, 16, label_column=True)
            source.read(0, min(20, len(source)))
        except UserError as error:
            assert "a.parquet" in str(error) and "\n" not in str(error)


def test_the_fingerprint_follows_files_resolution_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"image": PNGS[:4], "other": PNGS[:4], "label": [0, 1, 2, 3]}).to_parquet(path)

    def sources() -> list[ParquetSource]:
        return [
            open_local_parquet(path, 16),
            open_local_parquet(path, 8),
            open_local_parquet(path, 16, image_column="other"),
            open_local_parquet(path, 16, label_column=True),
        ]

    keys = [source.fingerprint for source in sources()]
    assert len(set(keys)) == 4 and [source.fingerprint for source in sources()] == keys
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert open_local_parquet(path, 16).fingerprint not in keys


def test_images_are_made_square_and_resized_as_in_a_folder(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    (tmp_path / "folder").mkdir()
    image.save(tmp_path / "folder" / "a.jpg")
    pd.DataFrame({"image": [(tmp_path / "folder" / "a.jpg").read_bytes()]}).to_parquet(tmp_path / "a.parquet")
    theirs = FolderSource(tmp_path / "folder", 24).read(0, 1)
    np.testing.assert_array_equal(open_local_parquet(tmp_path / "a.parquet", 24).read(0, 1), theirs)
    with pytest.raises(UserError, match="a Parquet dataset needs a resolution"):
        open_local_parquet(tmp_path / "a.parquet", None)
