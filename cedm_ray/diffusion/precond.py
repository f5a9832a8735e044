"""The preconditioned denoiser D(x; sigma) around the U-Net."""

import torch
from torch import Tensor, nn

from cedm_ray.diffusion.unet import NO_CONDITION, UNet
from cedm_ray.errors import UserError


class EDMPrecond(nn.Module):
    """Denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    Args:
        img_resolution: Side of the square images, in pixels; divisible by 2 once per level after the first.
        img_channels: Channels of the images.
        label_dim: Number of clusters C; 0 for an unconditional network.
        augment_dim: Length of the augment labels; 0 for none.
        model_channels: Channels at the first level.
        channel_mult: Multiplier of the channels at each level.
        num_blocks: Residual blocks per level.
        attn_resolutions: Resolutions with self-attention, in pixels.
        dropout: Dropout probability in the residual blocks.
        sigma_data: Standard deviation of the data, in units of images in [-1, 1].

    Raises:
        UserError: If the images cannot be halved once per level.

    Source: arXiv 2206.00364, Eq. 7 and Table 1.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.13,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        halvings = len(channel_mult) - 1
        if img_resolution % 2**halvings:
            raise UserError(
                f"img_resolution is {img_resolution}; channel_mult has {halvings + 1} levels, so it must be a "
                f"multiple of {2**halvings}: resize the images or shorten channel_mult"
            )
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.augment_dim = augment_dim
        self.sigma_data = sigma_data
        self.model = UNet(
            img_resolution, img_channels, label_dim, augment_dim,
            model_channels, tuple(channel_mult), num_blocks, tuple(attn_resolutions), dropout,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_index: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Estimate the clean image in a noisy one.

        Args:
            x: Noisy images, shape ``(N, C, R, R)``; computed in float32.
            sigma: Standard deviation of the noise, shape ``(N,)`` or ``()``.
            class_index: Cluster of each image, shape ``(N,)``, int64 in ``[0, label_dim)``, or ``NO_CONDITION``
                (-1) for the all-zero condition; None is the all-zero condition for all images.
            augment_labels: Augmentation of each image, shape ``(N, augment_dim)``; None is no augmentation.

        Returns:
            D(x; sigma), shape ``(N, C, R, R)``, float32.

        Raises:
            ValueError: If ``class_index`` is out of range (on a CPU and not compiled; a GPU would have to be waited
                for, and reads such an index as the all-zero condition), or a condition is given to a network that
                has none.
        """
        self._check_condition(class_index, augment_labels)
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).expand(len(x))
        s = sigma[:, None, None, None]
        total = s.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data * total.rsqrt()
        c_in = total.rsqrt()
        c_noise = sigma.log() / 4
        raw: Tensor = self.model(c_in * x, c_noise, class_index, augment_labels)
        return c_skip * x + c_out * raw.to(torch.float32)

    def _check_condition(self, class_index: Tensor | None, augment_labels: Tensor | None) -> None:
        if augment_labels is not None and augment_labels.shape[1:] != (self.augment_dim,):
            raise ValueError(
                f"augment_labels have shape {tuple(augment_labels.shape)}; the network takes (N, {self.augment_dim})"
            )
        if class_index is None:
            return
        if self.label_dim == 0:
            raise ValueError("class_index is given, but the network has label_dim 0; pass None")
        if class_index.device.type == "cpu" and class_index.numel() and not torch.compiler.is_compiling():
            low, high = class_index.aminmax()
            if low < NO_CONDITION or high >= self.label_dim:
                raise ValueError(
                    f"class_index ranges from {int(low)} to {int(high)}; it must lie in [0, {self.label_dim}), "
                    f"or be {NO_CONDITION} for no condition"
                )
