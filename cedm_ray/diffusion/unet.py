"""The DDPM++ U-Net: noisy image, noise level and condition in, raw network output F out."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resample = Literal["up", "down"]

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches of equal variance
NO_CONDITION = -1  # in class_index: an image whose condition is the all-zero vector
OUTPUT_GAIN = 1e-5  # a residual branch starts as almost nothing
ATTENTION_GAIN = math.sqrt(0.2)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels each.

    Args:
        num_channels: Channels of the input; the group count is lowered until it divides them.

    Returns:
        The layer, eps 1e-6.
    """
    most = max(min(32, num_channels // 4), 1)
    groups = next(g for g in range(most, 0, -1) if num_channels % g == 0)
    return nn.GroupNorm(groups, num_channels, eps=1e-6)


def reset_layer(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None, gain: float = 1.0) -> None:
    """Draw Xavier-uniform weights scaled by ``gain``; the bias becomes zero."""
    nn.init.xavier_uniform_(layer.weight, gain=gain, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Self-attention over the pixels with one head, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Draw the initial weights."""
        reset_layer(self.qkv, generator, ATTENTION_GAIN)
        reset_layer(self.proj, generator, OUTPUT_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # Output channel 3 c + j of the projection is channel c of query, key, value for j = 0, 1, 2.
        qkv = self.qkv(self.norm(x)).reshape(n, c, 3, h * w)
        query, key, value = (t.transpose(1, 2).unsqueeze(1) for t in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = (x + self.proj(mixed)) * SKIP_SCALE
        return out


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, the embedding added between them, optional attention.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Width of the embedding vector.
        dropout: Probability that a hidden activation is dropped in training.
        attention: Whether self-attention follows.
        resample: Double ("up") or halve ("down") the resolution with the box filter, or keep it (None).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        attention: bool = False,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.dropout = dropout
        self.out_channels = out_channels
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = in_channels != out_channels or resample is not None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if project else None
        self.attention = Attention(out_channels) if attention else None

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Draw the initial weights."""
        reset_layer(self.conv0, generator)
        reset_layer(self.affine, generator)
        reset_layer(self.conv1, generator, OUTPUT_GAIN)
        if self.skip is not None:
            reset_layer(self.skip, generator)
        if self.attention is not None:
            self.attention.reset_parameters(generator)

    def _resize(self, x: Tensor) -> Tensor:
        # With the box filter [1, 1] the resampling is nearest-neighbour up and 2x2 averages down.
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.conv0(self._resize(F.silu(self.norm0(x))))
        hidden = F.silu(self.norm1(hidden + self.affine(emb)[:, :, None, None]))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        shortcut = x if self.skip is None else self.skip(self._resize(x))
        out: Tensor = (shortcut + hidden) * SKIP_SCALE
        return out if self.attention is None else self.attention(out)


class UNet(nn.Module):
    """DDPM++ with the settings of EDM: one head, box filter, additive embedding.

    Args:
        img_resolution: Side of the square images, in pixels.
        img_channels: Channels of the images.
        label_dim: Number of clusters; 0 for an unconditional network.
        augment_dim: Length of the augment labels; 0 for none.
        model_channels: Channels at the first level.
        channel_mult: Multiplier of the channels at each level; each level halves the resolution.
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

        widths = [model_channels * m for m in channel_mult]
        sides = [img_resolution >> level for level in range(len(widths))]
        attends = [side in attn_resolutions for side in sides]
        self.first_conv = nn.Conv2d(img_channels, model_channels, 3, padding=1)
        self.encoder = nn.ModuleDict()
        channels = model_channels
        kept = [channels]  # channels of every encoder output: the decoder takes them back in reverse
        for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
            if level > 0:
                self.encoder[f"{side}x{side}_down"] = Block(channels, channels, emb, dropout, resample="down")
                kept.append(channels)
            for i in range(num_blocks):
                self.encoder[f"{side}x{side}_block{i}"] = Block(channels, width, emb, dropout, attends[level])
                channels = width
                kept.append(channels)

        self.decoder = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            side, width = sides[level], widths[level]
            if level == len(widths) - 1:
                self.decoder[f"{side}x{side}_in0"] = Block(channels, channels, emb, dropout, attention=True)
                self.decoder[f"{side}x{side}_in1"] = Block(channels, channels, emb, dropout)
            else:
                self.decoder[f"{side}x{side}_up"] = Block(channels, channels, emb, dropout, resample="up")
            for i in range(num_blocks + 1):
                attention = attends[level] and i == num_blocks
                joined = channels + kept.pop()
                self.decoder[f"{side}x{side}_block{i}"] = Block(joined, width, emb, dropout, attention)
                channels = width
        self.out_norm = group_norm(channels)
        self.out_conv = nn.Conv2d(channels, img_channels, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights, from ``generator`` or from torch's global one."""
        for layer in (self.map_label, self.map_augment, self.map_layer0, self.map_layer1, self.first_conv):
            if layer is not None:
                reset_layer(layer, generator)
        for blocks in (self.encoder, self.decoder):
            for block in blocks.values():
                assert isinstance(block, Block)
                block.reset_parameters(generator)
        reset_layer(self.out_conv, generator, OUTPUT_GAIN)

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
