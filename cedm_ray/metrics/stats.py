"""Feature statistics with the facts that make them comparable, and their file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cedm_ray.errors import UserError
from cedm_ray.metrics.frechet import FeatureSums, frechet_distance
from cedm_ray.weights.whole_file import whole_file


@dataclass(frozen=True)
class StatsFacts:
    """What a score depends on besides the images; two scores compare only where all but ``count`` agree."""

    detector: str
    weights_hash: str
    resize: str
    dtype: str
    dim: int
    count: int


@dataclass(frozen=True)
class FeatureStats:
    """Mean ``(D,)`` and covariance ``(D, D)`` of the features of some images, float64, and what they depend on."""

    mu: Tensor
    sigma: Tensor
    facts: StatsFacts

    def distance(self, other: "FeatureStats") -> float:
        """Fréchet distance to the statistics of other images.

        Raises:
            ValueError: If the two were not made by the same detector in the same way.
        """
        for name in ("detector", "weights_hash", "resize", "dtype", "dim"):
            mine, theirs = getattr(self.facts, name), getattr(other.facts, name)
            if mine != theirs:
                raise ValueError(
                    f"{name} is {mine!r} on one side and {theirs!r} on the other; such scores do not compare"
                )
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)


def save_stats(stats: FeatureStats, path: Path) -> None:
    """Write statistics as one safetensors file, whole or not at all."""
    tensors = {"mu": stats.mu.cpu().contiguous(), "sigma": stats.sigma.cpu().contiguous()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"facts": json.dumps(asdict(stats.facts))})


def load_stats(path: Path) -> FeatureStats:
    """Read what ``save_stats`` wrote.

    Raises:
        UserError: If the file is missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = StatsFacts(**json.loads(file.metadata()["facts"]))
            mu, sigma = file.get_tensor("mu"), file.get_tensor("sigma")
        if mu.shape != (facts.dim,) or sigma.shape != (facts.dim, facts.dim) or sigma.dtype != torch.float64:
            raise ValueError(f"shapes {tuple(mu.shape)} and {tuple(sigma.shape)} do not fit dim {facts.dim}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no feature statistics ({error}); delete it and compute them again") from error
    return FeatureStats(mu, sigma, facts)


def save_sums(sums: FeatureSums, path: Path) -> None:
    """Write the sums of some images' features as one safetensors file."""
    count, total, outer = (tensor.cpu().contiguous() for tensor in sums.tensors())
    save_file({"count": count.reshape(1), "sum": total, "outer": outer}, path)


def load_sums(path: Path) -> FeatureSums:
    """Read what ``save_sums`` wrote.

    Raises:
        UserError: If the file is missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return FeatureSums.from_tensors(*(file.get_tensor(name) for name in ("count", "sum", "outer")))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} holds no sums of features ({error}); delete it and compute them again") from error
