"""TEMI: train clustering heads on pairs of neighbouring images and assign every image to a cluster."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_learner import TemiLearner
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.types import Clustering, make_clustering

__all__ = ["TemiProgress", "TemiSettings", "TemiTrainer", "fit_temi"]

_BLOCK = 8192  # images assigned at a time


@dataclass(frozen=True)
class TemiProgress:
    """Where training stands after an epoch."""

    epoch: int
    """Epochs done, from 1."""
    epochs: int
    """Epochs to do."""
    loss: float
    """Loss of the epoch, averaged over steps and heads."""
    best_loss: float
    """Loss of the epoch of the best head, averaged over steps."""
    best_head: int
    """Head with the lowest loss in the epoch."""
    lr: float
    """Learning rate of the epoch's last step, as the optimizer used it."""


class TemiTrainer:
    """Heads in training on one dataset.

    Args:
        embeddings: Features, shape ``(N, D)``, float32; may be read-only, and is not copied on a CPU.
        neighbors: Nearest neighbours of each image, shape ``(N, k)``, integers in ``[0, N)``.
        num_clusters: Clusters of each head, C, in ``[2, N]``.
        settings: How to train.
        seed: Seed of the starting weights, the order of the images and the draw of neighbours.
        device: Where to train; features and neighbours are held there.

    Raises:
        ValueError: If the arrays do not fit one another, a feature is not finite, or C lies outside ``[2, N]``.

    On a CPU the result depends on the arguments and the number of threads alone.
    """

    def __init__(
        self,
        embeddings: NDArray[np.float32],
        neighbors: NDArray[np.integer[Any]],
        num_clusters: int,
        settings: TemiSettings,
        *,
        seed: int,
        device: torch.device | str,
    ) -> None:
        _check(embeddings, neighbors, num_clusters)
        self.settings = settings
        self.num_clusters = num_clusters
        self._embeddings = _resident(embeddings, device)
        if not bool(torch.isfinite(self._embeddings).all()):
            raise ValueError("embeddings hold NaN or infinity; every feature must be finite")
        if settings.standardize:
            self._embeddings = _standardized(self._embeddings)
        self._neighbors = _resident(neighbors.astype(np.int32, copy=False), device)  # torch indexes few dtypes
        self._generator = torch.Generator(device).manual_seed(seed)
        student = Heads(
            embeddings.shape[1],
            num_clusters,
            num_heads=settings.num_heads,
            hidden_dim=settings.hidden_dim,
            bottleneck_dim=settings.bottleneck_dim,
            generator=torch.Generator().manual_seed(seed),
        )
        self.learner = TemiLearner(student.to(device), settings)
        self._epoch = 0
        self._head_losses = torch.full((settings.num_heads,), float("nan"), device=device)

    def epochs(self) -> Iterator[TemiProgress]:
        """Train, one epoch per item; training can be stopped after any of them and goes on with a second call.

        Yields:
            Progress after each epoch.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        while self._epoch < self.settings.epochs:
            lr = self._train_epoch()
            self._epoch += 1
            losses = self._head_losses.cpu()
            if not bool(torch.isfinite(losses).all()):
                raise FloatingPointError(f"the TEMI loss is not finite in epoch {self._epoch}; try a lower lr")
            best_head = int(losses.argmin())
            yield TemiProgress(
                self._epoch, self.settings.epochs, float(losses.mean()), float(losses[best_head]), best_head, lr
            )

    def clustering(self) -> Clustering:
        """Assign every image with the teacher's weights of the head whose loss was lowest in the last epoch.

        Returns:
            The clustering.

        Raises:
            RuntimeError: If no epoch has been trained.
        """
        if self._epoch == 0:
            raise RuntimeError("no epoch has been trained; iterate over epochs() first")
        losses = self._head_losses.cpu()
        best_head = int(losses.argmin())
        assignments, max_prob = self._assign(self.learner.teacher.head(best_head))
        return make_clustering(
            assignments.cpu().numpy(),
            self.num_clusters,
            max_prob=max_prob.cpu().numpy(),
            head_losses=losses.numpy(),
            best_head=best_head,
        )

    def _train_epoch(self) -> float:
        """One pass in a new order with newly drawn neighbours; nothing waits for the device within."""
        settings, num_images = self.settings, len(self._embeddings)
        device, generator = self._embeddings.device, self._generator
        batch = min(settings.batch_size, num_images)
        steps = num_images // batch
        order = torch.randperm(num_images, generator=generator, device=device)[: steps * batch]
        draw = torch.randint(self._neighbors.shape[1], order.shape, generator=generator, device=device)
        partners = self._neighbors[order, draw].long()
        total, lr = torch.zeros_like(self._head_losses), 0.0
        batches = zip(torch.split(order, batch), torch.split(partners, batch), strict=True)
        for step, (rows, partner_rows) in enumerate(batches):
            lr = self._learning_rate(self._epoch * steps + step, steps, batch)
            freeze = self._epoch < settings.freeze_last_layer_epochs
            x, x_neighbour = self._embeddings[rows], self._embeddings[partner_rows]
            total += self.learner.step(x, x_neighbour, lr=lr, freeze_last_layer=freeze)
        self._head_losses = total / steps
        return lr

    def _learning_rate(self, step: int, steps_per_epoch: int, batch: int) -> float:
        """Linear warm-up, then constant."""
        warmup_steps = self.settings.warmup_epochs * steps_per_epoch
        return self.settings.lr * batch / 256 * min(1.0, (step + 1) / max(1, warmup_steps))

    @torch.no_grad()
    def _assign(self, head: Heads) -> tuple[Tensor, Tensor]:
        """Most probable cluster of each image and its probability, both of shape ``(N,)``."""
        found = [
            torch.softmax(head(block)[0] / self.settings.teacher_temperature, dim=-1).max(dim=-1)
            for block in torch.split(self._embeddings, _BLOCK)
        ]
        # Rounding can take a sure cluster's probability a hair above 1.
        max_prob = torch.cat([part.values for part in found]).clamp_max(1)
        return torch.cat([part.indices for part in found]), max_prob


def fit_temi(
    embeddings: NDArray[np.float32],
    neighbors: NDArray[np.integer[Any]],
    num_clusters: int,
    settings: TemiSettings,
    *,
    seed: int,
    device: torch.device | str,
    on_progress: Callable[[TemiProgress], None] | None = None,
) -> Clustering:
    """Train heads to the end and assign every image to a cluster.

    Args:
        embeddings: Features, shape ``(N, D)``, float32; may be read-only, and is not copied on a CPU.
        neighbors: Nearest neighbours of each image, shape ``(N, k)``, integers in ``[0, N)``.
        num_clusters: Clusters of each head, C, in ``[2, N]``.
        settings: How to train.
        seed: Seed of the starting weights, the order of the images and the draw of neighbours.
        device: Where to train.
        on_progress: Called after each epoch; may raise to stop.

    Returns:
        The clustering of the head with the lowest mean loss over the last epoch, with the teacher's weights.

    Raises:
        ValueError: If the arrays do not fit one another, a feature is not finite, or C lies outside ``[2, N]``.
        FloatingPointError: If the loss is not finite.

    Source: arXiv 2303.17896, Sec. 3.
    """
    trainer = TemiTrainer(embeddings, neighbors, num_clusters, settings, seed=seed, device=device)
    for progress in trainer.epochs():
        if on_progress is not None:
            on_progress(progress)
    return trainer.clustering()


def _check(embeddings: NDArray[Any], neighbors: NDArray[Any], num_clusters: int) -> None:
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings are {embeddings.shape} {embeddings.dtype}; they must be (N, D) float32")
    num_images = len(embeddings)
    if neighbors.ndim != 2 or len(neighbors) != num_images or neighbors.shape[1] < 1:
        raise ValueError(f"neighbors have shape {neighbors.shape}; ({num_images}, k) with k >= 1 is needed")
    if not 2 <= num_clusters <= num_images:
        raise ValueError(f"num_clusters is {num_clusters}; it must lie in [2, {num_images}], the number of images")
    if not np.issubdtype(neighbors.dtype, np.integer) or neighbors.min() < 0 or neighbors.max() >= num_images:
        raise ValueError(f"neighbors must be integers in [0, {num_images})")


def _resident(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """The array on the device; on a CPU a view of it, which is never written to."""
    with warnings.catch_warnings():
        # Shared memory is mapped read-only, of which torch warns since it has no read-only tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _standardized(embeddings: Tensor) -> Tensor:
    """Each feature at mean 0 and standard deviation 1; a constant feature becomes 0."""
    std, mean = torch.std_mean(embeddings, dim=0, correction=0)
    return (embeddings - mean) / torch.where(std > 0, std, 1.0)
