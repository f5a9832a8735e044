import math

import pytest
import torch

from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.diffusion.unet import NO_CONDITION
from cedm_ray.errors import UserError

TINY = NetSettings(8, (1, 2), 1, (4,), 0.1)


def randomised(label_dim: int = 3) -> EDMPrecond:
    net = build_net(TINY, 8, 1, label_dim, augment=True).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return net


@torch.no_grad()
def test_a_fresh_network_is_the_best_linear_denoiser() -> None:
    # The raw output starts at almost 0, which leaves c_skip x: the Wiener estimate for data of sigma_data.
    net = build_net(TINY, 8, 1, 3, augment=False).eval()
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.01, 0.5, 1.0, 40.0])
    wiener = x * (0.25 / (0.25 + sigma**2))[:, None, None, None]
    torch.testing.assert_close(net(x, sigma, torch.tensor([0, 1, 2, 0])), wiener, atol=1e-3, rtol=0)


def test_initial_weights_have_the_xavier_bound_times_their_gain() -> None:
    torch.manual_seed(0)
    block = build_net(NetSettings(64, (1,), 1, (8,), 0.0), 8, 1, 0, augment=False).model.encoder["8x8_block0"]
    bound = math.sqrt(6 / (64 * 9 + 64 * 9))
    for weight, gain in ((block.conv0.weight, 1.0), (block.conv1.weight, 1e-5)):
        assert 0.99 * gain * bound < float(weight.abs().max().detach()) <= gain * bound
    qkv = math.sqrt(0.2) * math.sqrt(6 / (64 + 192))
    assert 0.99 * qkv < float(block.attention.qkv.weight.abs().max().detach()) <= qkv * (1 + 1e-6)


@torch.no_grad()
def test_no_class_index_differs_from_every_cluster_and_each_cluster_from_the_others() -> None:
    net = randomised()
    x, sigma = torch.randn(1, 1, 8, 8).expand(4, -1, -1, -1), torch.ones(4)
    out = torch.cat([net(x[:3], sigma[:3], torch.arange(3)), net(x[:1], sigma[:1])])
    assert torch.cdist(out.flatten(1), out.flatten(1)).add(torch.eye(4)).min() > 1e-3


@torch.no_grad()
def test_zero_augment_labels_are_no_augment_labels() -> None:
    net = randomised()
    x, sigma, cluster = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 2])
    assert torch.equal(net(x, sigma, cluster, torch.zeros(2, 9)), net(x, sigma, cluster))


@torch.no_grad()
def test_single_images_of_a_batch_can_go_without_a_condition() -> None:
    net = randomised()
    x, sigma = torch.randn(3, 1, 8, 8), torch.ones(3)
    mixed, none = net(x, sigma, torch.tensor([2, NO_CONDITION, 0])), net(x, sigma)
    torch.testing.assert_close(mixed[1], none[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[::2], net(x, sigma, torch.tensor([2, 1, 0]))[::2], atol=1e-6, rtol=0)
    assert float((mixed - none).flatten(1).norm(dim=1)[[0, 2]].min()) > 1e-3


@pytest.mark.parametrize("index", [-2, 3])
def test_a_cluster_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\), or be -1 for no condition"):
        randomised()(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([index]))


def test_a_cluster_for_an_unconditional_network_is_refused() -> None:
    with pytest.raises(ValueError, match="label_dim 0"):
        randomised(0)(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.tensor([0]))


def test_images_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        build_net(NetSettings(8, (1, 1, 1), 1, (), 0.0), 10, 1, 0, augment=False)


def test_a_single_pixel_of_resolution_and_odd_widths_work() -> None:
    net = build_net(NetSettings(12, (1, 3), 1, (1,), 0.0), 2, 1, 0, augment=False)
    assert net(torch.zeros(3, 1, 2, 2), torch.ones(3)).shape == (3, 1, 2, 2)


@pytest.mark.parametrize(
    "bad",
    [{"model_channels": 6}, {"channel_mult": ()}, {"num_blocks": 0}, {"dropout": 1.0}, {"attn_resolutions": (0,)}],
)
def test_net_settings_name_the_field_that_is_wrong(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        NetSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"total_batch": 0}, {"lr": 0.0}, {"lr_rampup_kimg": -1.0}, {"augment_prob": 1.2}, {"sigma_data": 0.0},
        {"label_dropout": 1.0}, {"label_dropout": -0.1}, {"label_dropout": float("nan")},
    ],
)  # fmt: skip
def test_train_settings_name_the_field_that_is_wrong(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        TrainSettings(**bad)  # type: ignore[arg-type]
