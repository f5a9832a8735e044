"""Where the random numbers come from: every stream is a function of a seed, a purpose and a counter.

No generator's state is ever stored. A number is found again from ``(seed, purpose, counters)`` alone, so
results do not depend on the batch size, on the number of processes, or on where a run was cut off.

- `numpy_stream` is a Philox generator, a block cipher over a 256-bit counter: key = (seed, purpose), and the
  index (image, epoch) is a high word of the counter, so that each index owns 2^128 numbers of its own.
- `torch_seed` hashes ``(seed, purpose, counters)`` with numpy's SeedSequence into the seed of a torch generator,
  for the draws that are made in bulk on the training device.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes share no numbers."""

    NOISE = 1
    """The Gaussian noise that sampling starts from; counter: index of the image."""
    CONDITION = 2
    """The cluster of a sampled image; counter: index of the image."""
    ORDER = 3
    """The order of the training images; counter: epoch."""
    STEP = 4
    """Augmentation, noise level and noise of a training step; counters: nimg, rank."""
    DROPOUT = 5
    """Dropout of a training step; counters: nimg, rank."""
    LABEL_DROPOUT = 6
    """Which images of a training step lose their condition; counters: nimg, rank."""


def numpy_stream(seed: int, purpose: Purpose, index: int) -> np.random.Generator:
    """Generator of one index of a stream.

    Args:
        seed: Seed of the run, in ``[0, 2^64)``.
        purpose: What the numbers are for.
        index: Image or epoch, in ``[0, 2^64)``.

    Raises:
        ValueError: If seed or index is out of range.
    """
    _check(seed=seed, index=index)
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def torch_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Seed of a torch generator for one use, in ``[0, 2^63)``."""
    _check(seed=seed)
    state = np.random.SeedSequence((seed, int(purpose), *counters)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def _check(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2^64)")
