"""Where is computed."""

import torch
from torch import nn


def net_device(net: nn.Module) -> torch.device:
    """Device that holds the network's parameters."""
    return next(net.parameters()).device
