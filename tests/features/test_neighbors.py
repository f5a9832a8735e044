import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from cedm_ray.features import neighbors, unit_rows
from cedm_ray.features.neighbors import faiss_device, knn


def random_embeddings(seed: int, num_images: int, dim: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((num_images, dim), dtype=np.float32)


def test_neighbours_agree_with_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (neighbors, unit_rows):  # several blocks, the last one incomplete
        monkeypatch.setattr(module, "BLOCK", 100)
    embeddings = random_embeddings(0, 730, 24) + 0.5
    search = NearestNeighbors(n_neighbors=13, metric="cosine", algorithm="brute").fit(embeddings.astype(np.float64))
    wanted = search.kneighbors(return_distance=False)  # without the point itself
    found = knn(embeddings, 13, use_gpu=False)
    assert found.dtype == np.int32
    assert (found == wanted).mean() > 0.999  # float32 may swap two that are all but equally far
    assert np.mean([set(a) == set(b) for a, b in zip(found, wanted, strict=True)]) > 0.99


def test_length_and_scale_of_a_feature_do_not_matter() -> None:
    embeddings = random_embeddings(1, 200, 10)
    scaled = embeddings * np.float32(2.0) ** np.arange(-120, 80, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(knn(embeddings, 5, use_gpu=False), knn(scaled, 5, use_gpu=False))


@pytest.mark.parametrize("k", [1, 3, 30, 59])
def test_duplicates_and_black_images_never_find_themselves(k: int) -> None:
    embeddings = random_embeddings(2, 60, 6)
    embeddings[:20] = embeddings[0]
    embeddings[50:] = 0
    found = knn(embeddings, k, use_gpu=False)
    assert found.shape == (60, k)
    for row, others in enumerate(found):
        assert row not in others and len(set(others)) == k and others.min() >= 0
    if k <= 19:
        assert (found[:20] < 20).all()


def test_read_only_features_are_searched_and_left_as_they_are() -> None:
    embeddings = random_embeddings(3, 50, 6)
    before = embeddings.copy()
    embeddings.flags.writeable = False
    assert knn(embeddings, 4, use_gpu=False).shape == (50, 4)
    np.testing.assert_array_equal(embeddings, before)


@pytest.mark.parametrize("k", [0, 50, 51])
def test_more_neighbours_than_other_images_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}; it must lie in \[1, 50\)"):
        knn(random_embeddings(4, 50, 6), k)


def test_a_feature_that_is_not_finite_is_refused() -> None:
    embeddings = random_embeddings(5, 50, 6)
    embeddings[7, 3] = np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        knn(embeddings, 5)


def test_the_default_device_gives_the_same_answer() -> None:
    assert faiss_device() in ("cpu", "cuda")
    embeddings = random_embeddings(6, 300, 16)
    assert (knn(embeddings, 8) == knn(embeddings, 8, use_gpu=False)).mean() > 0.99


def test_a_gpu_that_does_not_answer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", object, raising=False)
    monkeypatch.setattr(neighbors, "_GPU_PROBE", "import os; os.abort()")
    assert faiss_device() == "cpu"
    assert knn(random_embeddings(7, 20, 4), 3).shape == (20, 3)
    with pytest.raises(RuntimeError, match="use_gpu is true, but no GPU answers faiss; leave it out"):
        knn(random_embeddings(7, 20, 4), 3, use_gpu=True)


@pytest.mark.parametrize("order", ["import torch; from cedm_ray.features.neighbors import knn", "import faiss, torch"])
def test_faiss_and_torch_compute_in_one_process(order: str) -> None:
    program = f"""
import numpy as np
{order}
from cedm_ray.features.neighbors import knn
torch.set_num_threads(2)
x = torch.randn(400, 64)
for _ in range(3):
    found = knn(x.numpy(), 5, use_gpu=False)
    x = x @ (torch.randn(64, 64) / 8)
print(found.shape, bool(torch.isfinite(x).all()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "(400, 5) True", done.stderr
    assert "OMP" not in done.stderr


@pytest.mark.parametrize(("status", "device"), [(0, "cuda"), (-6, "cpu"), (None, "cpu")])
def test_a_gpu_is_used_only_where_a_process_of_its_own_has_found_a_neighbour_there(
    status: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", object, raising=False)

    def probe(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[0] == sys.executable
        if status is None:
            raise subprocess.TimeoutExpired(command, 120)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", probe)
    assert faiss_device() == device
