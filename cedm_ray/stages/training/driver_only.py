"""A Tune callback that lives in the driver alone."""

from __future__ import annotations

from typing import Any

import ray.tune


class DriverCallback(ray.tune.Callback):
    """A callback with a terminal and a tracking client in it, of which Tune's own snapshot keeps nothing.

    Tune pickles its callbacks so that it could restore them. Searches here go on from their own records instead, and
    what stands in this callback cannot travel anyway.
    """

    def __reduce__(self) -> Any:
        return ray.tune.Callback, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> DriverCallback:
        return self
