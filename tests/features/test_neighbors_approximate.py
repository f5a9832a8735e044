"""Approximate neighbours against brute force, at the recall that they state."""

import importlib
import logging

import numpy as np
import pytest
from numpy.typing import NDArray

from cedm_ray.features import inverted_lists, neighbors, unit_rows
from cedm_ray.features.inverted_lists import MIN_RECALL
from cedm_ray.features.neighbors import knn, search_neighbors
from cedm_ray.features.unit_rows import UnitRows


def groups(
    num_images: int, *, dim: int = 16, size: int = 40, spread: float = 0.3, seed: int = 0
) -> NDArray[np.float32]:
    """Embeddings in groups of about ``size`` images."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_images // size, dim), dtype=np.float32)
    noise = spread * rng.standard_normal((num_images, dim), dtype=np.float32)
    return centers[rng.integers(0, len(centers), num_images)] + noise


def cosines(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of all pairs, the image itself at -2; by numpy in float64."""
    x = embeddings.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(norms > 0, norms, 1)
    found = x @ x.T
    np.fill_diagonal(found, -2)
    return found


def recall(embeddings: NDArray[np.float32], indices: NDArray[np.int32]) -> float:
    """Share of the neighbours that are as similar as the k-th exact one."""
    all_pairs = cosines(embeddings)
    kth = -np.sort(-all_pairs, axis=1)[:, indices.shape[1] - 1]
    return float((np.take_along_axis(all_pairs, indices.astype(np.int64), 1) >= kth[:, None] - 1e-6).mean())


def check_whole(indices: NDArray[np.int32], num_images: int, k: int) -> None:
    assert indices.shape == (num_images, k) and indices.dtype == np.int32
    assert indices.min() >= 0 and indices.max() < num_images
    assert not (indices == np.arange(num_images)[:, None]).any()
    assert (np.diff(np.sort(indices, axis=1), axis=1) > 0).all()


def test_the_recall_is_what_brute_force_finds(caplog: pytest.LogCaptureFixture) -> None:
    embeddings = groups(3000, spread=0.65)  # the groups overlap
    with caplog.at_level(logging.INFO, logger="cedm_ray.features"):
        found = search_neighbors(embeddings, 20, use_gpu=False, method="approximate")
    check_whole(found.indices, 3000, 20)
    assert found.method == "approximate"
    assert MIN_RECALL <= found.recall < 1
    assert recall(embeddings, found.indices) == pytest.approx(found.recall, abs=0.01)
    assert f"recall {found.recall:.4f} of 20 neighbours with" in caplog.text
    ordered = np.take_along_axis(cosines(embeddings), found.indices.astype(np.int64), 1)
    assert (np.diff(ordered, axis=1) < 1e-6).all()


def test_more_lists_are_probed_until_the_recall_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = groups(3000)
    monkeypatch.setattr(inverted_lists, "_FIRST_PROBES", 1)
    monkeypatch.setattr(inverted_lists, "MIN_RECALL", 0.3)
    few = search_neighbors(embeddings, 20, use_gpu=False, method="approximate")
    monkeypatch.setattr(inverted_lists, "MIN_RECALL", 0.97)
    many = search_neighbors(embeddings, 20, use_gpu=False, method="approximate")
    assert few.recall < 0.97 <= many.recall
    assert recall(embeddings, few.indices) < 0.98 and recall(embeddings, many.indices) >= 0.96


def test_without_any_structure_the_search_is_exact() -> None:
    embeddings = np.random.default_rng(0).standard_normal((2500, 64), dtype=np.float32)
    found = search_neighbors(embeddings, 10, use_gpu=False, method="approximate")
    assert (found.method, found.recall) == ("exact", 1.0)
    np.testing.assert_array_equal(found.indices, knn(embeddings, 10, use_gpu=False, method="exact"))


def test_the_same_embeddings_give_the_same_neighbours_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = groups(2500)
    first = search_neighbors(embeddings, 15, use_gpu=False, method="approximate")
    again = search_neighbors(embeddings, 15, use_gpu=False, method="approximate")
    monkeypatch.setattr(unit_rows, "BLOCK", 700)
    in_blocks = search_neighbors(embeddings, 15, use_gpu=False, method="approximate")
    assert first.method == again.method == in_blocks.method == "approximate"
    assert first.recall == again.recall
    np.testing.assert_array_equal(first.indices, again.indices)
    assert (first.indices == in_blocks.indices).mean() > 0.99


