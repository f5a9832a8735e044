"""The gradient that is written by hand against autograd of the loss as it is defined."""

import pytest
import torch
from torch import Tensor

from cedm_ray.clustering import temi_gradient
from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.loss import temi_loss, update_teacher_probs
from cedm_ray.clustering.temi_gradient import TemiGradient, head_blocks
from cedm_ray.clustering.temi_learner import TemiLearner
from cedm_ray.clustering.temi_settings import TemiSettings

H, B, D, C = 5, 6, 7, 4
SETTINGS = TemiSettings(gamma=0.7, student_temperature=0.2, teacher_temperature=0.3, probs_momentum=0.8)
CPU = torch.device("cpu")


def some_heads(seed: int, dtype: torch.dtype = torch.float64) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(D, C, num_heads=H, hidden_dim=6, bottleneck_dim=5, generator=generator).to(dtype)
    with torch.no_grad():  # away from the small starting values, so that no part is hidden by another
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype), alpha=0.5)
    return heads


def some_rows(seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2 * B, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_probs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.softmax(torch.randn(H, C, generator=torch.Generator().manual_seed(4), dtype=dtype), dim=-1)


def by_autograd(student: Heads, teacher: Heads, probs: Tensor, both: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, running distribution and gradients, each from its definition."""
    teacher_logits = teacher(both).unflatten(1, (2, -1)).detach()
    moved = update_teacher_probs(
        probs, teacher_logits, temperature=SETTINGS.teacher_temperature, momentum=SETTINGS.probs_momentum
    )
    losses = temi_loss(
        student(both).unflatten(1, (2, -1)),
        teacher_logits,
        moved,
        gamma=SETTINGS.gamma,
        student_temperature=SETTINGS.student_temperature,
        teacher_temperature=SETTINGS.teacher_temperature,
    )
    return losses, moved, list(torch.autograd.grad(losses.mean(), list(student.parameters())))


def assert_as_autograd(both: Tensor, student: Heads) -> None:
    teacher, probs = some_heads(2), some_probs()
    losses, moved, gradients = by_autograd(student, teacher, probs, both)
    ours = TemiGradient(student, teacher, probs, SETTINGS)(both)
    torch.testing.assert_close(ours, losses.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(probs, moved, rtol=1e-11, atol=1e-13)
    for (name, parameter), gradient in zip(student.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-13, msg=lambda text, n=name: n + text)
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("heads_at_once", [1, 2, 5])
def test_losses_distribution_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, heads_at_once: int
) -> None:
    monkeypatch.setattr(temi_gradient, "_CACHED", heads_at_once * 2 * B * 6)
    assert_as_autograd(some_rows(), some_heads(1))


def test_a_black_image_and_a_dead_code_get_the_gradient_of_autograd() -> None:
    both, student = some_rows(), some_heads(1)
    both[[0, 7]] = 0
    with torch.no_grad():  # the code of a black image is the bottleneck's bias plus what the hidden bias makes of it
        student.hidden_bias.zero_()
        student.bottleneck_bias.zero_()
    assert_as_autograd(both, student)


def test_interleaved_heads_as_cuda_computes_them_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    both, results = some_rows(), []
    for is_cuda in (False, True):
        student = some_heads(1)
        with monkeypatch.context() as patch:
            patch.setattr("cedm_ray.clustering.heads._one_product", lambda x, answer=is_cuda: answer)
            losses = TemiGradient(student, some_heads(2), some_probs(), SETTINGS)(both)
        results.append([losses, *(parameter.grad for parameter in student.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-13)


def test_threads_share_the_heads_and_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temi_gradient, "_CACHED", 1)  # five blocks
    both, before, found = some_rows(), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            learner = TemiLearner(some_heads(1), SETTINGS, teacher=some_heads(2))
            losses = [learner.train_on(both) for _ in range(3)]
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append([*losses, learner.teacher_probs, *learner.student.state_dict().values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_an_error_in_a_thread_comes_through_and_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temi_gradient, "_CACHED", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="size"):
            TemiGradient(some_heads(1), some_heads(2), some_probs(), SETTINGS)(some_rows()[:, :3])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_gradients_stay_at_one_place_in_memory() -> None:
    learner = TemiLearner(some_heads(1), SETTINGS)
    places = []
    for seed in range(2):
        learner.train_on(some_rows(seed))
        places.append([parameter.grad.data_ptr() for parameter in learner.student.parameters()])
    assert places[0] == places[1]


def test_without_memory_for_gradients_backward_is_refused() -> None:
    heads, both = some_heads(1), some_rows()
    with torch.no_grad():
        found = heads.activations(both)
    with pytest.raises(ValueError, match="make_grads"):
        heads.backward(both, slice(None), found, torch.ones_like(found.logits))


@pytest.mark.parametrize(("rows", "size"), [(1024, 1), (256, 4), (10_000, 1), (1, 50)])
def test_blocks_cover_all_heads_in_order_and_stay_small_on_a_cpu(rows: int, size: int) -> None:
    blocks = head_blocks(50, rows, 512, CPU)
    assert [index for block in blocks for index in range(50)[block]] == list(range(50))
    assert max(block.stop - block.start for block in blocks) == size
    assert head_blocks(50, rows, 512, torch.device("cuda")) == [slice(0, 50)]
