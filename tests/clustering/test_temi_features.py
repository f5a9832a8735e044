"""Where features lie: the choice, and that it changes where they are read from but not what is learnt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from cedm_ray.clustering.temi import TemiTrainer
from cedm_ray.clustering.temi_features import Features, Placement, choose_placement, free_bytes
from cedm_ray.clustering.temi_settings import TemiSettings

CPU = torch.device("cpu")
SMALL = TemiSettings(num_heads=3, hidden_dim=16, bottleneck_dim=8, batch_size=128, epochs=2, warmup_epochs=1, lr=3e-3)


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    images = load_digits().data.astype(np.float32)
    neighbors = NearestNeighbors(n_neighbors=21).fit(images).kneighbors(images, return_distance=False)[:, 1:]
    return images, neighbors


@pytest.mark.parametrize(
    ("num_bytes", "free", "placement"),
    [
        (10**15, None, "float32"),
        (40, 80, "float32"),
        (41, 80, "bfloat16"),
        (80, 80, "bfloat16"),
        (81, 80, "streamed"),
        (1, 0, "streamed"),
    ],
)
def test_the_placement_follows_from_size_and_free_memory(num_bytes: int, free: int | None, placement: str) -> None:
    assert choose_placement(num_bytes, free) == placement


def test_a_cpu_always_reads_the_features_where_they_lie() -> None:
    assert free_bytes(CPU) is None


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("placement", ["float32", "streamed", "bfloat16"])
def test_batches_and_blocks_are_rows_of_the_features(placement: Placement, standardize: bool) -> None:
    values = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    values[:, 1] = 0.1
    expected = values
    if standardize:
        expected = (values - values.mean(0)) / np.where(values.std(0) > 1e-6, values.std(0), 1)
        expected[:, 1] = 0
    features = Features(values, standardize=standardize, placement=placement, device=CPU)
    tolerance = 2.0**-8 if placement == "bfloat16" else 1e-5  # bfloat16 keeps 8 bits
    rows = torch.tensor([[3, 0, 3], [49, 7, 1], [20, 21, 22]])
    batches = [batch.clone().numpy() for batch in features.batches(rows, torch.empty(3, 4))]
    np.testing.assert_allclose(batches, expected[rows.numpy()], rtol=tolerance, atol=1e-5)
    blocks = list(features.blocks(20))
    assert [len(block) for block in blocks] == [20, 20, 10] and blocks[0].dtype == torch.float32
    np.testing.assert_allclose(torch.cat(blocks).numpy(), expected, rtol=tolerance, atol=1e-5)
    assert len(features) == 50


@pytest.mark.parametrize("placement", ["float32", "streamed"])
def test_a_mapped_array_is_neither_copied_nor_changed(tmp_path: Path, placement: Placement) -> None:
    values = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    np.save(tmp_path / "features.npy", values)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r", allow_pickle=False)
    features = Features(mapped, standardize=True, placement=placement, device=CPU)
    list(features.batches(torch.arange(50).view(5, 10), torch.empty(10, 4)))
    list(features.blocks(16))
    assert features.source.data_ptr() == mapped.ctypes.data
    np.testing.assert_array_equal(mapped, values)


def test_bfloat16_rounds_after_standardising() -> None:
    values = (1000 + np.random.default_rng(0).normal(size=(100, 1))).astype(np.float32)
    features = Features(values, standardize=True, placement="bfloat16", device=CPU)
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(next(features.blocks(100)).numpy(), expected, rtol=2.0**-8, atol=2e-3)
    assert features.source.dtype == torch.bfloat16


@pytest.mark.parametrize("placement", ["float32", "streamed", "bfloat16"])
def test_features_that_are_not_finite_are_refused(placement: Placement) -> None:
    values = np.zeros((9000, 2), np.float32)
    values[8999, 1] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        Features(values, standardize=False, placement=placement, device=CPU)


@pytest.mark.parametrize("standardize", [False, True])
def test_streamed_features_give_the_very_same_clustering(
    digits: tuple[NDArray[np.float32], NDArray[np.int64]], standardize: bool
) -> None:
    settings = TemiSettings(**{**SMALL.__dict__, "standardize": standardize})
    found = []
    for placement in ("float32", "streamed"):
        trainer = TemiTrainer(*digits, 20, settings, seed=3, device="cpu", placement=placement)
        list(trainer.epochs())
        found.append((trainer.clustering(), trainer.head_utilization()))
    np.testing.assert_array_equal(found[0][0].head_losses, found[1][0].head_losses)
    np.testing.assert_array_equal(found[0][0].assignments, found[1][0].assignments)
    np.testing.assert_array_equal(found[0][0].max_prob, found[1][0].max_prob)
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_bfloat16_features_use_as_many_clusters_as_float32_within_seed_noise(
    digits: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    """r_C deviates by 0.008 from seed to seed (ten of them); the means of three must agree within 0.01."""
    settings = TemiSettings(
        num_heads=2,
        hidden_dim=64,
        bottleneck_dim=32,
        batch_size=256,
        epochs=20,
        warmup_epochs=3,
        lr=3e-3,
        teacher_momentum=0.95,
        standardize=True,
    )
    utilization, losses = {}, {}
    for placement in ("float32", "bfloat16"):
        found = []
        for seed in range(3):
            trainer = TemiTrainer(*digits, 240, settings, seed=seed, device="cpu", placement=placement)
            list(trainer.epochs())
            found.append(trainer.clustering())
        utilization[placement] = np.mean([clustering.utilization_ratio for clustering in found])
        losses[placement] = np.mean([clustering.head_losses for clustering in found])
    assert 0.9 < utilization["float32"] < 0.99
    assert utilization["bfloat16"] == pytest.approx(utilization["float32"], abs=0.01)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]
