"""What the tests of the sampler sample from: a small network of drawn weights, and a distribution of its clusters."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sampler import generate
from cedm_ray.diffusion.settings import NetSettings, build_net

Batches = Callable[..., Iterator[Tensor]]


@pytest.fixture
def probs() -> Tensor:
    return torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0])


@pytest.fixture
def network() -> Callable[..., EDMPrecond]:
    """Makes the same network at each call."""

    def make(label_dim: int = 5, std: float = 0.15) -> EDMPrecond:
        net = build_net(NetSettings(8, (1, 2), 1, (), 0.5), 8, 1, label_dim, augment=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(0, std, generator=generator)
        return net

    return make


@pytest.fixture
def batches(probs: Tensor) -> Batches:
    """Generates images of one seed, batch after batch."""

    def make(net: EDMPrecond, indices: range | list[int], batch_size: int | None, **more: Any) -> Iterator[Tensor]:
        given = {"cluster_probs": probs if net.label_dim else None, "num_steps": 4, "device": "cpu", **more}
        return generate(net, seed=3, indices=indices, batch_size=batch_size, **given)

    return make


@pytest.fixture
def images(batches: Batches) -> Callable[..., Tensor]:
    """Generates images of one seed, together."""
    return lambda *given, **more: torch.cat(list(batches(*given, **more)))
