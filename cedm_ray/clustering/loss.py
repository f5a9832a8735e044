"""The TEMI loss: weighted pointwise mutual information between the clusters of an image and of its neighbour.

This is its definition. Training computes the same, with its gradient, in fewer passes: see
:mod:`cedm_ray.clustering.temi_gradient`, which is tested against this.
"""

import torch
from torch import Tensor


def update_teacher_probs(
    teacher_probs: Tensor, teacher_logits: Tensor, *, temperature: float, momentum: float
) -> Tensor:
    """Move the running distribution of the teacher over clusters towards the current batch.

    Args:
        teacher_probs: Running distribution of each head, shape ``(H, C)``.
        teacher_logits: Logits of both views of the batch, shape ``(H, 2, B, C)``.
        temperature: Teacher temperature.
        momentum: Share of the old distribution that is kept, in ``[0, 1)``.

    Returns:
        The new distribution, shape ``(H, C)``.

    Source: arXiv 2303.17896, Sec. 3.
    """
    batch_probs = torch.softmax(teacher_logits / temperature, dim=-1).mean(dim=(1, 2))
    return torch.lerp(batch_probs, teacher_probs, momentum)


def temi_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_probs: Tensor,
    *,
    gamma: float,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Loss of each head, symmetrised over the pair and averaged over the batch.

    With q_s and q_t the distributions of student and teacher over clusters, and q~_t the teacher's running mean::

        pmi(x, x') = log sum_c (q_s(c|x) q_t(c|x'))^gamma / q~_t(c)
        w(x, x')   = mean over heads of sum_c q_t(c|x) q_t(c|x')
        loss       = -w(x, x') (pmi(x, x') + pmi(x', x)) / 2

    Args:
        student_logits: Logits of both views, shape ``(H, 2, B, C)``.
        teacher_logits: Logits of both views, shape ``(H, 2, B, C)``, without gradient.
        teacher_probs: Running distribution of the teacher, shape ``(H, C)``, already moved by this batch.
        gamma: Exponent of the joint probability; below 1 it keeps clusters from emptying.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits.

    Returns:
        Losses, shape ``(H,)``.

    Source: arXiv 2303.17896, Sec. 3.
    """
    log_student = torch.log_softmax(student_logits / student_temperature, dim=-1)
    log_teacher = torch.log_softmax(teacher_logits / teacher_temperature, dim=-1)
    # A cluster that the teacher has left for good must not turn into a division by zero.
    log_prior = teacher_probs.clamp_min(torch.finfo(teacher_probs.dtype).tiny).log()[:, None, None, :]
    pmi = torch.logsumexp(gamma * (log_student + log_teacher.flip(1)) - log_prior, dim=-1)
    return -(_pair_weight(log_teacher) * pmi.mean(dim=1)).mean(dim=1)


def _pair_weight(log_teacher: Tensor) -> Tensor:
    """How surely both images of each pair share a cluster, averaged over heads, shape ``(B,)``."""
    return torch.exp(log_teacher[:, 0] + log_teacher[:, 1]).sum(dim=-1).mean(dim=0)
