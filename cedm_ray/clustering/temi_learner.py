"""One optimisation step of TEMI: student, teacher and the teacher's running cluster distribution."""

import copy

import torch
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_gradient import TemiGradient
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.temi_threads import torch_threads

_LARGE = 1 << 20  # parameters that one thread alone is too slow for


class TemiLearner:
    """Student heads, the teacher that follows them, and the optimizer.

    The gains of the last layer are decayed with the weight matrices: they are stored as ``(C, 1)`` in the published
    implementation, which spares only biases and parameters with one axis.

    Args:
        student: The heads to train; they are trained in place, on the device where they lie.
        settings: Loss, optimizer and momenta; the learning rate is set for each step.
        teacher: The teacher to start from; a copy of the student where it is not given.

    Source: arXiv 2303.17896, Sec. 3.
    """

    def __init__(self, student: Heads, settings: TemiSettings, *, teacher: Heads | None = None) -> None:
        self.student = student
        self.teacher = (copy.deepcopy(student) if teacher is None else teacher).requires_grad_(False)
        num_heads, num_clusters, _ = student.last_direction.shape
        self.teacher_probs = student.last_gain.new_full((num_heads, num_clusters), 1 / num_clusters).detach()
        self._losses_and_gradient = TemiGradient(student, self.teacher, self.teacher_probs, settings)
        self._settings = settings
        self._followers = [value.detach() for value in self.teacher.parameters()]
        self._followed = [value.detach() for value in student.parameters()]
        biases = [value for name, value in student.named_parameters() if name.endswith("_bias")]
        others = [value for name, value in student.named_parameters() if not name.endswith("_bias")]
        on_cuda = student.last_gain.is_cuda
        self.optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}],
            # A tensor on CUDA: a captured graph reads the rate anew at each replay.
            lr=torch.tensor(settings.lr, device=student.last_gain.device) if on_cuda else settings.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
            capturable=on_cuda,
        )

    def step(self, x: Tensor, x_neighbour: Tensor, *, lr: float, freeze_last_layer: bool = False) -> Tensor:
        """Train on one batch of pairs.

        Args:
            x: Features of the images, shape ``(B, D)``, float32.
            x_neighbour: Features of a neighbour of each image, shape ``(B, D)``, float32.
            lr: Learning rate of this step, as the optimizer uses it.
            freeze_last_layer: Whether to drop the gradient of the last layer.

        Returns:
            Loss of each head before the update, shape ``(H,)``, without gradient, on the device.
        """
        self.set_lr(lr)
        return self.train_on(torch.cat([x, x_neighbour]), freeze_last_layer=freeze_last_layer)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the steps that follow, without waiting for the device."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def train_on(self, both: Tensor, *, freeze_last_layer: bool = False) -> Tensor:
        """Train on one batch of pairs at the rate that is set; the host never waits for the device.

        Args:
            both: Features of the images and then of a neighbour of each, shape ``(2B, D)``, float32.
            freeze_last_layer: Whether to drop the gradient of the last layer.

        Returns:
            Loss of each head before the update, shape ``(H,)``, without gradient, on the device.
        """
        losses = self._losses_and_gradient(both)
        if freeze_last_layer:  # without a gradient AdamW passes the parameter over, decay included
            self.student.last_gain.grad = self.student.last_direction.grad = None
        large = sum(value.numel() for value in self._followed) >= _LARGE
        with torch_threads(torch.get_num_threads() if large else 1):
            self.optimizer.step()
            torch._foreach_lerp_(self._followers, self._followed, 1 - self._settings.teacher_momentum)
        return losses
