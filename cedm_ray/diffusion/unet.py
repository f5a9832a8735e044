"""The DDPM++ U-Net: noisy image, noise level and condition in, raw network output F out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cedm_ray.diffusion.blocks import OUTPUT_GAIN, Block, group_norm, reset_layer

NO_CONDITION = -1  # in class_index: an image whose condition is the all-zero vector


class UNet(nn.Module):
    """DDPM++ with the settings of EDM: one head, box filter, additive embedding.

    Args:
        img_resolution: Side of the square images, in pixels.
        img_channels: Channels of the images.
        label_dim: Number of clusters; 0 for an unconditional network.
        augment_dim: Length of the augment labels; 0 for none.
        model_channels: Channels at the first level.
        channel_mult: Multiplier of the channels at each level; each level after the first halves the resolution.
        num_blocks: Residual blocks per level in the encoder; the decoder has one more.
        attn_resolutions: Resolutions at which the blocks attend, in pixels.
        dropout: Dropout probability in the blocks.

    Source: arXiv 2011.13456, App. H (DDPM++); arXiv 2206.00364, App. F.2 and Table 7.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: tuple[int, ...],
        num_blocks: int,
        attn_resolutions: tuple[int, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.noise_channels = model_channels
        emb = 4 * model_channels
        self.map_label = nn.Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)

        sides = [img_resolution >> i for i in range(len(channel_mult))]
        levels = [
            _Level(side, model_channels * m, side in attn_resolutions)
            for side, m in zip(sides, channel_mult, strict=True)
        ]
        self.first_conv = nn.Conv2d(img_channels, model_channels, 3, padding=1)
        self.encoder, kept = _encoder(model_channels, levels, num_blocks, emb, dropout)
        self.decoder = _decoder(kept, levels, num_blocks, emb, dropout)
        channels = levels[0].width
        self.out_norm = group_norm(channels)
        self.out_conv = nn.Conv2d(channels, img_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global generator."""
        for layer in (self.map_label, self.map_augment, self.map_layer0, self.map_layer1, self.first_conv):
            if layer is not None:
                reset_layer(layer)
        for blocks in (self.encoder, self.decoder):
            for block in blocks.values():
                assert isinstance(block, Block)
                block.reset_parameters()
        reset_layer(self.out_conv, OUTPUT_GAIN)

    # Never compiled: it alone knows the number of clusters, so what is compiled serves every C.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def embed(self, c_noise: Tensor, class_index: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embedding of noise level, cluster and augmentation, shape ``(N, 4 model_channels)``, float32."""
        with torch.autocast(c_noise.device.type, enabled=False):
            return self._embed(c_noise, class_index, augment_labels)

    def _embed(self, c_noise: Tensor, class_index: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        half = self.noise_channels // 2
        powers = torch.arange(half, dtype=torch.float32, device=c_noise.device) / max(half - 1, 1)
        angles = c_noise[:, None] * (1e-4**powers)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.map_label is not None:
            onehot = emb.new_zeros(len(emb), self.label_dim)
            if class_index is not None:
                # A comparison, unlike a lookup, neither waits for the GPU nor can read out of bounds; NO_CONDITION
                # equals no cluster.
                onehot = (class_index[:, None] == torch.arange(self.label_dim, device=emb.device)).to(emb.dtype)
            emb = emb + self.map_label(onehot * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self, x: Tensor, c_noise: Tensor, class_index: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Raw output F(x), shape of ``x``, float32; see `EDMPrecond` for the arguments.

        Under autocast the embedding and the last convolution stay in float32: they cost next to nothing, and their
        rounding would go into every pixel.
        """
        emb = self.embed(c_noise, class_index, augment_labels)
        x = self.first_conv(x)
        kept = [x]
        for block in self.encoder.values():
            x = block(x, emb)
            kept.append(x)
        for name, block in self.decoder.items():
            if "_block" in name:
                x = torch.cat([x, kept.pop()], dim=1)
            x = block(x, emb)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.out_conv(F.silu(self.out_norm(x.to(self.out_conv.weight.dtype))))
        return out


@dataclass(frozen=True)
class _Level:
    """Blocks of one resolution."""

    side: int
    width: int
    """Channels that its blocks give."""
    attends: bool

    def name(self, part: str) -> str:
        return f"{self.side}x{self.side}_{part}"


def _encoder(
    channels: int, levels: Sequence[_Level], num_blocks: int, emb: int, dropout: float
) -> tuple[nn.ModuleDict, list[int]]:
    """The blocks on the way down, and the channels that each step leaves, that of the first convolution before them."""
    blocks, kept = nn.ModuleDict(), [channels]
    for i, level in enumerate(levels):
        if i > 0:
            blocks[level.name("down")] = Block(channels, channels, emb, dropout, resample="down")
            kept.append(channels)
        for j in range(num_blocks):
            blocks[level.name(f"block{j}")] = Block(channels, level.width, emb, dropout, level.attends)
            channels = level.width
            kept.append(channels)
    return blocks, kept


def _decoder(kept: Sequence[int], levels: Sequence[_Level], num_blocks: int, emb: int, dropout: float) -> nn.ModuleDict:
    """The blocks on the way up, which take back what the encoder kept, the last first."""
    blocks, left, channels = nn.ModuleDict(), list(kept), kept[-1]
    for i, level in reversed(list(enumerate(levels))):
        if i == len(levels) - 1:
            blocks[level.name("in0")] = Block(channels, channels, emb, dropout, attention=True)
            blocks[level.name("in1")] = Block(channels, channels, emb, dropout)
        else:
            blocks[level.name("up")] = Block(channels, channels, emb, dropout, resample="up")
        for j in range(num_blocks + 1):
            joined = channels + left.pop()
            attention = level.attends and j == num_blocks
            blocks[level.name(f"block{j}")] = Block(joined, level.width, emb, dropout, attention)
            channels = level.width
    return blocks
