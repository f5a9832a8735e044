"""One training step as a CUDA graph, so that launching its kernels costs the host nothing."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from cedm_ray.errors import first_line

_EAGER_STEPS = 3  # before the capture: optimizer states, gradients and the libraries' workspaces come to be in them


class Repeated:
    """A step that is always the same: eager at first, then captured once in a CUDA graph and replayed.

    All that the step reads and writes must stay at one place in memory, and the host must decide nothing within it.
    Where capturing fails there is one warning, and the steps go on eagerly.

    Args:
        step: The step; it is run exactly once for each call.
        device: Where it computes; on a CPU it is never captured.

    Source: PyTorch documentation, CUDA semantics, "Whole-network capture".
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._capturable = device.type == "cuda"
        self._eager_steps = _EAGER_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the step."""
        if self._graph is None and self._capturable:
            if self._eager_steps > 0:
                self._eager_steps -= 1
                _on_side_stream(self._step)
                return
            self._try_to_capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def _try_to_capture(self) -> None:
        try:
            self._graph = _captured(self._step)
        except RuntimeError as error:
            self._capturable = False
            said = f"no CUDA graph of the TEMI step ({first_line(error)}); training goes on without"
            warnings.warn(said, stacklevel=3)


def selected(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one, whose streams and graphs are meant where none is named."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _on_side_stream(step: Callable[[], None]) -> None:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


def _captured(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The graph of the step, which is recorded and not run."""
    graph = torch.cuda.CUDAGraph()
    # The calls of other threads do not concern this graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph
