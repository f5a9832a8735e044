"""What Ray Data's tasks run to read packed images; without torch, so that the processes that read start fast."""

from pathlib import Path

import numpy as np

from cedm_ray.stages.storage.bucket_entries import here


def read_images(batch: dict[str, np.ndarray], file: Path, column: str) -> dict[str, np.ndarray]:
    """The images at the indices of a batch, from a file that is mapped and not read whole.

    Args:
        batch: Has the indices, int64, in a column.
        file: Images ``(N, C, R, R)``, uint8, in NumPy's format.
        column: Name of that column.

    Returns:
        The columns ``index`` and ``image``.
    """
    index = batch[column]
    return {"index": index, "image": np.load(here(file), mmap_mode="r", allow_pickle=False)[index]}
