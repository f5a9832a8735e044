import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from cedm_ray.features.transform import Transform

TRANSFORM = Transform(
    size=(56, 56),
    interpolation="bicubic",
    crop_share=0.875,
    crop_mode="center",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    """Smooth colours with a hard edge and some grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / 7 + channel) * np.cos(y / 9) for channel in range(channels)]
    image = np.stack(waves) + rng.normal(0, 8, (channels, height, width))
    image[:, height // 3 :, width // 2 :] = 255
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def by_timm(image: Tensor, transform: Transform) -> Tensor:
    reference = create_transform(
        input_size=(3, *transform.size),
        interpolation=transform.interpolation,
        crop_pct=transform.crop_share,
        crop_mode=transform.crop_mode,
        mean=transform.mean,
        std=transform.std,
    )
    result: Tensor = reference(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return result


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (200, 200), (80, 120), (131, 90)])
@pytest.mark.parametrize("change", [{}, {"interpolation": "bilinear"}, {"crop_share": 1.0}, {"crop_mode": "squash"}])
def test_the_transform_agrees_with_timm_on_pil_images(shape: tuple[int, int], change: dict[str, str | float]) -> None:
    transform = dataclasses.replace(TRANSFORM, **change)  # type: ignore[arg-type]
    image = picture(*shape)
    std = torch.tensor(TRANSFORM.std)[:, None, None]
    difference = (transform(image[None])[0] - by_timm(image, transform)).abs() * std
    # PIL rounds between its two passes: nearly all values within one step of 8 bits, none far off.
    assert difference.quantile(0.99) < 1.01 / 255 and difference.max() < 3.01 / 255


def test_grey_images_are_repeated_over_channels() -> None:
    grey = picture(32, 32, 1)
    assert torch.equal(TRANSFORM(grey[None]), TRANSFORM(grey.expand(3, -1, -1)[None]))


def test_an_image_does_not_depend_on_its_batch() -> None:
    batch = torch.stack([picture(40, 40), picture(40, 40).flip(2), picture(40, 40).flip(1)])
    torch.testing.assert_close(TRANSFORM(batch)[1:2], TRANSFORM(batch[1:2]), rtol=0, atol=0)


def test_images_of_another_dtype_or_number_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        TRANSFORM(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\)"):
        TRANSFORM(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("change", [{"interpolation": "lanczos"}, {"crop_share": 0.0}, {"crop_mode": "border"}])
def test_settings_out_of_bounds_are_refused_by_name(change: dict[str, str | float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(TRANSFORM, **change)  # type: ignore[arg-type]
