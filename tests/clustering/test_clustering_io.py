import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from cedm_ray.clustering.clustering_io import load_clustering, save_clustering
from cedm_ray.clustering.labels import from_labels
from cedm_ray.clustering.types import Clustering, make_clustering
from cedm_ray.errors import UserError


def example() -> Clustering:
    rng = np.random.default_rng(0)
    return make_clustering(
        rng.integers(0, 9, size=40),
        9,
        max_prob=rng.uniform(0.1, 1, size=40).astype(np.float32),
        head_losses=np.array([-1.5, -2.5, -0.5], np.float32),
        best_head=1,
    )


@pytest.mark.parametrize("clustering", [example(), from_labels(np.array([0, 2, 2]), 3)])
def test_a_clustering_comes_back_from_disk_as_it_was(clustering: Clustering, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_clustering(clustering, path)
    loaded = load_clustering(path, num_images=len(clustering.assignments))
    for field in dataclasses.fields(Clustering):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(clustering, field.name))
        if isinstance(getattr(clustering, field.name), np.ndarray):
            assert getattr(loaded, field.name).dtype == getattr(clustering, field.name).dtype
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_read_only_arrays_can_be_saved(tmp_path: Path) -> None:
    clustering = example()
    clustering.assignments.flags.writeable = False
    save_clustering(clustering, tmp_path / "c.safetensors")
    assert load_clustering(tmp_path / "c.safetensors").best_head == 1


def test_another_number_of_images_is_refused(tmp_path: Path) -> None:
    save_clustering(example(), tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="groups 40 images; the dataset has 41"):
        load_clustering(tmp_path / "c.safetensors", num_images=41)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assignments", np.full(40, 9)),
        ("assignments", np.zeros(39, np.int64)),
        ("assignments", np.zeros(40, np.int32)),
        ("cluster_probs", np.full(9, 1 / 9)),
        ("max_prob", np.full(40, np.nan, np.float32)),
        ("head_losses", np.zeros(1, np.float32)),
        ("head_losses", np.array([0, np.nan, 0], np.float32)),
        ("head_losses", np.zeros((3, 1), np.float32)),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(name: str, value: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_clustering(example(), path)
    save_file(load_file(path) | {name: value}, path, metadata={"num_clusters": "9", "best_head": "1"})
    with pytest.raises(UserError, match="does not hold a clustering"):
        load_clustering(path)


def test_a_missing_cut_off_or_foreign_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match=r"c\.safetensors"):
        load_clustering(path)
    save_clustering(example(), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"c\.safetensors"):
        load_clustering(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(UserError, match=r"c\.safetensors"):
        load_clustering(path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_clustering(example(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="does not hold a clustering"):
            load_clustering(path)


@pytest.mark.parametrize("metadata", [{"num_clusters": "99999999999999"}, {"num_clusters": "nine"}, {"best_head": "3"}])
def test_a_file_with_wrong_numbers_beside_the_arrays_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_clustering(example(), path)
    save_file(load_file(path), path, metadata={"num_clusters": "9", "best_head": "1"} | metadata)
    with pytest.raises(UserError, match="does not hold a clustering"):
        load_clustering(path)


def test_a_file_with_numbers_that_numpy_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_clustering(example(), path)
    tensors = load_torch(path)
    tensors["max_prob"] = tensors["max_prob"].to(torch.bfloat16)
    save_torch(tensors, path, metadata={"num_clusters": "9", "best_head": "1"})
    with pytest.raises(UserError, match="does not hold a clustering"):
        load_clustering(path)


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    save_clustering(example(), tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
