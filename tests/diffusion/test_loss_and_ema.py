import copy

import pytest
import torch
from scipy import stats
from torch import nn

from cedm_ray.diffusion.ema import ema_beta, update_ema
from cedm_ray.diffusion.loss import edm_loss_per_pixel, loss_weight, sample_sigma


def test_noise_levels_are_log_normal() -> None:
    sigma = sample_sigma(5000, -1.2, 1.2, torch.Generator().manual_seed(0), "cpu")
    assert stats.kstest(sigma.log().numpy(), "norm", args=(-1.2, 1.2)).pvalue > 1e-3


def test_the_weight_makes_the_loss_of_a_fresh_network_equal_at_every_level() -> None:
    # The weight is 1 / c_out^2, and the raw output of a fresh network is 0: each level then costs the variance
    # of the raw target, which preconditioning makes 1.
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.01, 0.3, 2.0, 50.0])
    y = 0.5 * torch.randn(4, 1, 100, 100, generator=generator)
    noise = torch.randn(y.shape, generator=generator)

    def wiener(x: torch.Tensor, level: torch.Tensor, *_: object) -> torch.Tensor:
        return x * (0.25 / (0.25 + level**2))[:, None, None, None]

    loss = edm_loss_per_pixel(wiener, y, sigma, noise)
    torch.testing.assert_close(loss.mean((1, 2, 3)), torch.ones(4), atol=0.06, rtol=0)
    torch.testing.assert_close(loss_weight(sigma), 1 / sigma**2 + 4)


def test_a_half_life_halves_the_distance() -> None:
    net = nn.Linear(3, 2)
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(1.0)
    for _ in range(10):
        update_ema(ema, net, ema_beta(batch=100, nimg=10**9, halflife_nimg=1000))
    for mean, parameter in zip(ema.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mean - parameter, torch.full_like(mean, 0.5), atol=1e-5, rtol=0)


def test_the_ramp_up_bounds_the_half_life_by_a_share_of_the_images_seen() -> None:
    assert ema_beta(50, 1000, 500_000, 0.05) == pytest.approx(0.5)
    assert ema_beta(50, 1000, 50, 0.05) == pytest.approx(0.5)
    assert ema_beta(50, 1000, 100, None) == pytest.approx(0.5**0.5)
    assert ema_beta(50, 0, 500_000, 0.05) == 0.0
    assert ema_beta(50, 1000, 0.0, None) == 0.0


def test_buffers_are_copied() -> None:
    net, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    net(torch.randn(8, 2))
    update_ema(ema, net, 0.9)
    assert torch.equal(ema.running_mean, net.running_mean) and int(ema.num_batches_tracked) == 1
