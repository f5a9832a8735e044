"""Class labels of files and tables that strangers made: from sub-folders, or from numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cedm_ray.data.sources import check_labels
from cedm_ray.errors import UserError

MAX_CLASSES = 100_000  # a label beyond it is a mistake or an attack: every class costs memory


@dataclass(frozen=True, eq=False)
class ClassLabels:
    """The classes of some images.

    Raises:
        ValueError: If a label lies outside ``[0, num_classes)`` or there is not one name for each class.
    """

    labels: NDArray[np.int64]
    """Class of each image, shape ``(N,)``, int64 in ``[0, num_classes)``."""
    num_classes: int
    names: tuple[str, ...] | None = None
    """Name of each class, where they are known."""

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.labels), self.num_classes)
        if self.names is not None and len(self.names) != self.num_classes:
            raise ValueError(f"there are {len(self.names)} class names; {self.num_classes} are due")


def classes_of_folders(paths: Sequence[str], root: str) -> ClassLabels:
    """The first-level sub-folders as classes, numbered in sorted order.

    Args:
        paths: Path of each image below the root, ``/`` between its parts.
        root: The folder, for messages.

    Raises:
        UserError: If an image lies directly in the root.
    """
    folders = [path.partition("/")[0] if "/" in path else None for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folder is None:
            raise UserError(
                f"{path} lies in {root} itself, in none of its sub-folders, so it has no label; move it into one, "
                "or leave --folder-labels out"
            )
    names = sorted({folder for folder in folders if folder is not None})
    number = {name: i for i, name in enumerate(names)}
    labels = np.asarray([number[folder] for folder in folders if folder is not None], dtype=np.int64)
    return ClassLabels(labels, len(names), tuple(names))


def numbered_classes(labels: NDArray[np.int64], where: str, names: tuple[str, ...] | None = None) -> ClassLabels:
    """Labels that are numbers already; there are as many classes as names, or one more than the largest label.

    Args:
        labels: Class of each image, shape ``(N,)``, int64.
        where: The file, for messages.
        names: Name of each class, where the file says it.

    Raises:
        UserError: If a label lies outside ``[0, 100000)`` or has no name.
    """
    bound = MAX_CLASSES if names is None else len(names)
    wrong = labels[(labels < 0) | (labels >= bound)]
    if len(wrong):
        raise UserError(f"{where} holds label {wrong[0]}; it must lie in [0, {bound}): correct the labels")
    return ClassLabels(labels, bound if names is not None else int(labels.max(initial=0)) + 1, names)
