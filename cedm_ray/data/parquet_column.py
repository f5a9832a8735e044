"""How images, and the names of their classes, stand in a Parquet file."""

import json

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cedm_ray.errors import UserError

LABEL_COLUMN = "label"

PixelsOrBytes = bytes | NDArray[np.uint8] | None


def check_column(schema: pa.Schema, column: str, where: str) -> None:
    """Refuse a file that has no such column, or other things than images in it.

    Raises:
        UserError: With the columns that there are, or the kinds that there may be.
    """
    if column not in schema.names:
        raise UserError(
            f"{where} has no column {column!r}; name the one of the images with --image-column, "
            f"of {', '.join(map(repr, schema.names))}"
        )
    kind = schema.field(column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if _is_binary(inner) or (isinstance(kind, pa.FixedShapeTensorType) and _is_image_tensor(kind)):
        return
    raise UserError(
        f"column {column!r} of {where} holds {kind!s:.80}; it must hold encoded images (binary, or a struct with "
        "binary bytes) or uint8 tensors of a fixed shape: name another with --image-column, or convert it"
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image_tensor(kind: pa.FixedShapeTensorType) -> bool:
    shape = tuple(kind.shape)
    return kind.value_type == pa.uint8() and (
        len(shape) == 2 or (len(shape) == 3 and (shape[-1] in (1, 3) or shape[0] in (1, 3)))
    )


def _height_width_channels(tensor: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if tensor.ndim == 3 and tensor.shape[-1] not in (1, 3):
        tensor = tensor.transpose(1, 2, 0)
    return np.ascontiguousarray(tensor[..., 0] if tensor.ndim == 3 and tensor.shape[-1] == 1 else tensor)


def image_values(column: pa.Array) -> list[PixelsOrBytes]:
    """The image of each row: encoded bytes, or pixels of shape (H, W) or (H, W, 3), or None where there is null."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return [_height_width_channels(value.to_numpy()) if value.is_valid else None for value in column]
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    values: list[PixelsOrBytes] = column.to_pylist()
    return values


def class_names_in(schema: pa.Schema) -> tuple[str, ...] | None:
    """Names of the classes, from the metadata that Hugging Face's datasets write; None where there are none."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    sound = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if sound else None
