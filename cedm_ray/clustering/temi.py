"""TEMI: train clustering heads on pairs of neighbouring images and assign every image to a cluster."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.clustering.head_file import TemiHead
from cedm_ray.clustering.heads import Heads
from cedm_ray.clustering.temi_assign import assign, head_utilization
from cedm_ray.clustering.temi_features import Features, Placement, choose_placement, free_bytes, view
from cedm_ray.clustering.temi_graph import Repeated, selected
from cedm_ray.clustering.temi_learner import TemiLearner
from cedm_ray.clustering.temi_precision import fast_matmul
from cedm_ray.clustering.temi_settings import TemiSettings
from cedm_ray.clustering.types import Clustering, make_clustering

__all__ = ["TemiProgress", "TemiTrainer", "fit_temi"]


@dataclass(frozen=True)
class TemiProgress:
    """Where training stands after an epoch."""

    epoch: int
    """Epochs done, from 1."""
    epochs: int
    """Epochs to do."""
    loss: float
    """Loss of the epoch, averaged over steps and heads."""
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
        device: Where to train; neighbours are held there, and features unless they are too many.
        placement: How the features are held; None to decide by their size and the free memory of the device.

    Raises:
        ValueError: If the arrays do not fit one another, a feature is not finite, or C lies outside ``[2, N]``.

    On a CPU the result depends on the arguments and the number of threads alone. On CUDA products of matrices are
    rounded to TF32 in training, not in assigning.
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
        placement: Placement | None = None,
    ) -> None:
        _check(embeddings, neighbors, num_clusters)
        self.settings = settings
        self.num_clusters = num_clusters
        self.device = torch.device(device)
        self.features = Features(
            embeddings,
            standardize=settings.standardize,
            placement=placement or choose_placement(embeddings.nbytes, free_bytes(self.device)),
            device=self.device,
        )
        self.neighbors = view(neighbors.astype(np.int32, copy=False)).to(self.device)  # torch indexes few dtypes
        self._generator = torch.Generator(self.device).manual_seed(seed)
        student = Heads(
            embeddings.shape[1],
            num_clusters,
            num_heads=settings.num_heads,
            hidden_dim=settings.hidden_dim,
            bottleneck_dim=settings.bottleneck_dim,
            generator=torch.Generator().manual_seed(seed),
        )
        self.learner = TemiLearner(student.to(self.device), settings)
        self._epoch = 0
        self._batch = min(settings.batch_size, len(embeddings))
        # A captured step reads its batch here and adds its losses there, always.
        self._both = torch.empty(2 * self._batch, embeddings.shape[1], device=self.device)
        self._loss_sums = torch.zeros(settings.num_heads, device=self.device)
        self._step = Repeated(self._train_on_both, self.device)

    def epochs(self) -> Iterator[TemiProgress]:
        """Train, one epoch per item; training can be stopped after any of them and goes on with a second call.

        Yields:
            Progress after each epoch.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        while self._epoch < self.settings.epochs:
            lr = self.train(self.draw_rows())
            self._epoch += 1
            losses = self._head_losses()
            if not bool(torch.isfinite(losses).all()):
                raise FloatingPointError(f"the TEMI loss is not finite in epoch {self._epoch}; try a lower lr")
            yield TemiProgress(self._epoch, self.settings.epochs, float(losses.mean()), int(losses.argmin()), lr)

    def draw_rows(self) -> Tensor:
        """Draw the batches of an epoch: every image once, in a new order, and a neighbour of each.

        Returns:
            Images and then neighbours of each step, shape ``(steps, 2B)``, int64, on the device.
        """
        device, generator, steps = self.device, self._generator, self._steps
        order = torch.randperm(len(self.features), generator=generator, device=device)[: steps * self._batch]
        draw = torch.randint(self.neighbors.shape[1], order.shape, generator=generator, device=device)
        partners = self.neighbors[order, draw].long()
        return torch.cat([order.view(steps, -1), partners.view(steps, -1)], dim=1)

    def train(self, rows: Tensor) -> float:
        """Train on batches at the rate of the present epoch; nothing waits for the device within.

        :meth:`epochs` is made of this; by itself it is for timing single steps.

        Args:
            rows: Steps of :meth:`draw_rows`.

        Returns:
            Learning rate of the last step.
        """
        self._loss_sums.zero_()
        freeze, lr = self._epoch < self.settings.freeze_last_layer_epochs, 0.0
        with fast_matmul(self.device, tf32=True), selected(self.device):
            for step, _ in enumerate(self.features.batches(rows, self._both)):
                lr = self._learning_rate(self._epoch * self._steps + step)
                self.learner.set_lr(lr)
                if freeze:
                    self._train_on_both(freeze_last_layer=True)
                else:
                    self._step()
        return lr

    def clustering(self) -> Clustering:
        """Assign every image with the teacher's weights of the head whose loss was lowest in the last epoch.

        Returns:
            The clustering.

        Raises:
            RuntimeError: If no epoch has been trained.
        """
        self._require_training()
        losses = self._head_losses()
        best_head = int(losses.argmin())
        teacher = self.learner.teacher.head(best_head)
        assignments, max_prob = assign(teacher, self.features, self.settings.teacher_temperature)
        return make_clustering(
            assignments.cpu().numpy(),
            self.num_clusters,
            max_prob=max_prob.cpu().numpy(),
            head_losses=losses.numpy(),
            best_head=best_head,
        )

    def head(self) -> TemiHead:
        """The teacher's weights of the head that :meth:`clustering` uses, with all that turns embeddings into clusters.

        Returns:
            A copy on the host, which further training does not change.

        Raises:
            RuntimeError: If no epoch has been trained.
        """
        self._require_training()
        scale = self.features.mean_std
        return TemiHead(
            self.learner.teacher.head(int(self._head_losses().argmin())).cpu(),
            self.settings.teacher_temperature,
            None if scale is None else scale[0].cpu(),
            None if scale is None else scale[1].cpu(),
        )

    def head_utilization(self) -> NDArray[np.float64]:
        """Share of the clusters that each head's teacher gives at least one image, in one pass over the images.

        Returns:
            r_C of each head, shape ``(H,)``, float64 in ``(0, 1]``.

        Raises:
            RuntimeError: If no epoch has been trained.
        """
        self._require_training()
        return head_utilization(self.learner.teacher, self.features)

    def _require_training(self) -> None:
        if self._epoch == 0:
            raise RuntimeError("no epoch has been trained; iterate over epochs() first")

    def _head_losses(self) -> Tensor:
        """Loss of each head, averaged over the steps of the last epoch, shape ``(H,)``, on the host."""
        return self._loss_sums.cpu() / self._steps

    @property
    def _steps(self) -> int:
        return len(self.features) // self._batch

    def _train_on_both(self, *, freeze_last_layer: bool = False) -> None:
        self._loss_sums += self.learner.train_on(self._both, freeze_last_layer=freeze_last_layer)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant."""
        warmup_steps = self.settings.warmup_epochs * self._steps
        return self.settings.lr * self._batch / 256 * min(1.0, (step + 1) / max(1, warmup_steps))


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
