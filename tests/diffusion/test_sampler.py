from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from cedm_ray.diffusion.heun import heun_sample, sigma_steps
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.sampler import generate, to_uint8
from cedm_ray.diffusion.starts import draw_conditions, initial_noise

MakeNet = Callable[..., EDMPrecond]
Images = Callable[..., Tensor]


class GaussianDenoiser(nn.Module):
    """The exact denoiser of N(0, s^2) data, E[y | x] = x s^2 / (s^2 + sigma^2)."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor, sigma: Tensor, class_index: Tensor | None = None) -> Tensor:
        return x * (self.std**2 / (self.std**2 + sigma**2))[:, None, None, None]


def test_sampling_converges_to_the_closed_form_of_gaussian_data() -> None:
    # The flow of N(0, s^2) keeps x / sqrt(s^2 + sigma^2), so 80 z ends at 80 z s / sqrt(s^2 + 80^2).
    latents = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = latents.double() * 80 * 0.5 / np.sqrt(0.25 + 6400)
    errors = []
    for num_steps in (20, 40, 80):
        ours = heun_sample(GaussianDenoiser(0.5), latents, num_steps=num_steps)  # type: ignore[arg-type]
        errors.append(float((ours - exact).abs().max()))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # second order: a factor of 4


class ClusterDenoiser(nn.Module):
    """The exact denoiser of clusters c ~ N(m_c, s^2), and of one N(m, s^2) where there is no condition."""

    def __init__(self, means: list[float], mean: float, std: float) -> None:
        super().__init__()
        self.means, self.std = torch.tensor([*means, mean]), std  # NO_CONDITION, -1, picks the last
        self.batches: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, class_index: Tensor) -> Tensor:
        self.batches.append(len(x))
        mean = self.means[class_index][:, None, None, None]
        return mean + (x - mean) * (self.std**2 / (self.std**2 + sigma**2))[:, None, None, None]


def test_guidance_has_the_closed_form_of_gaussian_clusters_and_one_call_for_both_answers() -> None:
    # (1 + w) D_c - w D is the denoiser of N(m_c + w (m_c - m), s^2): the answers differ in their means alone.
    latents = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    clusters, means, guidance = torch.tensor([1, 0, 1]), torch.tensor([-0.4, 0.3]), 1.5
    centre = (means + guidance * (means - 0.1))[clusters][:, None, None, None].double()
    exact = centre + (latents.double() * 80 - centre) * 0.2 / np.sqrt(0.2**2 + 6400)
    net = ClusterDenoiser(means.tolist(), 0.1, 0.2)
    errors = [
        float((heun_sample(net, latents, clusters, num_steps, guidance=guidance) - exact).abs().max())  # type: ignore[arg-type]
        for num_steps in (20, 40, 80)
    ]
    assert net.batches == [6] * (39 + 79 + 159)
    assert errors[0] < 0.05 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def test_without_guidance_nothing_is_computed_for_it_and_nothing_changes(network: MakeNet) -> None:
    net, latents, clusters = network(), torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 3])
    sizes: list[int] = []
    net.eval().register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    plain, zero = heun_sample(net, latents, clusters, 4), heun_sample(net, latents, clusters, 4, guidance=0.0)
    assert torch.equal(plain, zero) and sizes == [3] * 14
    far = heun_sample(net, latents, clusters, 4, guidance=2.0)
    assert sizes[14:] == [6] * 7 and float((far - plain).abs().max()) > 1e-3


def test_guidance_that_means_nothing_is_refused(network: MakeNet) -> None:
    for guidance, clusters in ((float("nan"), torch.tensor([0])), (1.0, None)):
        with pytest.raises(ValueError, match=f"guidance is {guidance}; it must be finite, and 0 without a condition"):
            heun_sample(network(), torch.zeros(1, 1, 8, 8), clusters, guidance=guidance)


def test_guidance_goes_through_to_generated_images(network: MakeNet, images: Images) -> None:
    net = network()
    plain, guided = (images(net, range(6), 4, guidance=w) for w in (0.0, 3.0))
    assert torch.equal(plain, images(net, range(6), 4)) and not torch.equal(plain, guided)


def test_noise_levels_fall_from_sigma_max_to_sigma_min_and_to_zero() -> None:
    levels = sigma_steps(18)
    assert levels.dtype == torch.float64 and len(levels) == 19
    torch.testing.assert_close(levels[[0, -2, -1]], torch.tensor([80, 0.002, 0], dtype=torch.float64))
    roots = levels[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17))
    assert sigma_steps(1).tolist() == pytest.approx([80.0, 0.0])


def test_settings_that_make_no_schedule_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0"):
        sigma_steps(0)
    with pytest.raises(ValueError, match="sigma_min"):
        sigma_steps(5, sigma_min=2.0, sigma_max=1.0)


def test_uint8_covers_the_range_and_clips() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 0.5 / 127.5], dtype=torch.float64)
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 128]


def test_every_training_pixel_survives_the_way_to_the_network_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.double() / 127.5 - 1), pixels)


@pytest.mark.parametrize("label_dim", [0, 5])
def test_an_image_depends_on_its_index_and_not_on_its_batch(label_dim: int, network: MakeNet, images: Images) -> None:
    net = network(label_dim)
    whole = images(net, range(12), 12)
    assert whole.shape == (12, 1, 8, 8) and whole.dtype == torch.uint8
    for part in (images(net, range(12), 5), torch.cat([images(net, [11], 1), images(net, range(11), 4)]).roll(-1, 0)):
        # Convolutions of other batch sizes round differently: at most the last bit of a pixel may move.
        assert (whole.int() - part.int()).abs().max() <= 1
    assert whole.float().std(0).mean() > 1


def test_noise_is_the_same_for_an_index_anywhere_and_unit_gaussian() -> None:
    noise = initial_noise(7, range(2000), (1, 4, 4), "cpu")
    assert torch.equal(initial_noise(7, [1999, 3], (1, 4, 4), "cpu"), noise[[1999, 3]])
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1]
    assert abs(correlation) < 0.02
    assert not torch.equal(initial_noise(8, [3], (1, 4, 4), "cpu")[0], noise[3])


def test_conditions_follow_the_cluster_distribution(probs: Tensor) -> None:
    drawn = draw_conditions(0, range(5000), probs * 7)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[1, 4]].tolist() == [0, 0]
    used = probs > 0
    assert stats.chisquare(counts[used].numpy(), (probs[used] * 5000).numpy()).pvalue > 1e-3
    assert torch.equal(draw_conditions(0, [4999, 17], probs), drawn[[4999, 17]])


def test_condition_and_noise_are_independent() -> None:
    drawn = draw_conditions(0, range(4000), torch.ones(2))
    first = initial_noise(0, range(4000), (1,), "cpu")[:, 0]
    assert stats.ks_2samp(first[drawn == 0].numpy(), first[drawn == 1].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("probs", [[-0.1, 1.1], [0.0, 0.0], [float("nan"), 1.0]])
def test_a_distribution_that_is_none_is_refused(probs: list[float]) -> None:
    with pytest.raises(ValueError, match="cluster_probs"):
        draw_conditions(0, [0], torch.tensor(probs))


def test_generating_restores_the_mode_and_turns_dropout_off(network: MakeNet, images: Images) -> None:
    net = network().train()
    assert torch.equal(images(net, range(4), 4), images(net, range(4), 4))
    assert net.training


def test_a_distribution_of_another_length_is_refused(network: MakeNet) -> None:
    with pytest.raises(ValueError, match="label_dim 5"):
        next(generate(network(), seed=0, indices=[0], cluster_probs=torch.ones(4), batch_size=1, device="cpu"))


def test_a_batch_of_nothing_is_refused(network: MakeNet, probs: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        next(generate(network(), seed=0, indices=[0], cluster_probs=probs, batch_size=0, device="cpu"))
