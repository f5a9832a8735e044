"""Non-leaking augmentation: random geometric transforms, told to the network by augment labels."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENT_DIM = 9
SCALE_STD = 0.2  # of log2 of the scale, isotropic and anisotropic
TRANSLATE_STD = 0.125  # of the shift, in image sides

# Symlet-6 low-pass (reconstruction) filter, orthonormal: its even shifts have the Gram matrix I. The peak is tap 5.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
SYM6_PEAK = 5


@dataclass(frozen=True)
class Transforms:
    """The draws behind the transforms of N images; all zero leaves an image as it is."""

    xflip: Tensor
    """1 where the image is mirrored left to right, shape ``(N,)``, float32."""
    yflip: Tensor
    """1 where the image is mirrored top to bottom, shape ``(N,)``."""
    scale_w: Tensor
    """Standard normal; the image grows by 2^(0.2 w), shape ``(N,)``."""
    rotate_angle: Tensor
    """Rotation in radians, shape ``(N,)``."""
    aniso_w: Tensor
    """Standard normal; scales by 2^(0.2 w) along an axis and its inverse across it, shape ``(N,)``."""
    aniso_angle: Tensor
    """Direction of that axis in radians, shape ``(N,)``."""
    translate_w: Tensor
    """Standard normal; shift in x and y in units of 0.125 image sides, shape ``(2, N)``."""

    @classmethod
    def identity(cls, n: int, device: torch.device | str = "cpu") -> "Transforms":
        """Transforms that leave ``n`` images as they are."""
        zero = torch.zeros(n, device=device)
        return cls(zero, zero, zero, zero, zero, zero, torch.zeros(2, n, device=device))

    def labels(self) -> Tensor:
        """Augment labels that condition the network, shape ``(N, 9)``, all zero for the identity."""
        columns = [
            self.xflip,
            self.yflip,
            self.scale_w,
            self.rotate_angle.cos() - 1,
            self.rotate_angle.sin(),
            self.aniso_w * self.aniso_angle.cos(),
            self.aniso_w * self.aniso_angle.sin(),
            self.translate_w[0],
            self.translate_w[1],
        ]
        return torch.stack(columns, dim=1)


def sample_transforms(
    n: int, p: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Transforms:
    """Draw transforms, each active with probability ``p`` for each image on its own.

    Args:
        n: Number of images.
        p: Probability of each transform, in ``[0, 1]``. The x-flip, a fair coin, is exempt: it is always
            considered, unless ``p`` is 0.
        generator: Source of randomness on ``device``.
        device: Where the draws lie.

    Returns:
        The draws, zero where a transform is inactive.

    Raises:
        ValueError: If ``p`` lies outside ``[0, 1]``.

    Source: arXiv 2206.00364, App. F.2 and Table 6.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must lie in [0, 1]")
    # One call for all uniform draws and one for all normal ones: many small calls cost more than the numbers.
    uniform = torch.rand(10, n, generator=generator, device=device)
    normal = torch.randn(4, n, generator=generator, device=device)
    active = (uniform[:5] < p).float()
    coins = (uniform[5:8] < 0.5).float()
    angles = (uniform[8:] * 2 - 1) * math.pi
    return Transforms(
        xflip=coins[0] if p > 0 else torch.zeros_like(coins[0]),
        yflip=coins[1] * active[0],
        scale_w=normal[0] * active[1],
        rotate_angle=angles[0] * active[2],
        aniso_w=normal[1] * active[3],
        aniso_angle=angles[1] * coins[2] * active[3],
        translate_w=normal[2:] * active[4],
    )


@dataclass(frozen=True)
class Filters:
    """What the transforms of images of one size need on one device; made once, so that no step waits for a copy."""

    up_y: Tensor
    up_x: Tensor
    down_y: Tensor
    down_x: Tensor
    sides: Tensor
    """Width and height, shape ``(2,)``, float32."""

    @classmethod
    def of(cls, height: int, width: int, device: torch.device | str = "cpu") -> "Filters":
        """The filters for images of this size."""
        return cls(
            upsampling_matrix(height, device),
            upsampling_matrix(width, device),
            downsampling_matrix(height, device),
            downsampling_matrix(width, device),
            torch.tensor([width, height], dtype=torch.float32, device=device),
        )


