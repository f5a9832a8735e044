"""The trace term against the formula by matrix roots, factors whose product is known, and scipy."""

import numpy as np
import pytest
import scipy.linalg
import threadpoolctl
import torch
from torch import Tensor

from cedm_ray.metrics import trace_root
from cedm_ray.metrics.frechet import frechet_distance
from cedm_ray.metrics.trace_root import trace_of_root


def by_roots(s1: Tensor, s2: Tensor) -> float:
    """The sum of the roots of the eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, as it is written in the paper."""
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ s2 @ root
    return float(torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum())


def features(seed: int, *, dim: int = 160, num: int = 400, decay: float = 0.0) -> np.ndarray:
    """Centred features whose deviations fall by ``exp(-decay)`` from one direction to the next."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(9).standard_normal((dim, dim)))[0]
    x = (rng.standard_normal((num, dim)) * np.exp(-decay * np.arange(dim))) @ rotation
    return (x - x.mean(0)) / np.sqrt(num - 1)


def covariance(x: np.ndarray) -> Tensor:
    s = torch.from_numpy(x.T @ x)
    return (s + s.T) / 2


def constant(x: np.ndarray, where: slice) -> np.ndarray:
    x[:, where] = 0
    return x


def near_duplicate(x: np.ndarray, deviation: float) -> np.ndarray:
    x[:, :5] = x[:, 5:10] + deviation * np.random.default_rng(3).standard_normal((len(x), 5)) / np.sqrt(len(x))
    return x


PAIRS = {
    "full rank": (features(0), features(1)),
    "badly conditioned": (features(0, decay=0.05), features(1, decay=0.05)),
    "as many images as dimensions": (features(0, num=160), features(1)),
    "fewer images than dimensions": (features(0, num=120), features(1)),
    "constant in both": (constant(features(0), slice(20, 50)), constant(features(1), slice(30, 60))),
    "constant in one": (features(0), constant(features(1), slice(30, 60))),
    "all constant": (constant(features(0), slice(None)), features(1)),
    "duplicate features": (near_duplicate(features(0), 0.0), near_duplicate(features(1), 0.0)),
    "near-duplicate features": (near_duplicate(features(0), 1e-4), near_duplicate(features(1), 1e-4)),
    "duplicates to rounding": (near_duplicate(features(0), 1e-9), features(1)),
    "of unlike size": (1e-6 * features(0), 1e6 * features(1)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("swapped", [False, True])
def test_it_is_the_formula_by_roots_and_as_near_to_the_singular_values_of_the_factors(name: str, swapped: bool) -> None:
    x1, x2 = PAIRS[name][::-1] if swapped else PAIRS[name]
    s1, s2 = covariance(x1), covariance(x2)
    found, reference = float(trace_of_root(s1, s2)), by_roots(s1, s2)
    exact = np.linalg.svd(x1 @ x2.T, compute_uv=False).sum()  # takes no roots of rounding errors
    scale = float(s1.trace() + s2.trace())
    error = abs(reference - exact)  # the root of an eigenvalue that is zero but for rounding is 1e-8
    assert found == pytest.approx(reference, abs=1e-9 * scale + error)
    assert found == pytest.approx(exact, abs=1e-10 * scale + error)
    assert found == pytest.approx(float(trace_of_root(s2, s1)), abs=1e-9 * scale)


@pytest.mark.parametrize("name", ["full rank", "badly conditioned", "constant in both", "constant in one"])
def test_where_cholesky_works_it_is_exact(name: str) -> None:
    x1, x2 = PAIRS[name]
    exact = np.linalg.svd(x1 @ x2.T, compute_uv=False).sum()
    assert float(trace_of_root(covariance(x1), covariance(x2))) == pytest.approx(exact, rel=1e-12)


def test_a_constant_dimension_keeps_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    s1, s2 = (covariance(x) for x in PAIRS["constant in both"])
    assert trace_root._by_cholesky_scipy(s1, s2) is None
    monkeypatch.setattr(trace_root, "_by_root", lambda *_: pytest.fail("the slow way was taken"))
    assert float(trace_of_root(s1, s2)) == pytest.approx(by_roots(s1, s2), rel=1e-8)


def test_scaled_covariances_have_a_closed_form() -> None:
    s = covariance(features(0))
    zero = np.zeros(len(s))
    assert float(trace_of_root(s, 9 * s)) == pytest.approx(3 * float(s.trace()), rel=1e-12)
    assert frechet_distance(zero, s, zero, 9 * s) == pytest.approx(4 * float(s.trace()), rel=1e-11)
    assert frechet_distance(zero, s, zero, s) < 1e-12 * float(s.trace())


def test_it_agrees_with_scipys_root_of_the_product() -> None:
    s1, s2 = (covariance(x) for x in PAIRS["full rank"])
    expected = np.trace(scipy.linalg.sqrtm(s1.numpy() @ s2.numpy())).real
    assert float(trace_of_root(s1, s2)) == pytest.approx(expected, rel=1e-11)


def test_the_way_of_a_gpu_gives_the_same_eigenvalues() -> None:
    s1, s2 = (covariance(x) for x in PAIRS["full rank"])
    torch.testing.assert_close(
        trace_root._by_cholesky(s1, s2), trace_root._by_cholesky_scipy(s1, s2), rtol=1e-10, atol=1e-12
    )
    assert trace_root._by_cholesky(*(covariance(x) for x in PAIRS["constant in both"])) is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_negative_variance_is_refused_even_where_the_other_is_constant(which: int) -> None:
    good, bad = torch.diag(torch.tensor([1.0, 0.0]).double()), torch.diag(torch.tensor([1.0, -1.0]).double())
    pair = [good, bad] if which else [bad, good]
    if which:  # where sigma1 does not vary, the product does not show it
        pair[0] = torch.eye(2).double()
    with pytest.raises(ValueError, match=rf"sigma{which + 1} has a negative eigenvalue \(-1\)"):
        trace_of_root(*pair)


def test_scipy_computes_with_the_threads_of_torch_and_has_its_own_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> set[int]:
        return {int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    seen, eigh, before = [], scipy.linalg.eigh, torch.get_num_threads()
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *args, **kw: (seen.append(threads()), eigh(*args, **kw))[1])
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(2, user_api="blas"):
            trace_of_root(torch.eye(8).double(), torch.eye(8).double())
            assert threads() == {2}
    finally:
        torch.set_num_threads(before)
    assert seen == [{1}]


def test_the_matrices_of_the_caller_are_left_as_they_are() -> None:
    s1, s2 = (covariance(x).numpy() for x in PAIRS["full rank"])
    copies = s1.copy(), s2.copy()
    frechet_distance(np.zeros(160), s1, np.zeros(160), s2)
    np.testing.assert_array_equal(s1, copies[0])
    np.testing.assert_array_equal(s2, copies[1])
