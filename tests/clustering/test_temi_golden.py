"""Three optimisation steps of TEMI against the published implementation's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_learner import TemiLearner
from cedm_ray.clustering.temi_settings import TemiSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "temi_steps.npz"
NAMES = {  # ours, and the golden file's, in the golden file's order
    "hidden_weight": "mlp.0.weight",
    "hidden_bias": "mlp.0.bias",
    "bottleneck_weight": "mlp.2.weight",
    "bottleneck_bias": "mlp.2.bias",
    "last_gain": "last_layer.weight_g",
    "last_direction": "last_layer.weight_v",
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def parameters(golden, state, num_heads):
    return {
        name: torch.from_numpy(np.stack([golden[f"{state}/heads.{h}.{theirs}"] for h in range(num_heads)]))
        for name, theirs in NAMES.items()
    }


def heads(golden, state, config):
    built = Heads(
        config["embed_dim"],
        config["num_clusters"],
        num_heads=config["num_heads"],
        hidden_dim=config["hidden_dim"],
        bottleneck_dim=config["bottleneck_dim"],
        generator=torch.Generator().manual_seed(0),
    )
    built.load_state_dict(parameters(golden, state, config["num_heads"]))
    return built


def assert_near(ours, theirs, what, tolerance=1e-5):
    ours, theirs = (value.detach().numpy() if isinstance(value, Tensor) else value for value in (ours, theirs))
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference <= tolerance, f"{what}: {difference:.2e}"


def trained(golden, config):
    """The learner after three steps that were checked, and where the first gradient was nothing but rounding."""
    settings = TemiSettings(
        gamma=config["gamma"],
        student_temperature=config["temperature"],
        teacher_temperature=config["temperature"],
        probs_momentum=config["probs_momentum"],
        teacher_momentum=config["teacher_momentum"],
        weight_decay=config["weight_decay"],
    )
    learner = TemiLearner(heads(golden, "student0", config), settings, teacher=heads(golden, "teacher0", config))
    for group in learner.optimizer.param_groups:  # the golden run decays the biases too
        group["weight_decay"] = config["weight_decay"]
    for step in range(3):
        x, x_neighbour = (torch.from_numpy(golden[f"step{step}/{name}"]) for name in ("x", "x_neighbour"))
        losses = learner.step(x, x_neighbour, lr=config["lr"])
        assert_near(losses, golden[f"step{step}/head_losses"], f"losses of step {step}")
        assert_near(learner.teacher_probs, golden[f"step{step}/pk"], f"teacher distribution of step {step}")
        grads = {name: value.grad for name, value in learner.student.named_parameters()}
        norms = torch.stack([grads[name][h].norm() for h in range(config["num_heads"]) for name in NAMES])
        # The weight that the first step moved by rounding alone (see the test) shows in the gradients that follow.
        tolerance = 1e-5 if step == 0 else 1e-4
        assert_near(norms, golden[f"step{step}/grad_norm"], f"gradients of step {step}", tolerance)
        if step == 0:
            rounding = {name: grad.abs() < 1e-8 for name, grad in grads.items()}
    return learner, rounding


def test_three_steps_give_the_published_losses_gradients_and_weights(golden):
    """All within 1e-5, but for one weight of 2,085 whose first gradient is 3e-9, below the eps of Adam.

    There Adam divides rounding error by its own size; the published float32 run and the same steps in float64 differ
    by 1.4e-4 in that weight too, and by 4e-6 at most in every other.
    """
    config = json.loads(str(golden["config_json"]))
    learner, rounding = trained(golden, config)
    assert sum(int(mask.sum()) for mask in rounding.values()) <= 1
    for state, ours in (("student3", learner.student), ("teacher3", learner.teacher)):
        for name, theirs in parameters(golden, state, config["num_heads"]).items():
            value = dict(ours.named_parameters())[name]
            assert_near(value[~rounding[name]], theirs[~rounding[name]], f"{state} {name}")
            assert_near(value, theirs, f"{state} {name}", 1e-3)


@pytest.mark.parametrize("change", [{"gamma": 0.61}, {"temperature": 0.101}, {"probs_momentum": 0.89}])
def test_the_published_losses_tell_a_slightly_different_loss_apart(golden, change):
    config = json.loads(str(golden["config_json"])) | change
    with pytest.raises(AssertionError, match=r"of step [01]"):
        trained(golden, config)
