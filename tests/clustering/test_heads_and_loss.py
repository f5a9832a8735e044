"""The stacked heads and the loss against a loop over heads, images and clusters, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.loss import temi_loss, update_teacher_probs
from cedm_ray.clustering.temi_learner import TemiLearner
from cedm_ray.clustering.temi_settings import TemiSettings

H, B, D, C = 3, 5, 7, 4


def some_heads(seed=0, *, num_heads=H, scale=20.0):
    heads = Heads(
        D, C, num_heads=num_heads, hidden_dim=6, bottleneck_dim=5, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():  # away from the small starting values, so that no part is hidden by another
        heads.hidden_weight.mul_(scale)
        heads.bottleneck_weight.mul_(scale)
        heads.hidden_bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed + 1))
        heads.bottleneck_bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed + 2))
        heads.last_gain.uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed + 3))
    return heads


def batch(seed):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def test_all_heads_at_once_equal_one_head_after_another():
    heads, x = some_heads(), batch(9)
    ours = heads(x)
    for h in range(H):
        hidden = F.gelu(F.linear(x, heads.hidden_weight[h], heads.hidden_bias[h]))
        code = F.normalize(F.linear(hidden, heads.bottleneck_weight[h], heads.bottleneck_bias[h]), dim=1)
        last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, C, bias=False))
        last.load_state_dict(
            {
                "parametrizations.weight.original0": heads.last_gain[h],
                "parametrizations.weight.original1": heads.last_direction[h],
            }
        )
        torch.testing.assert_close(ours[h], last(code))
        torch.testing.assert_close(heads.head(h)(x)[0], ours[h])
    assert ours.shape == (H, B, C)


@torch.no_grad()
def test_what_changes_in_one_head_changes_no_logit_of_the_others():
    heads, x = some_heads(), batch(9)
    before = heads(x).clone()
    for parameter in heads.parameters():
        parameter[1] = 3 * parameter[1] + 0.1
    after = heads(x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.isclose(after[1], before[1]).any()


@pytest.mark.parametrize("index", [-1, H])
def test_a_head_that_is_not_there_is_refused(index):
    with pytest.raises(ValueError, match=rf"index is {index}; it must lie in \[0, 3\)"):
        some_heads().head(index)


def test_every_logit_starts_as_a_cosine():
    heads = Heads(D, C, num_heads=H, hidden_dim=6, bottleneck_dim=5, generator=torch.Generator().manual_seed(0))
    assert heads(batch(1)).abs().max() <= 1 + 1e-6
    assert heads.hidden_weight.detach().std().item() == pytest.approx(0.02, rel=0.2)
    assert not heads.hidden_bias.any() and not heads.bottleneck_bias.any()


def test_a_black_image_leaves_every_gradient_finite_and_small():
    heads = Heads(D, C, num_heads=H, hidden_dim=6, bottleneck_dim=5, generator=torch.Generator().manual_seed(0))
    heads(torch.zeros(B, D)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() < 1e-3 for p in heads.parameters())
    assert torch.equal(heads(torch.zeros(1, D)), torch.zeros(H, 1, C))


def looped_loss(student, teacher, previous, gamma, temperature, momentum):
    """The published formulae, one head, image and cluster at a time, in float64."""
    q_s, q_t = (F.softmax(logits.double() / temperature, dim=-1).numpy() for logits in (student, teacher))
    new_probs = np.array(
        [momentum * previous[h].double().numpy() + (1 - momentum) * q_t[h].reshape(-1, C).mean(0) for h in range(H)]
    )
    losses = np.zeros(H)
    for i in range(B):
        weight = sum(sum(q_t[h, 0, i, c] * q_t[h, 1, i, c] for c in range(C)) for h in range(H)) / H
        for h in range(H):
            for view, other in ((0, 1), (1, 0)):
                joint = [(q_s[h, view, i, c] * q_t[h, other, i, c]) ** gamma / new_probs[h, c] for c in range(C)]
                losses[h] -= weight * math.log(sum(joint)) / 2 / B
    return losses, new_probs


@pytest.mark.parametrize("gamma", [0.6, 1.0])
def test_the_loss_is_the_formula_head_by_head_and_image_by_image(gamma):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(H, 2, B, C, generator=generator) * 0.3 for _ in range(2))
    previous = torch.softmax(torch.randn(H, C, generator=generator), dim=-1)
    expected, expected_probs = looped_loss(student, teacher, previous, gamma, 0.1, 0.9)
    probs = update_teacher_probs(previous, teacher, temperature=0.1, momentum=0.9)
    losses = temi_loss(student, teacher, probs, gamma=gamma, student_temperature=0.1, teacher_temperature=0.1)
    np.testing.assert_allclose(probs.numpy(), expected_probs, rtol=1e-5)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_swapping_the_two_images_of_every_pair_leaves_the_loss_alone():
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(H, 2, B, C, generator=generator) for _ in range(2))
    probs = torch.full((H, C), 1 / C)
    options = {"gamma": 0.6, "student_temperature": 0.1, "teacher_temperature": 0.1}
    torch.testing.assert_close(
        temi_loss(student, teacher, probs, **options), temi_loss(student.flip(1), teacher.flip(1), probs, **options)
    )


def test_a_cluster_that_the_teacher_left_for_good_keeps_the_loss_finite():
    logits = torch.full((1, 2, B, C), -200.0)
    logits[..., 0] = 200.0
    student = logits.clone().requires_grad_()
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    temi_loss(student, logits, probs, gamma=0.6, student_temperature=0.1, teacher_temperature=0.1).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_the_last_layer_rests_while_frozen_and_the_rest_learns():
    learner = TemiLearner(some_heads(), TemiSettings(weight_decay=0.1))
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    learner.step(batch(1), batch(2), lr=1e-2, freeze_last_layer=True)
    after = learner.student.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"last_gain", "last_direction"}
    learner.step(batch(1), batch(2), lr=1e-2)
    assert not any(torch.equal(before[name], value) for name, value in learner.student.state_dict().items())


def test_weight_decay_spares_the_biases_alone():
    """With a zero gradient AdamW moves a parameter by its decay only."""
    learner = TemiLearner(some_heads(), TemiSettings(weight_decay=0.5))
    before = {name: value.clone() for name, value in learner.student.state_dict().items()}
    for parameter in learner.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.1
    learner.optimizer.step()
    for name, value in learner.student.state_dict().items():
        factor = 1.0 if name.endswith("_bias") else 1 - 0.1 * 0.5
        torch.testing.assert_close(value, before[name] * factor)


def test_the_teacher_starts_as_a_copy_and_follows_at_its_momentum():
    learner = TemiLearner(some_heads(), TemiSettings(teacher_momentum=0.75))
    start = {name: value.clone() for name, value in learner.teacher.state_dict().items()}
    assert all(torch.equal(value, learner.student.state_dict()[name]) for name, value in start.items())
    learner.step(batch(1), batch(2), lr=1e-2)
    for name, value in learner.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * learner.student.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in learner.teacher.parameters())
