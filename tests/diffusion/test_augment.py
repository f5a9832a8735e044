import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cedm_ray.diffusion.augment import (
    SYM6,
    Transforms,
    apply_transforms,
    augment,
    sample_transforms,
    upsampling_matrix,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "edm_augment.npz"
LABELS = {
    "xflip": [0],
    "yflip": [1],
    "scale": [2],
    "rotate_frac": [3, 4],
    "aniso": [5, 6],
    "translate_frac": [7, 8],
    "all": list(range(9)),
}


def golden(name: str) -> tuple[dict[str, Tensor], Transforms]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        arrays = {k.split("/")[1]: torch.from_numpy(v) for k, v in file.items() if k.startswith(f"{name}/")}
    draws = {k: v for k, v in arrays.items() if k not in ("images", "augmented", "labels")}
    for column, flip in enumerate(("xflip", "yflip")):
        if name in (flip, "all"):
            draws[flip] = arrays["labels"][:, column if name == "all" else 0]
    return arrays, dataclasses.replace(Transforms.identity(6), **draws)


@pytest.mark.parametrize("name", LABELS)
def test_transformed_images_match_the_published_implementation(name: str) -> None:
    arrays, transforms = golden(name)
    ours, theirs = apply_transforms(arrays["images"], transforms), arrays["augmented"]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("name", LABELS)
def test_labels_match_the_published_implementation(name: str) -> None:
    arrays, transforms = golden(name)
    labels = transforms.labels()
    torch.testing.assert_close(labels[:, LABELS[name]], arrays["labels"], atol=1e-6, rtol=1e-5)
    others = [column for column in range(9) if column not in LABELS[name]]
    assert not labels[:, others].any()


def test_the_wavelet_filter_is_orthonormal_to_its_even_shifts() -> None:
    taps = np.array(SYM6)
    products = [float(taps[2 * shift :] @ taps[: len(taps) - 2 * shift]) for shift in range(6)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-11)
    assert taps.sum() == pytest.approx(np.sqrt(2), abs=1e-11)


@pytest.mark.parametrize("side", [2, 3, 8, 16])
def test_upsampling_filters_the_endlessly_reflected_image(side: int) -> None:
    # Against numpy: pad far by reflection, insert zeros, convolve, and cut out one period.
    x = np.random.default_rng(0).standard_normal(side)
    padded = np.pad(x, 30, mode="reflect")
    zeros = np.zeros(2 * len(padded))
    zeros[::2] = padded
    fine = np.convolve(zeros, SYM6)[5:]  # the peak, tap 5, at the sample itself
    expected = fine[60 : 60 + 4 * (side - 1) + 1]
    ours = upsampling_matrix(side).double().numpy() @ x
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 5, 12), (2, 1, 2, 2)])
def test_no_transform_leaves_images_as_they_are(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    torch.testing.assert_close(apply_transforms(images, Transforms.identity(2)), images, atol=5e-6, rtol=0)


def test_a_full_turn_leaves_images_as_they_are() -> None:
    images = torch.randn(2, 1, 8, 8)
    turn = dataclasses.replace(Transforms.identity(2), rotate_angle=torch.tensor([2 * np.pi, -2 * np.pi]))
    torch.testing.assert_close(apply_transforms(images, turn), images, atol=1e-4, rtol=0)


def test_scaling_along_one_axis_is_the_inverse_along_the_other() -> None:
    images, quarter = torch.randn(1, 1, 9, 9), torch.tensor([np.pi / 2], dtype=torch.float32)
    one = dataclasses.replace(Transforms.identity(1), aniso_w=torch.tensor([1.3]))
    other = dataclasses.replace(Transforms.identity(1), aniso_w=torch.tensor([-1.3]), aniso_angle=quarter)
    torch.testing.assert_close(apply_transforms(images, one), apply_transforms(images, other), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift_w", [8.0, 16.0, -56.0])
def test_a_shift_by_whole_sides_continues_the_reflection(shift_w: float) -> None:
    # 8 x 0.125 = one side of 8 pixels: far beyond a single reflection's reach of 7.
    images = torch.randn(1, 1, 8, 8)
    draws = dataclasses.replace(Transforms.identity(1), translate_w=torch.tensor([[shift_w], [0.0]]))
    pixels = int(abs(shift_w))
    padded = np.pad(images[0, 0].numpy(), ((0, 0), (pixels, pixels)), mode="reflect")
    start = pixels - int(shift_w)
    expected = torch.from_numpy(padded[:, start : start + 8])
    torch.testing.assert_close(apply_transforms(images, draws)[0, 0], expected, atol=1e-4, rtol=0)


def test_an_image_is_transformed_alike_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    images, transforms = torch.randn(6, 1, 8, 8), sample_transforms(6, 1.0, generator)
    together = apply_transforms(images, transforms)
    for i in range(6):
        own = Transforms(
            **{f.name: getattr(transforms, f.name)[..., i : i + 1] for f in dataclasses.fields(transforms)}
        )
        torch.testing.assert_close(apply_transforms(images[i : i + 1], own)[0], together[i], atol=1e-5, rtol=0)


def test_each_transform_is_active_with_its_probability() -> None:
    n, p = 20_000, 0.3
    labels = sample_transforms(n, p, torch.Generator().manual_seed(0)).labels()
    shares = {0: 0.5, 1: p / 2, 2: p, 4: p, 5: p, 6: p / 2, 7: p, 8: p}
    for column, share in shares.items():
        count = int((labels[:, column] != 0).sum())
        assert stats.binomtest(count, n, share).pvalue > 1e-4, column
    active = labels != 0
    assert abs(np.corrcoef(active[:, 2], active[:, 7])[0, 1]) < 0.04


def test_active_draws_have_the_stated_distributions() -> None:
    draws = sample_transforms(5000, 1.0, torch.Generator().manual_seed(0))
    for normal in (draws.scale_w, draws.aniso_w, *draws.translate_w):
        assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    uniform = (draws.rotate_angle / (2 * np.pi) + 0.5).numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_probability_zero_changes_nothing() -> None:
    images = torch.randn(50, 1, 8, 8)
    out, labels = augment(images, 0.0, torch.Generator().manual_seed(0))
    assert not labels.any()
    torch.testing.assert_close(out, images, atol=5e-6, rtol=0)


def test_a_probability_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p is 1.5; it must lie in \[0, 1\]"):
        sample_transforms(1, 1.5)
