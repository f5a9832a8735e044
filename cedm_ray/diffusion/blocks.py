"""What the U-Net is built of: residual blocks with attention, and how their weights start."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Resample = Literal["up", "down"]

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches of equal variance
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


def reset_layer(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    """Draw Xavier-uniform weights scaled by ``gain`` from torch's global generator; the bias becomes zero."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Self-attention over the pixels with one head, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        reset_layer(self.qkv, ATTENTION_GAIN)
        reset_layer(self.proj, OUTPUT_GAIN)

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

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        reset_layer(self.conv0)
        reset_layer(self.affine)
        reset_layer(self.conv1, OUTPUT_GAIN)
        if self.skip is not None:
            reset_layer(self.skip)
        if self.attention is not None:
            self.attention.reset_parameters()

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
