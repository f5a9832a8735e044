"""The device to compute on, where nobody names one, and the one that a network lies on."""

import torch
from torch import nn


def default_device() -> torch.device:
    """The device where nobody names one: a GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def net_device(net: nn.Module) -> torch.device:
    """Device that holds the network's parameters."""
    return next(net.parameters()).device
