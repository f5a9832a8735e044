"""The clustering heads, all of them in stacked parameters, with a gradient in few passes over memory."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activations:
    """What some heads computed for a batch: K heads, B images."""

    hidden_input: Tensor
    """Before the GELU, shape ``(K, B, hidden)``."""
    hidden: Tensor
    """After the GELU, shape ``(K, B, hidden)``."""
    code: Tensor
    """The bottleneck before it is brought to length 1, shape ``(K, B, bottleneck)``."""
    code_scale: Tensor
    """One over the length of each code, 0 for a zero code, shape ``(K, B, 1)``."""
    weight: Tensor
    """The last layer, gain times unit direction over the temperature, shape ``(K, C, bottleneck)``."""
    logits: Tensor
    """Over the temperature, shape ``(K, B, C)``."""


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
        return self.activations(x).logits

    def activations(self, x: Tensor, block: slice = slice(None), *, temperature: float = 1.0) -> Activations:
        """Everything that some of the heads compute.

        Args:
            x: Features, shape ``(B, D)``, float32.
            block: Which heads, K of them.
            temperature: Divides the logits.

        Returns:
            The activations of these heads.
        """
        hidden_input = _shared_input_linear(x, self.hidden_weight[block], self.hidden_bias[block])
        hidden = F.gelu(hidden_input)
        code = _linear(hidden, self.bottleneck_weight[block], self.bottleneck_bias[block])
        code_scale = _inverse_length(code)
        direction = self.last_direction[block]
        weight = direction * (self.last_gain[block] * _inverse_length(direction) / temperature)
        # The length is divided out of the C logits: there are fewer of them than of the bottleneck's values.
        logits = torch.bmm(code, weight.transpose(1, 2))
        logits = torch.mul(logits, code_scale, out=None if torch.is_grad_enabled() else logits)
        return Activations(hidden_input, hidden, code, code_scale, weight, logits)

    def make_grads(self) -> None:
        """Give every parameter that has none memory for its gradient; a captured CUDA graph goes on writing to it."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)

    @torch.no_grad()
    def backward(
        self, x: Tensor, block: slice, found: Activations, logits_grad: Tensor, *, temperature: float = 1.0
    ) -> None:
        """Write the gradient of some of the heads into ``grad`` of every parameter, over what stood there.

        By hand, since autograd would keep the activations of all heads, which are larger than any cache, and return
        new gradients at each step. The features get no gradient.

        Args:
            x: Features, shape ``(B, D)``, float32.
            block: Which heads, K of them.
            found: What :meth:`activations` returned for them.
            logits_grad: Gradient of ``found.logits``, shape ``(K, B, C)``; is overwritten.
            temperature: The temperature of ``found``.
        """
        # With s = (u / |u|) v: ds/du = v / |u| - s u / |u|^2.
        radial = torch.linalg.vecdot(logits_grad, found.logits).unsqueeze(-1) * found.code_scale.square()
        logits_grad *= found.code_scale
        self._last_layer_backward(block, torch.bmm(logits_grad.transpose(1, 2), found.code), temperature)
        code_grad = torch.bmm(logits_grad, found.weight).addcmul_(found.code, radial, value=-1)
        _linear_backward(self.bottleneck_weight, self.bottleneck_bias, block, found.hidden, code_grad)
        hidden_grad = torch.bmm(code_grad, self.bottleneck_weight[block])
        torch.ops.aten.gelu_backward.grad_input(hidden_grad, found.hidden_input, grad_input=hidden_grad)
        _linear_backward(self.hidden_weight, self.hidden_bias, block, x.expand(len(hidden_grad), -1, -1), hidden_grad)

    def _last_layer_backward(self, block: slice, weight_grad: Tensor, temperature: float) -> None:
        direction, gain = self.last_direction[block], self.last_gain[block]
        scale = _inverse_length(direction)
        unit = direction * scale
        weight_grad /= temperature
        gain_grad = torch.linalg.vecdot(weight_grad, unit).unsqueeze(-1)
        _grad(self.last_gain, block).copy_(gain_grad)
        weight_grad.addcmul_(unit, gain_grad, value=-1)
        torch.mul(weight_grad, gain * scale, out=_grad(self.last_direction, block))

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


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # The bias on its own: baddbmm would write it to memory first, for the product to be added to.
    return torch.bmm(x, weight.transpose(1, 2)).add_(bias.unsqueeze(1))


def _shared_input_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first layer of K heads, which share their input: on CUDA as a single matrix product.

    That leaves the heads interleaved, shape ``(K, B, hidden)`` with the strides of ``(B, K, hidden)``; on CUDA the next
    product reads them in place, on a CPU it would be many times slower.
    """
    num_heads, hidden_dim, _ = weight.shape
    if not _one_product(x):
        return _linear(x.expand(num_heads, -1, -1), weight, bias)
    hidden = F.linear(x, weight.flatten(0, 1), bias.flatten())
    return hidden.view(-1, num_heads, hidden_dim).transpose(0, 1)


def _one_product(x: Tensor) -> bool:
    return x.is_cuda


def _linear_backward(weight: Tensor, bias: Tensor, block: slice, x: Tensor, out_grad: Tensor) -> None:
    torch.bmm(out_grad.transpose(1, 2), x, out=_grad(weight, block))
    torch.sum(out_grad, dim=1, out=_grad(bias, block))


def _grad(parameter: Tensor, block: slice) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient to write to; call make_grads() first")
    return parameter.grad[block]


def _inverse_length(x: Tensor) -> Tensor:
    """One over the length of each row of ``x``; 0 for a zero row, which therefore stays zero and passes no gradient.

    Dividing by a floored length alone would multiply the gradient of a zero row (a black image at the start of
    training) by the inverse of the floor, and the optimiser's second moment would stay spoiled for thousands of steps.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse: Tensor = length.clamp_min(1e-12).reciprocal().masked_fill(length <= 1e-12, 0.0)
    return inverse
