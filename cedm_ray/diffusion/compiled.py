"""A denoiser that is compiled where that works."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cedm_ray.devices import net_device
from cedm_ray.errors import one_line


class Compiled:
    """The network, compiled for inputs of one shape; without compilation from the first call on if that fails.

    The network itself stays as it is: whoever calls it, and not this object, gets it without compilation.

    Args:
        net: The network, on its device, bare or wrapped for several processes.
        doing: What a warning says goes on without, such as "training".
    """

    def __init__(self, net: nn.Module, doing: str) -> None:
        self._net, self._doing = net, doing
        # Not dynamic: networks with another batch size have been compiled before in the same process, and torch would
        # take the size for a variable then.
        self._call: Any = torch.compile(net, dynamic=False)
        self._tried = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """As the network; a first call that fails leaves torch's generators as they were."""
        if self._tried:
            found: Tensor = self._call(*inputs)
            return found
        self._tried = True
        device = net_device(self._net)
        on_gpu = device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        try:
            found = self._call(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # The first line of torch's own text names the compiler only, not what was wrong.
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            warnings.warn(
                f"torch.compile failed, and {self._doing} goes on without it, slower: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1], device)
            self._call = self._net
            found = self._call(*inputs)
        return found
