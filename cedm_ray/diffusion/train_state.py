"""What a training is at any moment: network, moving average, optimizer and the images seen."""

import copy
from dataclasses import dataclass

import torch

from cedm_ray.diffusion.precond import EDMPrecond


@dataclass
class TrainState:
    """Everything that a run needs to go on, changed in place by `train`."""

    net: EDMPrecond
    """The network in training."""
    ema: EDMPrecond
    """Its moving average, the one to sample from; in eval mode, without gradients."""
    optimizer: torch.optim.Adam
    """Adam over ``net.parameters()``, in their order."""
    nimg: int
    """Images seen so far, over all processes."""
    scaler: torch.amp.GradScaler | None = None
    """Scale of the loss while fp16 is trained in."""


def new_state(net: EDMPrecond) -> TrainState:
    """State of a run at its start; the moving average begins as a copy of the network.

    Args:
        net: Network with its initial weights, on the device to train on, the same in every process.
    """
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    # The learning rate is set at every step.
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    return TrainState(net.train(), ema, optimizer, nimg=0)


def lay_out(state: TrainState, *, channels_last: bool) -> None:
    """Order weights, averages and moments in memory; their values stay the same."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for net in (state.net, state.ema):
        net.to(memory_format=layout)
    for parameter, slot in state.optimizer.state.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            slot[kind] = torch.empty_like(parameter).copy_(slot[kind])
