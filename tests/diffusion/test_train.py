from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor

from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net, local_batch
from cedm_ray.diffusion.state_io import load_state, save_state
from cedm_ray.diffusion.train import train
from cedm_ray.diffusion.train_state import TrainState, new_state
from cedm_ray.diffusion.unet import NO_CONDITION
from cedm_ray.errors import UserError

NET = NetSettings(8, (1, 2), 1, (4,), 0.2)
SETTINGS = TrainSettings(total_batch=8, lr=2e-3, lr_rampup_kimg=0.05, augment_prob=0.3, ema_halflife_kimg=0.02)


def data(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    clusters = torch.arange(n) % 3
    images = (torch.rand(n, 1, 8, 8, generator=generator) * 40 + 80 * clusters[:, None, None, None]).to(torch.uint8)
    return images, clusters


def start(seed: int = 0, net: NetSettings = NET, augment: bool = True) -> TrainState:
    torch.manual_seed(seed)
    return new_state(build_net(net, 8, 1, 3, augment))


def tensors(state: TrainState) -> list[Tensor]:
    moments = [value for slot in state.optimizer.state.values() for value in slot.values()]
    return [*state.net.state_dict().values(), *state.ema.state_dict().values(), *moments]


def same(a: TrainState, b: TrainState) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return a.nimg == b.nimg and all(torch.equal(x, y) for x, y in pairs)


def run(state: TrainState, stop_nimg: int, settings: TrainSettings = SETTINGS, seed: int = 1) -> list[float]:
    images, clusters = data()
    steps = train(state, ResidentImages(images, clusters), settings=settings, stop_nimg=stop_nimg, seed=seed)
    return [float(progress.loss) for progress in steps]


def test_the_loss_falls_on_a_tiny_set() -> None:
    settings = TrainSettings(total_batch=32, lr=4e-3, lr_rampup_kimg=0.1, augment_prob=0.0)
    state = start(net=NetSettings(8, (1, 2), 1, (), 0.0))
    losses = run(state, 32 * 60, settings)
    assert sum(losses[-15:]) / 15 < 0.6 * sum(losses[:5]) / 5


def test_a_run_that_is_saved_and_continued_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole = start()
    losses = run(whole, 32)
    assert len(losses) == 4

    first = start()
    head = run(first, 16)
    save_state(first, tmp_path / "state.safetensors")
    torch.manual_seed(99)  # the global generator's state must not matter
    second = start(seed=7)
    load_state(second, tmp_path / "state.safetensors")
    assert same(second, first)
    assert head + run(second, 32) == losses
    assert same(second, whole)
    assert not same(first, whole)


def test_a_state_before_the_first_step_is_saved_and_loaded(tmp_path: Path) -> None:
    save_state(start(), tmp_path / "state.safetensors")
    state = start(seed=7)
    run(state, 16)
    load_state(state, tmp_path / "state.safetensors")
    run(state, 16)
    expected = start()
    run(expected, 16)
    assert same(state, expected)


def test_a_state_of_another_network_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save_state(start(net=NetSettings(12, (1, 2), 1, (), 0.2)), tmp_path / "state.safetensors")
    state = start()
    with pytest.raises(ValueError, match="another network"):
        load_state(state, tmp_path / "state.safetensors")
    assert same(state, start())


def test_training_leaves_the_global_generator_alone() -> None:
    state = start()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(state, 16)
    assert torch.equal(torch.rand(2), expected)


def test_progress_counts_images_and_ramps_the_learning_rate() -> None:
    state = start()
    images, clusters = data()
    steps = list(train(state, ResidentImages(images, clusters), settings=SETTINGS, stop_nimg=60, seed=0))
    assert [step.nimg for step in steps] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert [step.lr for step in steps] == pytest.approx([2e-3 * min(n / 50, 1) for n in range(8, 65, 8)])
    assert state.nimg == 64
    assert not steps[0].loss.requires_grad
    assert list(train(state, ResidentImages(images, clusters), settings=SETTINGS, stop_nimg=60, seed=0)) == []


def test_the_first_step_is_adams() -> None:
    # Adam's first step moves each weight by lr g / (|g| + eps), whatever the gradient's size.
    state, before = start(), start()
    run(state, 8, TrainSettings(total_batch=8, lr=1e-3, lr_rampup_kimg=0.0, augment_prob=0.3))
    for (name, new), old in zip(state.net.named_parameters(), before.net.parameters(), strict=True):
        assert new.grad is not None
        expected = old - 1e-3 * new.grad / (new.grad.abs() + 1e-8)
        torch.testing.assert_close(new, expected, atol=1e-6, rtol=0, msg=name)


def test_gradients_that_are_no_numbers_are_replaced() -> None:
    state = start()
    weight = state.net.model.out_conv.bias
    weight.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    state.net.model.out_norm.bias.register_hook(lambda grad: torch.full_like(grad, -float("inf")))
    run(state, 8)
    assert weight.grad is not None and not weight.grad.any()
    assert state.net.model.out_norm.bias.grad is not None
    assert torch.equal(state.net.model.out_norm.bias.grad, torch.full_like(state.net.model.out_norm.bias, -1e5))
    assert all(parameter.isfinite().all() for parameter in state.net.parameters())


def seen_conditions(settings: TrainSettings, stop_nimg: int) -> Tensor:
    """The class_index of every image that the network was trained on, in order."""
    state, seen = start(augment=False), []
    state.net.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    run(state, stop_nimg, settings)
    return torch.cat(seen)


def test_dropping_conditions_has_random_numbers_of_its_own() -> None:
    # At a probability that never strikes, all that is drawn for it changes nothing.
    without, never = start(), start()
    assert run(without, 48) == run(never, 48, replace(SETTINGS, label_dropout=1e-30))
    assert same(without, never)


def test_conditions_are_dropped_with_their_probability_and_are_else_the_images_own() -> None:
    plain = replace(SETTINGS, augment_prob=0.0)
    full, part = (seen_conditions(replace(plain, label_dropout=p), 800) for p in (0.0, 0.3))
    dropped = part == NO_CONDITION
    assert torch.equal(part[~dropped], full[~dropped]) and int(full.min()) == 0
    assert stats.binomtest(int(dropped.sum()), len(part), 0.3).pvalue > 1e-3
    steps = dropped.reshape(-1, 8)
    assert len(steps.unique(dim=0)) > 50  # drawn anew at each step


def test_without_a_condition_the_clusters_weights_learn_nothing() -> None:
    state = start()
    run(state, 8, replace(SETTINGS, label_dropout=1 - 1e-12))
    layer = state.net.model.map_label
    assert layer is not None and layer.weight.grad is not None and layer.bias.grad is not None
    assert not layer.weight.grad.any() and layer.bias.grad.any()


def test_a_run_with_dropped_conditions_continues_to_the_bit(tmp_path: Path) -> None:
    settings = replace(SETTINGS, label_dropout=0.5)
    whole, first, second = start(), start(), start(seed=7)
    losses = run(whole, 32, settings)
    head = run(first, 16, settings)
    save_state(first, tmp_path / "state.safetensors")
    load_state(second, tmp_path / "state.safetensors")
    assert head + run(second, 32, settings) == losses and same(second, whole)
    assert losses != run(start(), 32)


def test_an_unconditional_network_has_no_condition_to_drop() -> None:
    images, _ = data()
    torch.manual_seed(0)
    plain, dropping = new_state(build_net(NET, 8, 1, 0, True)), new_state(build_net(NET, 8, 1, 0, True))
    dropping.net.load_state_dict(plain.net.state_dict())
    losses = [
        [
            float(step.loss)
            for step in train(state, ResidentImages(images, None), settings=settings, stop_nimg=16, seed=0)
        ]
        for state, settings in ((plain, SETTINGS), (dropping, replace(SETTINGS, label_dropout=0.5)))
    ]
    assert losses[0] == losses[1]


def test_mistakes_are_named_before_the_first_step() -> None:
    images, clusters = data()
    state = start()

    def attempt(images: Tensor = images, clusters: Tensor | None = clusters, **changes: object) -> None:
        settings = TrainSettings(**{"total_batch": 8, **changes})  # type: ignore[arg-type]
        train(state, ResidentImages(images, clusters), settings=settings, stop_nimg=8, seed=0)

    attempt()
    for pattern, case in {
        "uint8": lambda: attempt(images=images.float()),
        "class_index is None": lambda: attempt(clusters=None),
        r"must lie in \[0, 3\)": lambda: attempt(clusters=clusters + 1),
        "int64": lambda: attempt(clusters=clusters[:5]),
        "sigma_data": lambda: attempt(sigma_data=0.7),
    }.items():
        with pytest.raises(ValueError, match=pattern):
            case()
    with pytest.raises(ValueError, match="augment"):
        train(start(augment=False), ResidentImages(images, clusters), settings=SETTINGS, stop_nimg=8, seed=0)
    with pytest.raises(ValueError, match=r"torch.distributed says 0 of 1"):
        train(state, ResidentImages(images, clusters), settings=SETTINGS, stop_nimg=8, seed=0, rank=1, world_size=2)


def test_a_batch_that_cannot_be_split_says_what_can() -> None:
    assert local_batch(12, 3) == 4
    with pytest.raises(UserError, match="set it to 9 or 6"):
        local_batch(8, 3)
    with pytest.raises(UserError, match=r"set it to 3$"):
        local_batch(2, 3)
