from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.metrics.pairwise import cosine_similarity

from cedm_ray.metrics.similarity import mean_similarity_score, similarity_auroc, top1_similarity

Array = NDArray[np.float32]


def features(num: int, seed: int, dim: int = 12) -> Array:
    return np.random.default_rng(seed).standard_normal((num, dim), dtype=np.float32)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_highest_similarity_is_that_of_sklearn_for_every_block(block: int) -> None:
    queries, references = features(60, 0), features(45, 1)
    top1 = top1_similarity(queries, references, block=block)
    assert top1.dtype == np.float32 and top1.shape == (60,)
    np.testing.assert_allclose(top1, cosine_similarity(queries, references).max(1), rtol=0, atol=2e-7)
    np.testing.assert_array_equal(top1, top1_similarity(queries, references))


def test_copies_have_exactly_1_whatever_their_length() -> None:
    references = features(300, 0, dim=700)
    lengths = np.array([1, 0.5, 3], np.float32)[np.arange(300) % 3, None]  # a third is rounded differently
    exact = lengths[:, 0] < 3
    top1 = top1_similarity(references[::-1] * lengths[::-1], references)
    assert np.all(top1[::-1][exact] == 1)
    assert np.all(np.abs(top1 - 1) <= 1.2e-7)


def test_opposite_and_orthogonal_vectors_have_the_closed_form() -> None:
    x = np.array([[2, 0], [0, -1], [3, 4]], np.float32)
    np.testing.assert_allclose(top1_similarity(x, np.array([[-5, 0]], np.float32)), [-1, 0, -0.6], atol=1e-7)


def test_the_order_of_the_references_changes_nothing() -> None:
    queries, references = features(60, 0), features(45, 1)
    np.testing.assert_array_equal(top1_similarity(queries, references), top1_similarity(queries, references[::-1]))


def test_tensors_and_read_only_files_give_the_same(tmp_path: Path) -> None:
    queries, references = features(60, 0), features(45, 1)
    np.save(tmp_path / "references.npy", references)
    mapped = np.load(tmp_path / "references.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        top1_similarity(torch.from_numpy(queries), mapped, block=20), top1_similarity(queries, references)
    )


def test_a_zero_vector_is_refused_by_its_row() -> None:
    x = features(60, 0)
    x[37] = 0
    with pytest.raises(ValueError, match="queries row 37 is a zero vector, which has no direction"):
        top1_similarity(x, features(45, 1), block=10)
    with pytest.raises(ValueError, match="references row 37 is a zero vector, which has no direction"):
        top1_similarity(features(45, 1), x, block=10)


def test_features_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="features have unlike dimensions: queries 12, references 11"):
        top1_similarity(features(5, 0), features(5, 1, dim=11))
    with pytest.raises(ValueError, match="queries holds NaN or infinite values"):
        top1_similarity(np.full((5, 12), np.inf, np.float32), features(5, 1))


def test_mean_similarity_score_is_the_mean_in_float64() -> None:
    assert mean_similarity_score(np.array([0.25, 0.5, -0.75], np.float32)) == 0
    assert mean_similarity_score(np.full(10_000_000, 0.1, np.float32)) == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )


@pytest.mark.parametrize("digits", [7, 1])  # one digit makes many ties
def test_auroc_is_the_mann_whitney_statistic_over_all_pairs(digits: int) -> None:
    rng = np.random.default_rng(0)
    generated = rng.normal(0.2, 1, 300).round(digits).astype(np.float32)
    test = rng.normal(0, 1, 200).round(digits).astype(np.float32)
    expected = float(mannwhitneyu(generated, test).statistic) / (300 * 200)
    assert similarity_auroc(generated, test) == pytest.approx(expected, abs=1e-12)
    assert similarity_auroc(test, generated) == pytest.approx(1 - expected, abs=1e-12)
    assert 0.52 < expected < 0.62


def test_auroc_tells_memorised_from_new_images() -> None:
    training, held_out, new = (features(400, seed) for seed in (0, 1, 2))
    test = top1_similarity(held_out, training)
    assert similarity_auroc(test, test) == 0.5
    assert similarity_auroc(top1_similarity(new, training), test) == pytest.approx(0.5, abs=0.06)
    assert similarity_auroc(top1_similarity(training + 0.001, training), test) == 1
    half = np.concatenate((training[:200], new[:200]))
    assert similarity_auroc(top1_similarity(half, training), test) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("bad", [np.empty(0, np.float32), np.array([np.nan], np.float32), np.ones((2, 1), np.float32)])
def test_similarities_that_mean_nothing_are_refused(bad: Array) -> None:
    good = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="top1 must be finite similarities of shape"):
        mean_similarity_score(bad)
    with pytest.raises(ValueError, match="generated_top1 must be finite"):
        similarity_auroc(bad, good)
    with pytest.raises(ValueError, match="test_top1 must be finite"):
        similarity_auroc(good, bad)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_similarities() -> None:
    queries, references = features(3000, 0, dim=64), features(2500, 1, dim=64)
    np.testing.assert_allclose(
        top1_similarity(queries, references, device="cuda"), top1_similarity(queries, references), rtol=0, atol=1e-7
    )
