import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from cedm_ray.clustering.assignments_file import read_assignments
from cedm_ray.clustering.clustering_io import save_clustering
from cedm_ray.clustering.types import make_clustering
from cedm_ray.errors import UserError

N = 30
CLUSTERS = np.r_[np.random.default_rng(0).integers(0, 7, size=N - 1), 6]
ORDER = np.random.default_rng(1).permutation(N)
Values = np.ndarray[Any, Any]

WRITERS: dict[str, Callable[[Values, Path], Any]] = {
    "a.npy": lambda values, path: np.save(path, values),
    "a.NPY": lambda values, path: path.write_bytes(npy_bytes(values)),
    "a.pt": lambda values, path: torch.save(torch.tensor(values), path),
    "mapping.pt": lambda values, path: torch.save({"assignments": torch.tensor(values), "epoch": 3}, path),
    "old.pth": lambda values, path: torch.save(torch.tensor(values), path, _use_new_zipfile_serialization=False),
    "a.safetensors": lambda values, path: save_file({"assignments": values, "other": np.ones(2)}, path),
    "plain.csv": lambda values, path: path.write_text("".join(f"{value}\n" for value in values)),
    "cluster.csv": lambda values, path: pd.DataFrame({"cluster": values}).to_csv(path, index=False),
    "assignment.csv": lambda values, path: pd.DataFrame({"assignment": values}).to_csv(path, index_label="index"),
    "order.csv": lambda values, path: pd.DataFrame({"cluster": values[ORDER], "index": ORDER}).to_csv(
        path, index=False
    ),
    "windows.csv": lambda values, path: path.write_bytes(
        b"\xef\xbb\xbf cluster \r\n" + b"".join(b'"%d"\r\n' % value for value in values) + b"\r\n\r\n"
    ),
}


def npy_bytes(values: Values) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_clusters_that_were_written(name: str, tmp_path: Path) -> None:
    WRITERS[name](CLUSTERS, tmp_path / name)
    found = read_assignments(tmp_path / name, num_images=N)
    np.testing.assert_array_equal(found.assignments, CLUSTERS)
    assert found.assignments.dtype == np.int64 and found.num_clusters == 7
    assert found.best_head is None and found.head_losses.size == 0 and (found.max_prob == 1).all()
    wider = read_assignments(tmp_path / name, num_images=N, num_clusters=10)
    assert wider.num_clusters == 10 and wider.utilization_ratio == pytest.approx(len(set(CLUSTERS)) / 10)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">i4", "int64", "uint64"])
def test_any_integers_are_read(dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", CLUSTERS.astype(dtype))
    np.testing.assert_array_equal(read_assignments(tmp_path / "a.npy", num_images=N).assignments, CLUSTERS)
    if not dtype.startswith(">"):
        torch.save(torch.tensor(CLUSTERS).to(getattr(torch, dtype)), tmp_path / "a.pt")
        np.testing.assert_array_equal(read_assignments(tmp_path / "a.pt", num_images=N).assignments, CLUSTERS)


def test_the_file_may_change_once_it_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", CLUSTERS)
    found = read_assignments(tmp_path / "a.npy", num_images=N)
    with (tmp_path / "a.npy").open("r+b") as file:
        file.write(b"\0" * 300)
    np.testing.assert_array_equal(found.assignments, CLUSTERS)


def test_a_saved_clustering_keeps_its_number_of_clusters_but_not_its_heads(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    heads = {"max_prob": np.full(N, 0.5, np.float32), "head_losses": np.ones(2, np.float32), "best_head": 1}
    save_clustering(make_clustering(CLUSTERS, 12, **heads), path)  # type: ignore[arg-type]
    found = read_assignments(path, num_images=N)
    assert found.num_clusters == 12 and found.best_head is None and (found.max_prob == 1).all()
    np.testing.assert_array_equal(found.assignments, CLUSTERS)
    assert read_assignments(path, num_images=N, num_clusters=9).num_clusters == 9


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("at_three", "num_clusters", "message"),
    [
        (-2, None, "puts image 3 in cluster -2; clusters are numbered from 0: renumber them"),
        (30, None, "names cluster 30 for 30 images"),
        (8, 8, r"puts image 3 in cluster 8; with 8 clusters it must lie in \[0, 8\): give at least 9 clusters"),
        (6, 31, r"31 clusters are given for .*; for 30 images they must lie in \[1, 30\]"),
        (6, 0, "0 clusters are given"),
    ],
)
def test_clusters_out_of_range_are_refused(
    name: str, at_three: int, num_clusters: int | None, message: str, tmp_path: Path
) -> None:
    values = CLUSTERS.copy()
    values[3] = at_three
    WRITERS[name](values, tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        read_assignments(tmp_path / name, num_images=N, num_clusters=num_clusters)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_another_number_of_images_is_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](CLUSTERS, tmp_path / name)
    for num_images in (N - 1, N + 1):
        with pytest.raises(UserError, match=rf"{name} holds .* of shape \(30,\); the dataset has {num_images}"):
            read_assignments(tmp_path / name, num_images=num_images)


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "old.pth", "a.safetensors"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (CLUSTERS.astype(np.float32), "holds float32; clusters must be whole numbers"),
        (np.where(CLUSTERS == 2, np.nan, CLUSTERS), "holds float64"),
        (CLUSTERS > 2, "holds bool"),
        (CLUSTERS[:, None], r"shape \(30, 1\)"),
        (CLUSTERS[:0], r"shape \(0,\)"),
        (np.array(3), r"shape \(\)"),
    ],
)
def test_arrays_of_another_kind_are_refused(name: str, values: Values, message: str, tmp_path: Path) -> None:
    WRITERS[name](values, tmp_path / name)
    with pytest.raises(UserError, match=message):
        read_assignments(tmp_path / name, num_images=N)


