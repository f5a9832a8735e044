from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.special import erf, softmax
from sklearn.datasets import make_blobs
from sklearn.neighbors import NearestNeighbors

from cedm_ray.clustering import head_file
from cedm_ray.clustering.head_file import FORMAT, TemiHead, head_probs, load_head, save_head
from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.errors import UserError

SETTINGS = TemiSettings(
    num_heads=3, hidden_dim=16, bottleneck_dim=8, lr=3e-3, teacher_momentum=0.9, teacher_temperature=0.08,
    batch_size=64, epochs=6, warmup_epochs=1,
)  # fmt: skip
Points = NDArray[np.float32]


@pytest.fixture(scope="module")
def points() -> Points:
    values, _ = make_blobs(300, n_features=8, centers=5, cluster_std=1.5, random_state=0)
    found: Points = values.astype(np.float32)
    return found


def trained(points: Points, *, standardize: bool) -> TemiTrainer:
    neighbors = NearestNeighbors(n_neighbors=11).fit(points).kneighbors(points, return_distance=False)[:, 1:]
    settings = replace(SETTINGS, standardize=standardize)
    trainer = TemiTrainer(points, neighbors.astype(np.int32), 12, settings, seed=0, device="cpu")
    list(trainer.epochs())
    return trainer


@pytest.mark.parametrize("standardize", [False, True])
def test_a_head_from_disk_gives_the_training_images_their_clusters_and_probabilities(
    points: Points, standardize: bool, tmp_path: Path
) -> None:
    trainer = trained(points, standardize=standardize)
    clustering = trainer.clustering()
    save_head(trainer.head(), tmp_path / "head.safetensors")
    probs = head_probs(load_head(tmp_path / "head.safetensors"), points)
    assert probs.shape == (300, 12) and probs.dtype == np.float32 and len(set(clustering.assignments)) > 3
    np.testing.assert_array_equal(probs.argmax(1), clustering.assignments)
    np.testing.assert_array_equal(probs.max(1), clustering.max_prob)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["head.safetensors"]


def test_the_probabilities_are_those_of_the_formula_in_float64(points: Points, tmp_path: Path) -> None:
    save_head(trained(points, standardize=True).head(), tmp_path / "head.safetensors")
    t = {name: value.double().numpy() for name, value in load_file(tmp_path / "head.safetensors").items()}
    x = (points.astype(np.float64) - points.mean(0, dtype=np.float64)) / points.std(0, dtype=np.float64)
    hidden = x @ t["hidden_weight"][0].T + t["hidden_bias"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    code = hidden @ t["bottleneck_weight"][0].T + t["bottleneck_bias"]
    code /= np.linalg.norm(code, axis=1, keepdims=True)
    rows = t["last_gain"][0] * t["last_direction"][0] / np.linalg.norm(t["last_direction"][0], axis=1, keepdims=True)
    expected = softmax(code @ rows.T / 0.08, axis=1)
    np.testing.assert_allclose(head_probs(load_head(tmp_path / "head.safetensors"), points), expected, atol=1e-5)


def test_the_blocks_in_which_images_are_computed_change_nothing(
    points: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = trained(points, standardize=True).head()
    whole, before = head_probs(head, points), points.copy()
    monkeypatch.setattr(head_file, "ROWS_OF_ONE_HEAD", 7)
    np.testing.assert_allclose(head_probs(head, points), whole, atol=1e-6)
    np.testing.assert_array_equal(points, before)  # what is given is not standardised in place
    assert head_probs(head, points[:0]).shape == (0, 12)


def test_further_training_does_not_change_a_head_that_was_taken_out(points: Points) -> None:
    trainer = trained(points, standardize=False)
    head = trainer.head()
    before = head_probs(head, points)
    trainer.train(trainer.draw_rows())
    np.testing.assert_array_equal(head_probs(head, points), before)
    with pytest.raises(RuntimeError, match="no epoch has been trained"):
        TemiTrainer(points, np.zeros((300, 1), np.int32), 12, SETTINGS, seed=0, device="cpu").head()


def test_embeddings_of_another_backbone_are_refused(points: Points) -> None:
    head = trained(points, standardize=False).head()
    for wrong in (points[:, :5], points.astype(np.float64), points[0]):
        with pytest.raises(ValueError, match=r"\(N, 8\) float32 is due"):
            head_probs(head, wrong)


def test_parts_that_do_not_fit_one_another_are_refused(points: Points) -> None:
    head = trained(points, standardize=True).head()
    for wrong, said in (
        ({"mean": None}, "mean and std have shapes"),
        ({"std": torch.ones(3)}, "mean and std have shapes"),
        ({"std": torch.zeros(8)}, "not above 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            TemiHead(**{"heads": head.heads, "temperature": 0.1, "mean": head.mean, "std": head.std, **wrong})  # type: ignore[arg-type]


def test_a_file_cut_off_anywhere_is_refused(points: Points, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(UserError, match=r"head\.safetensors does not hold a TEMI head"):
        load_head(path)
    save_head(trained(points, standardize=True).head(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="does not hold a TEMI head") as error:
            load_head(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"format": "another/1"}, {}),
        ({"temperature": "warm"}, {}),
        ({"temperature": "nan"}, {}),
        ({}, {"hidden_weight": torch.zeros(1, 16, 9)}),
        ({}, {"hidden_weight": torch.zeros(16, 8)}),
        ({}, {"last_gain": torch.full((1, 12, 1), torch.nan)}),
        ({}, {"hidden_bias": torch.zeros(1, 16, dtype=torch.float64)}),
        ({}, {"std": torch.zeros(8)}),
        ({}, {"unknown": torch.zeros(2)}),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    points: Points, metadata: dict[str, str], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "head.safetensors"
    save_head(trained(points, standardize=True).head(), path)
    save_file(load_file(path) | tensors, path, metadata={"format": FORMAT, "temperature": "0.1"} | metadata)
    with pytest.raises(UserError, match="does not hold a TEMI head") as error:
        load_head(path)
    assert "\n" not in str(error.value)
