import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from cedm_ray.clustering import kmeans
from cedm_ray.clustering.kmeans import fit_kmeans
from cedm_ray.errors import UserError

Features = NDArray[np.float32]


def blobs(num_images: int, num_blobs: int, spread: float, seed: int = 0) -> tuple[Features, NDArray[np.int64]]:
    """Features of any length around random directions, and which direction each came from."""
    rng = np.random.default_rng(seed)
    centers, blob = rng.standard_normal((num_blobs, 16)), rng.permutation(num_images) % num_blobs
    points = normalize(centers)[blob] + spread * rng.standard_normal((num_images, 16)) / 4
    return (points * rng.uniform(0.1, 10, size=(num_images, 1))).astype(np.float32), blob


def inertia(points: Features, assignments: NDArray[np.int64], num_clusters: int) -> float:
    units = normalize(points.astype(np.float64))
    return sum(
        float(((units[assignments == c] - units[assignments == c].mean(axis=0)) ** 2).sum())
        for c in range(num_clusters)
        if (assignments == c).any()
    )


@pytest.mark.parametrize("seed", range(5))
def test_well_separated_blobs_are_found_exactly(seed: int) -> None:
    points, blob = blobs(600, 12, spread=0.1, seed=seed)
    found = fit_kmeans(points, 12, seed=seed)
    assert adjusted_rand_score(blob, found.assignments) == 1
    assert found.best_head is None and found.head_losses.size == 0 and (found.max_prob == 1).all()


@pytest.mark.parametrize("num_clusters", [5, 30, 120])
def test_the_objective_is_within_two_per_cent_of_sklearns(num_clusters: int) -> None:
    points, _ = blobs(2000, 40, spread=1.0)
    theirs = KMeans(num_clusters, n_init=5, random_state=0).fit(normalize(points))
    assert inertia(points, theirs.labels_, num_clusters) == pytest.approx(theirs.inertia_, rel=1e-3)
    found = fit_kmeans(points, num_clusters, seed=0)
    assert inertia(points, found.assignments, num_clusters) < 1.02 * theirs.inertia_


