"""The clustering heads, all of them in stacked parameters so that no loop runs over heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(nn.Module):
    """H clustering heads side by side: in -> hidden, GELU, hidden -> bottleneck, unit length, weight-normalised -> C.

    Linear weights start from a normal with standard deviation 0.02, truncated at 2, biases at 0. The rows of the last
    layer start uniform in +-1/sqrt(bottleneck) as directions with gain 1, so every logit starts as a cosine; the gains
    are learned.

    Args:
        in_dim: Features of an image, D.
        num_clusters: Clusters of each head, C.
        num_heads: Heads, H.
        hidden_dim: Width of the hidden layer.
        bottleneck_dim: Width of the unit-length layer.
        generator: CPU generator of the starting weights, so that they are the same on every device.

    Source: arXiv 2303.17896, Sec. 3.
    """

    def __init__(
        self,
        in_dim: int,
        num_clusters: int,
        *,
        num_heads: int,
        hidden_dim: int,
        bottleneck_dim: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(_truncated_normal(generator, num_heads, hidden_dim, in_dim))
        self.hidden_bias = nn.Parameter(torch.zeros(num_heads, hidden_dim))
        self.bottleneck_weight = nn.Parameter(_truncated_normal(generator, num_heads, bottleneck_dim, hidden_dim))
        self.bottleneck_bias = nn.Parameter(torch.zeros(num_heads, bottleneck_dim))
        self.last_gain = nn.Parameter(torch.ones(num_heads, num_clusters, 1))
        bound = 1.0 / math.sqrt(bottleneck_dim)
        direction = torch.empty(num_heads, num_clusters, bottleneck_dim).uniform_(-bound, bound, generator=generator)
        self.last_direction = nn.Parameter(direction)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every head, before any temperature.

        Args:
            x: Features, shape ``(B, D)``, float32.

        Returns:
            Logits, shape ``(H, B, C)``, float32.
        """
        num_heads, hidden_dim, _ = self.hidden_weight.shape
        # The heads share their input, so the first layer of all of them is a single matrix product.
        hidden = F.linear(x, self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten())
        hidden = F.gelu(hidden).view(-1, num_heads, hidden_dim).transpose(0, 1)
        code = torch.baddbmm(self.bottleneck_bias.unsqueeze(1), hidden, self.bottleneck_weight.transpose(1, 2))
        weight = self.last_gain * _unit(self.last_direction)
        return torch.bmm(_unit(code), weight.transpose(1, 2))

    def head(self, index: int) -> "Heads":
        """A copy of one head, as :class:`Heads` with H = 1.

        Args:
            index: Which head, in ``[0, H)``.

        Returns:
            The head alone, on the same device.
        """
        num_heads, hidden_dim, in_dim = self.hidden_weight.shape
        if not 0 <= index < num_heads:
            raise ValueError(f"index is {index}; it must lie in [0, {num_heads})")
        _, num_clusters, bottleneck_dim = self.last_direction.shape
        single = Heads(
            in_dim,
            num_clusters,
            num_heads=1,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            generator=torch.Generator(),
        )
        single.load_state_dict({name: value[index : index + 1] for name, value in self.state_dict().items()})
        return single.to(self.hidden_weight.device)


def _truncated_normal(generator: torch.Generator, *shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02, generator=generator)


def _unit(x: Tensor) -> Tensor:
    """Rows of ``x`` at length 1; a zero row stays zero and passes no gradient.

    Dividing by a floored norm alone would multiply the gradient of a zero row (a black image at the start of training)
    by the inverse of the floor, and the optimiser's second moment would stay spoiled for thousands of steps.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse: Tensor = norm.clamp_min(1e-12).reciprocal() * (norm > 1e-12)
    return x * inverse
