"""The TEMI loss of a batch and its gradient, block of heads by block of heads, in few passes over memory.

What is computed is :func:`cedm_ray.clustering.loss.temi_loss` after
:func:`cedm_ray.clustering.loss.update_teacher_probs`. With s and t the logits of student and teacher over their
temperatures, v an image, v' its partner and q~ the teacher's running distribution::

    joint(c|v) = gamma s(c|v) + target(c|v),  target(c|v) = gamma t(c|v') - log q~(c)
    pmi(v)     = log sum_c exp joint(c|v) - gamma (log sum_c exp s(c|v) + log sum_c exp t(c|v'))
    d pmi(v) / d s(c|v) = gamma (softmax_c joint(c|v) - softmax_c s(c|v))

Source: arXiv 2303.17896, Sec. 3; the gradient follows by the chain rule.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.temi_threads import torch_threads

_CACHED = 1 << 19  # hidden values of a block on a CPU: 2 MB in float32

_Found = TypeVar("_Found")


def head_blocks(num_heads: int, rows: int, hidden_dim: int, device: torch.device) -> list[slice]:
    """Which heads to compute at a time: all of them, but on a CPU so few that their activations stay in its caches.

    Args:
        num_heads: Heads, H.
        rows: Rows of features computed at a time.
        hidden_dim: Width of the hidden layer.
        device: Where they are computed.

    Returns:
        Slices that cover all heads in order.
    """
    if device.type != "cpu":
        return [slice(0, num_heads)]
    size = max(1, min(num_heads, _CACHED // (rows * hidden_dim)))
    return [slice(start, min(start + size, num_heads)) for start in range(0, num_heads, size)]


class TemiGradient:
    """Computes losses and gradients; the heads stay the same ones, their weights may move between the calls.

    On a CPU each thread has blocks of its own: waiting for one another after every operation costs the threads little
    on an idle machine, but a slice of the scheduler's time each where a core is busy with something else.

    Args:
        student: Gets the gradient, in ``grad`` of each parameter.
        teacher: Passed no gradient.
        teacher_probs: Running distribution of the teacher for each head, shape ``(H, C)``; is moved in place.
        settings: Temperatures, gamma and momentum of the distribution.
    """

    def __init__(self, student: Heads, teacher: Heads, teacher_probs: Tensor, settings: TemiSettings) -> None:
        self._student, self._teacher, self._probs, self._settings = student, teacher, teacher_probs, settings
        self._targets = teacher_probs.new_empty(0)  # the same memory at every step, or its pages would be got anew
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, both: Tensor) -> Tensor:
        """Move the teacher's running distribution and write the gradient of the mean loss, over what stood there.

        Args:
            both: Features of the images and then of their partners, shape ``(2B, D)``, float32.

        Returns:
            Loss of each head, shape ``(H,)``.
        """
        num_heads, num_clusters = self._probs.shape
        if self._targets.shape != (num_heads, len(both), num_clusters):
            self._targets = both.new_empty(num_heads, len(both), num_clusters)
        self._student.make_grads()
        blocks = head_blocks(num_heads, len(both), self._student.hidden_bias.shape[1], both.device)
        partners = both.roll(len(both) // 2, dims=0)  # row v of the teacher is the partner of row v of the student
        with self._threads_for(blocks):
            found = self._each(lambda block: self._target(block, partners), blocks)
            totals = {block.start: total for block, (total, _) in zip(blocks, found, strict=True)}
            weight = (torch.stack([agreement for _, agreement in found]).sum(dim=0) / num_heads).repeat(2)
            losses = self._each(lambda block: self._learn(block, both, weight, totals[block.start]), blocks)
        return torch.cat(losses)

    @torch.no_grad()  # here and below: threads have modes of their own
    def _target(self, block: slice, partners: Tensor) -> tuple[Tensor, Tensor]:
        """Write target(c|v); returns log sum_c exp t(c|v') and, summed over heads, how surely pairs share a cluster."""
        settings, batch = self._settings, len(partners) // 2
        logits = self._teacher.activations(partners, block, temperature=settings.teacher_temperature).logits
        q, total = _softmax(logits)
        probs = self._probs[block].lerp_(q.mean(dim=1), 1 - settings.probs_momentum)
        # A cluster that the teacher has left for good must not turn into a division by zero.
        log_prior = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        torch.add(-log_prior.unsqueeze(1), logits, alpha=settings.gamma, out=self._targets[block])
        return total, torch.linalg.vecdot(q[:, :batch], q[:, batch:]).sum(dim=0)

    @torch.no_grad()
    def _learn(self, block: slice, both: Tensor, weight: Tensor, teacher_total: Tensor) -> Tensor:
        """Write the gradient of some heads; returns their losses."""
        gamma, temperature = self._settings.gamma, self._settings.student_temperature
        found = self._student.activations(both, block, temperature=temperature)
        q, total = _softmax(found.logits)
        ratio, joint_total = _softmax(self._targets[block].add_(found.logits, alpha=gamma))
        pmi = joint_total - gamma * (total + teacher_total)
        logits_grad = q.sub_(ratio).mul_((weight * (gamma / (len(both) * len(self._probs)))).unsqueeze(-1))
        self._student.backward(both, block, found, logits_grad, temperature=temperature)
        return -(pmi * weight).mean(dim=1)

    def _each(self, work: Callable[[slice], _Found], blocks: list[slice]) -> list[_Found]:
        return list(map(work, blocks) if self._pool is None else self._pool.map(work, blocks))

    @contextmanager
    def _threads_for(self, blocks: list[slice]) -> Iterator[None]:
        """As many threads as torch may use, or as there are blocks, each of which computes alone."""
        threads = min(torch.get_num_threads(), len(blocks))
        if self._probs.is_cuda:
            yield
            return
        with torch_threads(1):
            if threads == 1:
                yield
                return
            with ThreadPoolExecutor(threads) as self._pool:
                try:
                    yield
                finally:
                    self._pool = None


def _softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over the last axis, and log sum exp of it, from the largest value: its probability is at least 1/C."""
    q = x.softmax(dim=-1)
    return q, x.amax(dim=-1) - q.amax(dim=-1).log()
