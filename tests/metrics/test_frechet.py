import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from cedm_ray.errors import UserError
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance


def random_gaussian(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((dim, dim))
    return rng.standard_normal(dim), a @ a.T / dim + 0.1 * np.eye(dim)


def rotation(dim: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(9).standard_normal((dim, dim)))[0]


def test_in_one_dimension_it_is_the_distance_of_means_and_deviations() -> None:
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[25.0]])) == pytest.approx(
        3**2 + (5 - 2) ** 2, rel=1e-12
    )


def test_diagonal_and_commuting_covariances_have_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    m1, m2, v1, v2 = rng.random((4, 20)) * 3
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    assert frechet_distance(m1, np.diag(v1), m2, np.diag(v2)) == pytest.approx(expected, rel=1e-10)
    q = rotation(20)
    assert frechet_distance(q @ m1, q @ np.diag(v1) @ q.T, q @ m2, q @ np.diag(v2) @ q.T) == pytest.approx(
        expected, rel=1e-10
    )


def test_equal_distributions_are_at_distance_zero_and_order_does_not_matter() -> None:
    a, b = random_gaussian(64, 0), random_gaussian(64, 1)
    assert 0 <= frechet_distance(*a, *a) < 1e-10
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-12)


@pytest.mark.parametrize("dim", [3, 64, 200])
def test_it_agrees_with_scipys_matrix_root(dim: int) -> None:
    (m1, s1), (m2, s2) = random_gaussian(dim, 0), random_gaussian(dim, 1)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-8)
    tensors = [torch.from_numpy(t) for t in (m1, s1, m2, s2)]
    assert frechet_distance(*tensors) == pytest.approx(expected, rel=1e-8)


def test_it_agrees_with_torch_fidelity_from_the_features_on() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 48, generator=generator)
    fake = torch.randn(500, 48, generator=generator) @ torch.randn(48, 48, generator=generator) * 0.2 + 0.3
    theirs = fid_statistics_to_metric(fid_features_to_statistics(real), fid_features_to_statistics(fake), False)
    ours = []
    for features in (real, fake):
        sums = FeatureSums(48)
        for block in features.split(97):
            sums.update(block)
        ours.extend(sums.mean_cov())
    assert frechet_distance(*ours) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_rank_deficient_covariances_are_exact_to_rounding() -> None:
    q, rng = rotation(60), np.random.default_rng(0)
    v1, v2 = rng.random((2, 60))
    v1[20:], v2[:10], v2[40:] = 0, 0, 0
    expected = ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()
    m = np.zeros(60)
    assert frechet_distance(m, (q * v1) @ q.T, m, (q * v2) @ q.T) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(m, np.zeros((60, 60)), m, (q * v2) @ q.T) == pytest.approx(v2.sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, s: (m[:3], s), "shape"),
        (lambda m, s: (m[:3], s[:3, :3]), "dimensions"),
        (lambda m, s: (m * np.nan, s), "NaN"),
        (lambda m, s: (m, s * np.inf), "NaN or infinite"),
        (lambda m, s: (m, s + np.triu(s, 1)), "symmetric"),
        (lambda m, s: (m, s - 3 * np.eye(4)), "negative eigenvalue"),
    ],
)
def test_what_is_no_gaussian_is_refused(change, message: str) -> None:
    good, bad = random_gaussian(4, 0), change(*random_gaussian(4, 1))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair[0], *pair[1])


def test_streamed_and_merged_sums_give_numpys_mean_and_covariance() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1000, 30)) * 3 + 5)
    whole, left, right = FeatureSums(30), FeatureSums(30), FeatureSums(30)
    whole.update(x)
    for block in x[:333].split(10):
        left.update(block)
    right.update(x[333:])
    left.merge(right)
    reduced = FeatureSums.from_tensors(*(a.clone() for a in left.tensors()))
    for sums in (whole, left, reduced):
        mu, sigma = sums.mean_cov()
        np.testing.assert_allclose(mu, x.numpy().mean(0), rtol=1e-10)
        np.testing.assert_allclose(sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)


def test_adding_into_the_tensors_is_a_reduction() -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    a, b, whole = FeatureSums(5), FeatureSums(5), FeatureSums(5)
    a.update(x[:30])
    b.update(x[30:])
    whole.update(x)
    for mine, theirs in zip(a.tensors(), b.tensors(), strict=True):
        mine += theirs  # what an all-reduce does, in place
    torch.testing.assert_close(a.mean_cov(), whole.mean_cov(), rtol=1e-10, atol=1e-10)
    assert int(a.count) == 100


def test_sums_of_unlike_dimensions_are_not_merged() -> None:
    with pytest.raises(ValueError, match="sums of 3 and 4 dimensions cannot be merged"):
        FeatureSums(4).merge(FeatureSums(3))


def test_fewer_images_than_dimensions_are_refused_with_both_numbers() -> None:
    sums = FeatureSums(64)
    sums.update(torch.randn(63, 64))
    with pytest.raises(UserError, match=r"63 images are too few for features of 64 dimensions"):
        sums.mean_cov()
    sums.update(torch.randn(1, 64))
    assert sums.mean_cov()[1].shape == (64, 64)


def test_wrong_or_infinite_features_are_refused_and_leave_the_sums_alone() -> None:
    sums = FeatureSums(3)
    with pytest.raises(ValueError, match=r"\(B, 3\)"):
        sums.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        sums.update(torch.tensor([[0.0, 1.0, float("nan")]]))
    assert int(sums.count) == 0


@pytest.mark.gpu
def test_a_gpu_gives_the_same_distance() -> None:
    a, b = random_gaussian(64, 0), random_gaussian(64, 1)
    on_gpu = [torch.from_numpy(t).cuda() for t in (*a, *b)]
    assert frechet_distance(*on_gpu) == pytest.approx(frechet_distance(*a, *b), rel=1e-9)