def apply_transforms(images: Tensor, transforms: Transforms, filters: Filters | None = None) -> Tensor:
    """Transform images as drawn.

    The flips are exact. The other transforms act together: the image is continued by reflection without
    end, upsampled by 2 with the sym6 filter, sampled bilinearly, downsampled and cropped. A continued image
    repeats with period 2 (side - 1), so one period is stored and positions are taken modulo it; nothing
    depends on how far a transform reaches, on the other images of the batch, or on the image's size.

    Args:
        images: Shape ``(N, C, H, W)``, float32, H and W at least 2.
        transforms: The draws for N images, on the same device.
        filters: Those of images of this size on this device; None to make them here.

    Returns:
        Transformed images, shape ``(N, C, H, W)``.

    Source: arXiv 2006.06676, App. B (StyleGAN2-ADA); arXiv 2206.00364, App. F.2.
    """
    height, width = images.shape[2:]
    images = torch.where(transforms.xflip[:, None, None, None] == 1, images.flip(3), images)
    images = torch.where(transforms.yflip[:, None, None, None] == 1, images.flip(2), images)
    filters = filters or Filters.of(height, width, images.device)
    fine = filters.up_y @ images @ filters.up_x.T
    grid = sampling_grid(transforms, filters.sides, height, width)
    fine = F.grid_sample(fine, grid, mode="bilinear", align_corners=True)
    return filters.down_y @ fine @ filters.down_x.T


def augment(
    images: Tensor, p: float, generator: torch.Generator | None = None, filters: Filters | None = None
) -> tuple[Tensor, Tensor]:
    """Draw transforms and apply them.

    Args:
        images: Shape ``(N, C, H, W)``, float32.
        p: Probability of each transform.
        generator: Source of randomness on the images' device.
        filters: As for :func:`apply_transforms`.

    Returns:
        The transformed images, shape ``(N, C, H, W)``, and their augment labels, shape ``(N, 9)``.
    """
    transforms = sample_transforms(len(images), p, generator, images.device)
    return apply_transforms(images, transforms, filters), transforms.labels()


def inverse_matrices(transforms: Transforms, sides: Tensor) -> Tensor:
    """Affine maps from output to source positions, in pixels from the image's centre, shape ``(N, 2, 3)``."""
    turn = _rotation(transforms.rotate_angle)
    axis = _rotation(transforms.aniso_angle)
    shrink = torch.exp2(-SCALE_STD * transforms.scale_w)
    stretch = torch.exp2(-SCALE_STD * transforms.aniso_w)
    squeeze = torch.diag_embed(torch.stack([stretch, 1 / stretch], dim=1))
    linear = shrink[:, None, None] * turn @ axis.mT @ squeeze @ axis
    shift = -TRANSLATE_STD * transforms.translate_w.T * sides
    return torch.cat([linear, linear @ shift[:, :, None]], dim=2)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def sampling_grid(transforms: Transforms, sides: Tensor, height: int, width: int) -> Tensor:
    """Where each fine output sample reads the stored period, shape ``(N, 2H + 10, 2W + 10, 2)``, in [-1, 1]."""
    matrix = inverse_matrices(transforms, sides)
    x = _fine_positions(width, matrix.device) - (width - 1) / 2
    y = _fine_positions(height, matrix.device) - (height - 1) / 2
    # source = matrix @ (x, y, 1), split into one part for each column and one for each row of the grid
    source = matrix[:, None, None, :, 0] * x[None, None, :, None]
    source = source + (matrix[:, None, :, 1] * y[None, :, None] + matrix[:, None, :, 2])[:, :, None]
    half = sides - 1
    return torch.remainder(source + half / 2, 2 * half) / half - 1


def _fine_positions(side: int, device: torch.device) -> Tensor:
    # The fine samples that the downsampling filter reads; sample j lies at pixel j / 2.
    reach = len(SYM6) - 1 - SYM6_PEAK
    return torch.arange(-SYM6_PEAK, 2 * (side - 1) + reach + 1, device=device) / 2


def upsampling_matrix(side: int, device: torch.device | str = "cpu") -> Tensor:
    """One period of the reflected and upsampled signal from ``side`` pixels, shape ``(4 (side - 1) + 1, side)``.

    The last row repeats the first, so that an interpolation up to the end of the period needs no wrap.
    """
    period = 4 * (side - 1)
    row = torch.arange(period + 1)[:, None]
    offset = torch.arange(len(SYM6))[None, :] - SYM6_PEAK
    # fine[j] = sum_k h[j - 2 k + 5] x[k]: tap offset + 5 meets pixel (j - offset) / 2 where that is whole
    pixel = (row - offset) // 2 % (2 * (side - 1))
    pixel = torch.minimum(pixel, 2 * (side - 1) - pixel)
    taps = torch.tensor(SYM6, dtype=torch.float64) * ((row - offset) % 2 == 0)
    matrix = torch.zeros(period + 1, side, dtype=torch.float64).scatter_add_(1, pixel, taps)
    return matrix.to(device=device, dtype=torch.float32)


def downsampling_matrix(side: int, device: torch.device | str = "cpu") -> Tensor:
    """The same filter from the fine output samples back to pixels, shape ``(side, 2 side + 10)``."""
    matrix = torch.zeros(side, 2 * side + len(SYM6) - 2, dtype=torch.float64)
    pixel = torch.arange(side)[:, None]
    matrix[pixel, 2 * pixel + torch.arange(len(SYM6))] = torch.tensor(SYM6, dtype=torch.float64)
    return matrix.to(device=device, dtype=torch.float32)
