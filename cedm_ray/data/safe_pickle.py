"""Reads the pickles of the official CIFAR archives without running anything that they ask for."""

import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cedm_ray.errors import UserError


@dataclass
class _Dtype:
    """Stands in for numpy.dtype: remembers the name, ignores the rest."""

    name: str

    def __setstate__(self, state: object) -> None:
        pass


@dataclass
class _Array:
    """Stands in for numpy.ndarray: remembers shape, dtype and bytes."""

    state: tuple[Any, ...] = field(default=())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


def _stand_ins() -> dict[tuple[str, str], Any]:
    # Made afresh for every file: a pickle can set attributes on whatever it is handed.
    def reconstruct(*_: object) -> _Array:
        return _Array()

    def dtype(name: object, *_: object) -> _Dtype:
        return _Dtype(name.decode("ascii") if isinstance(name, bytes) else str(name))

    def encode(text: str, encoding: str | bytes = "latin1") -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"text encoding {encoding!r}")
        return text.encode("latin1")

    return {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
    }


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._where = where
        self._known = _stand_ins()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in self._known:
            raise UserError(
                f"{self._where} asks for {module_name}.{global_name}, which no CIFAR file needs; it was not run: "
                "replace the file by the official one"
            )
        return self._known[module_name, global_name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a persistent id")


def read_pickled_dict(data: bytes, where: str) -> dict[bytes, Any]:
    """Dictionary of plain values and uint8 matrices from a pickle, of which no code is ever looked up or called.

    A pickle can name any function and have it called. Here only the five names that a pickled numpy array needs
    (``numpy.ndarray``, ``numpy.dtype``, numpy's ``_reconstruct`` in its old and its new place, ``_codecs.encode``)
    are known, and even those lead to inert stand-ins of this file; any other name is refused before anything runs.

    Args:
        data: The pickle.
        where: Name of the file, for messages.

    Returns:
        The dictionary, its text keys as bytes and its matrices as they were pickled (see ``uint8_matrix``).

    Raises:
        UserError: If the pickle names anything else, is cut off, or does not hold a dictionary.
    """
    try:
        content = _Reader(data, where).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{where} is cut off or damaged ({type(error).__name__}: {error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, not the dictionary of a CIFAR file; fetch it again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def uint8_matrix(value: object, where: str) -> NDArray[np.uint8]:
    """The uint8 matrix behind a value of ``read_pickled_dict``.

    Raises:
        UserError: If the value is no uint8 matrix, in C or in Fortran order, whose bytes match its shape.
    """
    problem = UserError(f"{where} does not hold its images as a uint8 matrix; fetch it again")
    if not isinstance(value, _Array) or not isinstance(value.state, tuple) or len(value.state) != 5:
        raise problem
    _, shape, dtype, fortran_order, raw = value.state
    if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "uint8") or not isinstance(raw, bytes):
        raise problem
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
        raise problem
    if shape[0] * shape[1] != len(raw):
        raise problem
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran_order else "C")