def test_numbers_beyond_int64_are_refused_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.where(CLUSTERS == 2, np.uint64(2**64 - 1), CLUSTERS.astype(np.uint64)))
    with pytest.raises(UserError, match="names cluster 18446744073709551615"):
        read_assignments(tmp_path / "a.npy", num_images=N)


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "mapping.pt", "old.pth", "a.safetensors"])
def test_a_file_cut_off_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    WRITERS[name](CLUSTERS, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), 41):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{name} is no .* file of assignments") as caught:
            read_assignments(tmp_path / name, num_images=N)
        assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_objects_are_refused_and_nothing_in_them_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([Trap()] * N, object), allow_pickle=True)
    Path("pickle.npy").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), "object.pt")
    torch.save({"assignments": torch.tensor(CLUSTERS), "more": Trap()}, "beside.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Trap()))
    Path("pickle.safetensors").write_bytes(pickle.dumps(Trap()))
    for name in ("object.npy", "pickle.npy", "object.pt", "beside.pt", "pickle.pt", "pickle.safetensors"):
        with pytest.raises(UserError, match=f"{name} is no .* which are not loaded") as caught:
            read_assignments(Path(name), num_images=N)
        assert "allow_pickle" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not Path("trapped").exists()
    pickle.loads(Path("pickle.npy").read_bytes())  # the trap itself works
    assert Path("trapped").exists()


@pytest.mark.parametrize("shape", [b"(99999999999999,)", b"(99999999999999999999999,)", b"(-30,)", b"('a',)"])
def test_a_header_that_claims_what_is_not_there_is_refused(shape: bytes, tmp_path: Path) -> None:
    whole = npy_bytes(CLUSTERS)
    header, body = whole[:128], whole[128:]
    header = header.rstrip(b" \n").replace(b"(30,)", shape).ljust(127) + b"\n"
    (tmp_path / "a.npy").write_bytes(header + body)
    with pytest.raises(UserError, match="cut off, damaged"):
        read_assignments(tmp_path / "a.npy", num_images=N)


def test_tensors_that_are_not_one_plain_tensor_are_refused(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.pt", torch.tensor(CLUSTERS)
    torch.save({"a": plain, "b": plain}, path)
    with pytest.raises(UserError, match="holds 2 tensors; it must hold one"):
        read_assignments(path, num_images=N)
    for content in ({}, [plain], {"epoch": 3}, "text"):
        torch.save(content, path)
        with pytest.raises(UserError, match="holds 0 tensors"):
            read_assignments(path, num_images=N)
    for tensor in (plain.to_sparse(), plain.to("meta"), plain.to(torch.bfloat16)):
        torch.save(tensor, path)
        with pytest.raises(UserError, match=r"is no \.pt file of assignments"):
            read_assignments(path, num_images=N)
    torch.save(torch.zeros(1, dtype=torch.int64).expand(10**13), path)
    with pytest.raises(UserError, match=r"shape \(10000000000000,\)"):
        read_assignments(path, num_images=N)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"clusters": torch.tensor(CLUSTERS)}, None),
        ({"assignments": torch.tensor(CLUSTERS).to(torch.bfloat16)}, None),
        ({"assignments": torch.tensor(CLUSTERS)}, {"num_clusters": "many"}),
    ],
)
def test_safetensors_without_readable_assignments_are_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    save_torch_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"is no \.safetensors file of assignments"):
        read_assignments(tmp_path / "a.safetensors", num_images=N)


