"""The settings of TEMI, with the published values as defaults."""

from dataclasses import dataclass

from cedm_ray.errors import require


@dataclass(frozen=True)
class TemiSettings:
    """How the clustering heads are built and trained.

    Raises:
        ValueError: If a value lies outside its bounds.

    Source: arXiv 2303.17896, Sec. 4; arXiv 2403.00570, appendix.
    """

    num_heads: int = 50
    """Clustering heads trained side by side; the one with the lowest loss is used."""
    hidden_dim: int = 512
    """Width of each head's hidden layer."""
    bottleneck_dim: int = 256
    """Width of each head's unit-length layer before the clusters."""
    gamma: float = 0.6
    """Exponent of the joint probability, in (0, 1]; lower values use more of the clusters."""
    student_temperature: float = 0.1
    """Divides the student's logits."""
    teacher_temperature: float = 0.1
    """Divides the teacher's logits."""
    probs_momentum: float = 0.9
    """Share of the teacher's running cluster distribution kept at each step, in [0, 1)."""
    teacher_momentum: float = 0.996
    """Share of the teacher's weights kept at each step, in [0, 1)."""
    lr: float = 1e-4
    """Learning rate per 256 images of the batch, after warm-up: the rate used is lr * batch / 256."""
    weight_decay: float = 1e-4
    """Decay of weight matrices and last-layer gains, as a multiple of the learning rate; biases have none."""
    batch_size: int = 512
    """Images per step; a smaller dataset is one batch."""
    epochs: int = 200
    """Passes over the images; the last incomplete batch of each is dropped."""
    warmup_epochs: int = 20
    """Epochs in which the learning rate rises linearly from 0."""
    freeze_last_layer_epochs: int = 1
    """Epochs at the start in which the last layer stays as it is."""
    standardize: bool = False
    """Whether each feature is brought to mean 0 and standard deviation 1 over the dataset first."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "hidden_dim", "bottleneck_dim", "batch_size", "epochs"):
            value = getattr(self, name)
            require(value >= 1, name, value, "be at least 1")
        for name in ("student_temperature", "teacher_temperature", "lr"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, value, "be above 0 and finite")
        for name in ("probs_momentum", "teacher_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "lie in [0, 1)")
        require(0 < self.gamma <= 1, "gamma", self.gamma, "lie in (0, 1]")
        require(0 <= self.weight_decay < float("inf"), "weight_decay", self.weight_decay, "be at least 0")
        for name in ("warmup_epochs", "freeze_last_layer_epochs"):
            value = getattr(self, name)
            require(0 <= value <= self.epochs, name, value, f"lie in [0, epochs] with epochs = {self.epochs}")
