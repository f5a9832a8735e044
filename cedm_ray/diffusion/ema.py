"""Moving average of the weights, with a half-life that is counted in images."""

import torch
from torch import nn


def ema_beta(batch: int, nimg: int, halflife_nimg: float, rampup_ratio: float | None = 0.05) -> float:
    """Share of the old average that is kept in one step, 0.5^(batch / half-life).

    Args:
        batch: Images in the step, over all processes.
        nimg: Images seen so far.
        halflife_nimg: Half-life, in images.
        rampup_ratio: The half-life is at most this share of ``nimg``, so that the random start is
            forgotten early; None for a constant half-life.

    Returns:
        beta in ``[0, 1)``; 0 when the half-life is 0.

    Source: arXiv 2206.00364, App. F.2; arXiv 1912.04958 for the half-life.
    """
    halflife = halflife_nimg if rampup_ratio is None else min(halflife_nimg, rampup_ratio * nimg)
    return float(0.5 ** (batch / halflife)) if halflife > 0 else 0.0


@torch.no_grad()
def update_ema(ema_net: nn.Module, net: nn.Module, beta: float) -> None:
    """Move the averaged weights, ema <- beta ema + (1 - beta) net, and copy the buffers.

    Args:
        ema_net: The average; changed in place.
        net: The network in training, of the same structure.
        beta: Share of the old average, in ``[0, 1]``.
    """
    torch._foreach_lerp_(list(ema_net.parameters()), list(net.parameters()), 1.0 - beta)
    for mean, buffer in zip(ema_net.buffers(), net.buffers(), strict=True):
        mean.copy_(buffer)