def test_an_absurd_number_of_clusters_beside_the_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"assignments": CLUSTERS}, tmp_path / "a.safetensors", metadata={"num_clusters": "99999999999999"})
    with pytest.raises(UserError, match=r"99999999999999 clusters .* must lie in \[1, 30\]"):
        read_assignments(tmp_path / "a.safetensors", num_images=N)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"shape \(0,\)"),
        ("cluster\n", r"shape \(0,\)"),
        ("1\n2.0\n3\n", "'2.0' in row 2; only whole numbers"),
        ("cluster\n1\nnan\n3\n", "'nan' in row 3"),
        ("1\n\n3\n", "0 values in row 2; 1 due"),
        ("cluster,index\n1,0\n,1\n2,2\n", "'' in row 3"),
        ("1\n1_0\n3\n", "'1_0' in row 2"),
        ("1\n9999999999999999999\n3\n", "'9999999999999999999' in row 2"),
        ("1\n٣\n3\n", "'٣' in row 2"),
        ("1,2\n3,4\n5,6\n", "2 values in row 1; 1 due in each row: repair it, or give columns a header"),
        ("index,cluster\n0,1\n1,2,5\n2,2\n", "3 values in row 3; 2 due"),
        (",cluster\n0,1\n1,2\n2,2\n", "begins with ',cluster'"),
        ("path,cluster\na,1\nb,2\nc,2\n", "begins with 'path,cluster'; a whole number is due, or a header of"),
        ("index\n0\n1\n2\n", "begins with 'index'"),
        ("cluster,assignment\n0,1\n1,2\n2,2\n", "begins with 'cluster,assignment'"),
        ("cluster,cluster\n0,1\n1,2\n2,2\n", "begins with 'cluster,cluster'"),
        ("1.5\n2\n3\n", "begins with '1.5'; a whole number is due"),
        ("index,cluster\n0,1\n2,2\n2,3\n", "has 2 in its column `index` where 1 is due"),
        ("index,cluster\n1,1\n2,2\n3,3\n", "has 1 in its column `index` where 0 is due; .* each of 0 to 2 once"),
        ("index,cluster\n-1,1\n0,2\n1,3\n", "has -1 in its column `index` where 0 is due"),
        ("1\n\0\n3\n", "row 2|is no .csv file"),
    ],
)
def test_a_csv_with_anything_else_in_it_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_assignments(tmp_path / "a.csv", num_images=3)
    assert "a.csv" in str(caught.value)


@pytest.mark.parametrize("raw", [b"1\n\xff\xfe\n3\n", b'"' + b"1" * 200_000 + b'"\n2\n3\n', b"1\r2\x00\r3"])
def test_a_csv_that_is_no_text_of_rows_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.csv"):
        read_assignments(tmp_path / "a.csv", num_images=3)


def test_unknown_missing_and_unfit_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt ends in '.txt'; assignments are read from \.npy, \.pt, \.pth"):
        read_assignments(tmp_path / "a.txt", num_images=N)
    with pytest.raises(UserError, match=r"a\.npy is no file"):
        read_assignments(tmp_path / "a.npy", num_images=N)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv is no file"):
        read_assignments(tmp_path / "folder.csv", num_images=N)
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, a=CLUSTERS)
    with pytest.raises(UserError, match=r"b\.npy is an archive of arrays"):
        read_assignments(tmp_path / "b.npy", num_images=N)
    with pytest.raises(ValueError, match="num_images is 0"):
        read_assignments(tmp_path / "b.npy", num_images=0)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".csv", ".safetensors"])
def test_a_file_far_too_large_for_the_images_is_not_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # a hole: takes no room on disk
    with pytest.raises(UserError, match="holds 10737418240 bytes; for 30 images it may hold 1050496"):
        read_assignments(path, num_images=N)


def test_a_compressed_archive_counts_with_the_size_of_what_it_holds(tmp_path: Path) -> None:
    torch.save(torch.zeros(500_000, dtype=torch.int64), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", 8) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    assert (tmp_path / "a.pt").stat().st_size < 2**16
    with pytest.raises(UserError, match=r"a.pt holds 4\d{6} bytes"):
        read_assignments(tmp_path / "a.pt", num_images=N)