def test_the_number_of_images_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = groups(2000)
    assert search_neighbors(embeddings, 5, use_gpu=False).method == "exact"
    monkeypatch.setitem(neighbors.EXACT_UP_TO, "cpu", 2000)
    assert search_neighbors(embeddings, 5, use_gpu=False).method == "exact"
    monkeypatch.setitem(neighbors.EXACT_UP_TO, "cpu", 1999)
    assert search_neighbors(embeddings, 5, use_gpu=False).method == "approximate"
    assert search_neighbors(embeddings, 5, use_gpu=False, method="exact").method == "exact"
    assert knn(embeddings, 5, use_gpu=False).shape == (2000, 5)


def test_duplicates_and_black_images_find_others() -> None:
    embeddings = groups(2500)
    embeddings[:60] = embeddings[0]
    embeddings[2400:] = 0
    found = search_neighbors(embeddings, 20, use_gpu=False, method="approximate")
    assert found.method == "approximate"
    check_whole(found.indices, 2500, 20)
    assert (found.indices[:60] < 60).all()
    assert recall(embeddings, found.indices) > MIN_RECALL - 0.01


def test_images_whose_lists_are_too_short_have_exact_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = groups(2500, size=10, spread=0.05)
    shortened = []
    plain = inverted_lists.exact

    def noted(rows: UnitRows, queries: NDArray[np.int64], k: int) -> inverted_lists._Found:
        shortened.append(queries)
        return plain(rows, queries, k)

    monkeypatch.setattr(inverted_lists, "exact", noted)
    monkeypatch.setattr(inverted_lists, "_FIRST_PROBES", 1)
    monkeypatch.setattr(inverted_lists, "MIN_RECALL", 0.1)
    monkeypatch.setattr(inverted_lists, "BLOCK", 100)
    found = search_neighbors(embeddings, 30, use_gpu=False, method="approximate")
    assert found.method == "approximate"
    check_whole(found.indices, 2500, 30)
    short = np.concatenate(shortened[1:])  # the first are those of the recall
    assert len(short) > 100 and len(shortened) > 2
    assert (found.indices[short] == knn(embeddings, 30, use_gpu=False)[short]).mean() > 0.999


def test_exact_neighbours_of_some_rows_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_rows, "BLOCK", 64)  # fewer rows than neighbours are asked for
    embeddings, some = groups(500), np.array([3, 64, 499])
    found = inverted_lists.exact(UnitRows(embeddings), some, 90)
    expected = np.argsort(-cosines(embeddings), axis=1)[some, :90]
    assert (found.indices == expected).mean() > 0.99
    np.testing.assert_allclose(
        found.cosines, np.take_along_axis(cosines(embeddings)[some], found.indices, 1), atol=1e-6
    )


def test_bad_embeddings_are_refused() -> None:
    embeddings = groups(2500)
    embeddings[2499, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        knn(embeddings, 5, use_gpu=False, method="approximate")
    with pytest.raises(ValueError, match=r"k is 2500; it must lie in \[1, 2500\)"):
        knn(embeddings, 2500, use_gpu=False, method="approximate")


def test_a_mapped_file_is_searched_without_reading_it_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = groups(2500)
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    expected = search_neighbors(embeddings, 5, use_gpu=False, method="approximate")
    monkeypatch.setattr(unit_rows, "BLOCK", 400)
    monkeypatch.setattr(inverted_lists, "_TRAINING_IMAGES", 2)
    asked, plain = [], UnitRows.__getitem__
    monkeypatch.setattr(UnitRows, "__getitem__", lambda self, rows: (asked.append(rows), plain(self, rows))[1])
    found = search_neighbors(mapped, 5, use_gpu=False, method="approximate")
    sizes = [len(range(*rows.indices(2500))) if isinstance(rows, slice) else len(rows) for rows in asked]
    assert max(sizes) <= 500
    assert recall(embeddings, found.indices) == pytest.approx(recall(embeddings, expected.indices), abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_a_gpu_finds_as_many(method) -> None:
    faiss = importlib.import_module("faiss")
    assert faiss.get_num_gpus() > 0
    embeddings = groups(20_000, dim=64, size=200)
    found = search_neighbors(embeddings, 50, use_gpu=True, method=method)
    check_whole(found.indices, 20_000, 50)
    assert found.method == method
    assert found.recall >= MIN_RECALL
    exact = knn(embeddings, 50, use_gpu=False, method="exact")
    shared = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found.indices, exact, strict=True)])
    assert shared > found.recall - 0.02
