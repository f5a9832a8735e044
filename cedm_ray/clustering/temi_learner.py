"""One optimisation step of TEMI: student, teacher and the teacher's running cluster distribution."""

import copy

import torch
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.loss import temi_loss, update_teacher_probs
from cedm_ray.clustering.temi_settings import TemiSettings


class TemiLearner:
    """Student heads, the teacher that follows them, and the optimizer.

    The gains of the last layer are decayed with the weight matrices: they are stored as ``(C, 1)`` in the published
    implementation, which spares only biases and parameters with one axis.

    Args:
        student: The heads to train; they are trained in place, on the device where they lie.
        settings: Loss, optimizer and momenta; the learning rate is an argument of :meth:`step`.
        teacher: The teacher to start from; a copy of the student where it is not given.

    Source: arXiv 2303.17896, Sec. 3.
    """

    def __init__(self, student: Heads, settings: TemiSettings, *, teacher: Heads | None = None) -> None:
        self.student = student
        self.teacher = (copy.deepcopy(student) if teacher is None else teacher).requires_grad_(False)
        num_heads, num_clusters, _ = student.last_direction.shape
        self.teacher_probs = student.last_gain.new_full((num_heads, num_clusters), 1 / num_clusters)
        self._settings = settings
        biases = [value for name, value in student.named_parameters() if name.endswith("_bias")]
        others = [value for name, value in student.named_parameters() if not name.endswith("_bias")]
        self.optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
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
        settings = self._settings
        both = torch.cat([x, x_neighbour])
        with torch.no_grad():
            teacher_logits = self.teacher(both).unflatten(1, (2, -1))
            self.teacher_probs = update_teacher_probs(
                self.teacher_probs,
                teacher_logits,
                temperature=settings.teacher_temperature,
                momentum=settings.probs_momentum,
            )
        losses = temi_loss(
            self.student(both).unflatten(1, (2, -1)),
            teacher_logits,
            self.teacher_probs,
            gamma=settings.gamma,
            student_temperature=settings.student_temperature,
            teacher_temperature=settings.teacher_temperature,
        )
        self._update(losses.mean(), lr, freeze_last_layer)
        return losses.detach()

    def _update(self, loss: Tensor, lr: float, freeze_last_layer: bool) -> None:
        """Step the optimizer, then let the teacher follow."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if freeze_last_layer:  # without a gradient AdamW passes the parameter over, decay included
            self.student.last_gain.grad = self.student.last_direction.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for followed, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                followed.lerp_(value, 1 - self._settings.teacher_momentum)
