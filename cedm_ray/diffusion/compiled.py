"""A denoiser that is compiled where that works."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from cedm_ray.diffusion.precond import EDMPrecond

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""D(x, sigma, class_index); an `EDMPrecond`, bare or compiled."""


class Compiled:
    """The network, compiled for inputs of one shape; without compilation from the first call on if that fails.

    The network itself stays as it is: whoever calls it, and not this object, gets it without compilation.

    Args:
        net: The network, on its device.
    """

    def __init__(self, net: EDMPrecond) -> None:
        self._net = net
        # Not dynamic: networks with another batch size have been compiled before in the same process, and torch would
        # take the size for a variable then.
        self._call: Denoiser = torch.compile(net, dynamic=False)
        self._tried = False

    def __call__(self, x: Tensor, sigma: Tensor, class_index: Tensor | None) -> Tensor:
        """D(x; sigma); arguments as those of the network."""
        if self._tried:
            return self._call(x, sigma, class_index)
        self._tried = True
        try:
            return self._call(x, sigma, class_index)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The first line of torch's own text names the compiler only, not what was wrong.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            warnings.warn(
                f"torch.compile failed, and sampling goes on without it, slower: {reason}", RuntimeWarning, stacklevel=2
            )
            without: Denoiser = self._net
            self._call = without
            return without(x, sigma, class_index)