def test_at_the_end_each_image_is_nearest_to_the_mean_of_its_cluster() -> None:
    points, _ = blobs(500, 8, spread=1.0, seed=3)
    found = fit_kmeans(points, 10, seed=0, num_iterations=200)
    units = normalize(points.astype(np.float64))
    means = np.stack([units[found.assignments == c].mean(axis=0) for c in range(10)])
    distances = ((units[:, None] - means) ** 2).sum(axis=2)
    own = np.take_along_axis(distances, found.assignments[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(own, distances.min(axis=1), rtol=1e-5)


def test_images_go_to_the_nearest_centroid_also_before_the_iterations_have_converged() -> None:
    faiss = pytest.importorskip("faiss")
    units = normalize(blobs(20_000, 60, spread=1.0)[0])  # three blocks
    settings = faiss.ClusteringParameters()
    settings.niter, settings.min_points_per_centroid = 2, 1
    centroids, assignments = kmeans._train(faiss, units, 50, settings, faiss.IndexFlatL2(16), 1)
    distances = cdist(units, centroids, "sqeuclidean")
    own = np.take_along_axis(distances, assignments[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(own, distances.min(axis=1), atol=1e-5)


def test_all_images_take_part_so_that_a_handful_apart_is_found() -> None:
    points, _ = blobs(6000, 1, spread=0.1)
    points[17:22] *= -1
    found = fit_kmeans(points, 2, seed=0, num_redos=1)
    assert sorted(np.bincount(found.assignments)) == [5, 5995]
    assert len(set(found.assignments[17:22])) == 1


@pytest.mark.parametrize("num_clusters", [2, 7, 39, 40])
@pytest.mark.parametrize("seed", range(4))
def test_every_cluster_is_used_though_most_images_are_duplicates(num_clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = rng.standard_normal((40, 6), dtype=np.float32)
    points = distinct[np.r_[np.arange(40), np.zeros(300, np.int64), rng.integers(0, 3, 300)]]
    found = fit_kmeans(points, num_clusters, seed=seed)
    assert found.utilization_ratio == 1
    if num_clusters == 40:  # then each cluster is one vector
        assert len(set(found.assignments[:40])) == 40 and set(found.assignments[40:340]) == {found.assignments[0]}


@pytest.mark.parametrize("num_clusters", [2, 59, 60])
def test_nearly_equal_vectors_fill_as_many_clusters_as_there_are(num_clusters: int) -> None:
    points = np.ones((60, 4), np.float32)
    points[:, 0] += np.arange(60, dtype=np.float32) * np.float32(1e-6)  # below what faiss tells apart
    assert fit_kmeans(points, num_clusters, seed=0).utilization_ratio == 1


def test_as_many_clusters_as_images_are_one_image_each() -> None:
    points, _ = blobs(50, 5, spread=0.5)
    assert sorted(fit_kmeans(points, 50, seed=0).assignments) == list(range(50))


def test_black_images_are_one_more_vector() -> None:
    points, _ = blobs(90, 3, spread=0.1)
    points[:20] = 0
    found = fit_kmeans(points, 4, seed=0)
    assert found.utilization_ratio == 1 and len(set(found.assignments[:20])) == 1


def test_an_empty_cluster_takes_the_farthest_image_and_what_is_nearer_to_it() -> None:
    units = np.array([[0, 0], [0, 1], [5, 0], [5, 0], [4, 0], [3, 0]], np.float32)
    centroids = np.array([[0, 0], [9, 9], [0, 1]], np.float32)
    # Image 1 lies on its centroid; image 2 is farthest of the rest, and all but image 0 and 1 are nearer to it.
    found = kmeans._fill_empty(units, centroids, np.array([0, 2, 0, 0, 0, 0]))
    np.testing.assert_array_equal(found, [0, 2, 1, 1, 1, 1])


def test_a_cluster_that_the_filling_of_another_empties_is_filled_too() -> None:
    units = np.array([[0, 0], [10, 0], [10, 1]], np.float32)
    centroids = np.array([[0, 0], [8, 0], [99, 0]], np.float32)
    # Image 2 moves to cluster 2 and takes image 1 along, which leaves cluster 1 empty; image 1 then gets it back.
    found = kmeans._fill_empty(units, centroids, np.array([0, 1, 1]))
    np.testing.assert_array_equal(found, [0, 1, 2])


@pytest.mark.parametrize("seed", range(20))
def test_any_assignment_of_enough_distinct_vectors_is_filled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_clusters = int(rng.integers(2, 30))
    distinct = rng.permutation(400)[: num_clusters + int(rng.integers(0, 3))]
    units = np.stack(np.divmod(rng.permutation(np.r_[distinct, rng.choice(distinct, 50)]), 20), axis=1)
    centroids = rng.integers(0, 20, size=(num_clusters, 2)).astype(np.float32)
    given = rng.integers(0, max(1, num_clusters // 3), size=len(units))
    found = kmeans._fill_empty(units.astype(np.float32), centroids, given)
    assert set(found) == set(range(num_clusters))


def test_vectors_that_differ_at_all_are_apart() -> None:
    units = np.array([[1, 0], [1, 1e-44], [np.nextafter(np.float32(1), np.float32(0)), 0]], np.float32)
    distances = kmeans._squared_distances(units, units[:1], np.zeros(3, np.int64))
    assert distances[0] == 0 and distances[1] > 0 and distances[2] > 0
    with pytest.raises(ValueError, match="fewer distinct features than clusters, 3"):
        kmeans._fill_empty(units[[0, 0, 1]], units[[0, 0, 0]], np.array([0, 0, 0]))


def test_too_few_distinct_features_are_refused_with_the_number_there_is() -> None:
    points = np.repeat(np.eye(5, dtype=np.float32), 20, axis=0)
    points[::2] *= 3  # lengths make no new directions
    points[1, 1] = -0.0  # nor do signs of zero
    assert fit_kmeans(points, 5, seed=0).utilization_ratio == 1
    with pytest.raises(UserError, match="100 images have only 5 distinct features; 6 clusters need as many: ask for"):
        fit_kmeans(points, 6, seed=0)


def test_the_same_seed_gives_the_same_clusters_and_another_seed_others() -> None:
    points, _ = blobs(1500, 30, spread=1.5)
    first, again, other = (fit_kmeans(points, 25, seed=seed).assignments for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, fit_kmeans(points, 25, seed=7, threads=2).assignments)
    assert (first != other).any()
    fit_kmeans(points, 25, seed=2**31 - 2**20 - 1)


def test_lengths_do_not_matter_and_read_only_features_are_left_as_they_are() -> None:
    points, _ = blobs(300, 10, spread=1.0)
    scaled = points * np.float32(2.0) ** np.resize(np.arange(-110, 80, dtype=np.float32), 300)[:, None]
    before = scaled.copy()
    scaled.flags.writeable = False
    expected = fit_kmeans(points, 9, seed=0).assignments
    np.testing.assert_array_equal(fit_kmeans(scaled, 9, seed=0).assignments, expected)
    np.testing.assert_array_equal(scaled, before)


def test_the_number_of_threads_of_faiss_is_put_back() -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        fit_kmeans(blobs(60, 3, spread=0.1)[0], 3, seed=0, threads=1)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_a_gpu_that_is_not_there_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("faiss"), "get_num_gpus", lambda: 0)
    with pytest.raises(RuntimeError, match="faiss sees no GPU"):
        fit_kmeans(blobs(60, 3, spread=0.1)[0], 3, seed=0, use_gpu=True)


@pytest.mark.gpu
def test_the_gpu_finds_the_same_blobs() -> None:
    points, blob = blobs(600, 12, spread=0.1)
    assert adjusted_rand_score(blob, fit_kmeans(points, 12, seed=0, use_gpu=True).assignments) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 1}, r"num_clusters is 1; it must lie in \[2, 60\]"),
        ({"num_clusters": 61}, r"num_clusters is 61; it must lie in \[2, 60\]"),
        ({"seed": -1}, "seed is -1; it must lie in"),
        ({"seed": 2**31}, "seed is 2147483648"),
        ({"num_iterations": 0}, "num_iterations is 0; it must be at least 1"),
        ({"num_redos": 0}, "num_redos is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"embeddings": np.ones((60, 3))}, "embeddings are float64"),
        ({"embeddings": np.ones(60, np.float32)}, r"shape \(60,\)"),
        ({"embeddings": np.full((60, 3), np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_arguments_out_of_bounds_are_refused(change: dict[str, object], message: str) -> None:
    given = {"embeddings": blobs(60, 3, spread=0.1)[0], "num_clusters": 3, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        fit_kmeans(**given)  # type: ignore[arg-type]
