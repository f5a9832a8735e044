"""What a person may set about the network and its training; the defaults are the paper's for CIFAR."""

from dataclasses import dataclass

from cedm_ray.diffusion.augment import AUGMENT_DIM
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.errors import UserError, require


@dataclass(frozen=True)
class NetSettings:
    """Size of the denoising network."""

    model_channels: int = 128
    """Channels at the first level; a multiple of 4."""
    channel_mult: tuple[int, ...] = (2, 2, 2)
    """Multiplier of the channels at each level; each level after the first halves the resolution."""
    num_blocks: int = 4
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions with self-attention, in pixels."""
    dropout: float = 0.13
    """Dropout probability in the residual blocks."""

    def __post_init__(self) -> None:
        channels = self.model_channels
        require(channels >= 4 and channels % 4 == 0, "model_channels", channels, "be a positive multiple of 4")
        mult = self.channel_mult
        require(min(mult, default=0) >= 1, "channel_mult", mult, "name at least one level, each at least 1")
        require(self.num_blocks >= 1, "num_blocks", self.num_blocks, "be at least 1")
        sides = self.attn_resolutions
        require(all(side >= 1 for side in sides), "attn_resolutions", sides, "be positive numbers of pixels")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "lie in [0, 1)")


@dataclass(frozen=True)
class TrainSettings:
    """How the denoising network is trained."""

    total_batch: int = 1024
    """Images per step, over all processes."""
    lr: float = 1e-3
    """Learning rate of Adam after the ramp-up."""
    lr_rampup_kimg: float = 10_000.0
    """Thousands of images over which the learning rate rises linearly from 0."""
    augment_prob: float = 0.12
    """Probability of each augmentation; 0 turns all of them off, the mirror image included."""
    label_dropout: float = 0.0
    """Probability that an image is trained without its condition; above 0 the model can be sampled with guidance."""
    ema_halflife_kimg: float = 500.0
    """Half-life of the averaged weights, in thousands of images."""
    ema_rampup_ratio: float = 0.05
    """The half-life is at most this share of the images seen so far."""
    P_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    P_std: float = 1.2
    """Standard deviation of ln(sigma) in training."""
    sigma_data: float = 0.5
    """Standard deviation of the images, in units of the range [-1, 1]."""

    def __post_init__(self) -> None:
        require(self.total_batch >= 1, "total_batch", self.total_batch, "be at least 1")
        for name in ("lr", "ema_rampup_ratio", "P_std", "sigma_data"):
            value = getattr(self, name)
            require(value > 0, name, value, "be positive")
        for name in ("lr_rampup_kimg", "ema_halflife_kimg"):
            value = getattr(self, name)
            require(value >= 0, name, value, "not be negative")
        require(0 <= self.augment_prob <= 1, "augment_prob", self.augment_prob, "lie in [0, 1]")
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "lie in [0, 1)")


def local_batch(total_batch: int, world_size: int) -> int:
    """Images per step in each of ``world_size`` processes.

    Raises:
        UserError: If the batch cannot be split evenly.
    """
    if total_batch % world_size:
        down = total_batch // world_size * world_size
        raise UserError(
            f"total_batch is {total_batch}; it must be a multiple of the {world_size} processes: "
            f"set it to {down + world_size}" + (f" or {down}" if down else "")
        )
    return total_batch // world_size


def build_net(
    settings: NetSettings,
    img_resolution: int,
    img_channels: int,
    label_dim: int,
    augment: bool,
    sigma_data: float = 0.5,
) -> EDMPrecond:
    """Build the denoiser; its weights come from torch's global generator.

    Args:
        settings: Size of the network.
        img_resolution: Side of the square images, in pixels.
        img_channels: Channels of the images.
        label_dim: Number of clusters C; 0 for an unconditional network.
        augment: Whether the network takes augment labels, as training with ``augment_prob`` > 0 needs.
        sigma_data: Standard deviation of the images.

    Returns:
        The network, in training mode, on torch's default device.

    Raises:
        UserError: If the image cannot be halved once per level.
    """
    return EDMPrecond(
        img_resolution,
        img_channels,
        label_dim,
        AUGMENT_DIM if augment else 0,
        model_channels=settings.model_channels,
        channel_mult=settings.channel_mult,
        num_blocks=settings.num_blocks,
        attn_resolutions=settings.attn_resolutions,
        dropout=settings.dropout,
        sigma_data=sigma_data,
    )
