"""Batches of images that do not fit onto the device: Ray Data reads them, in the order of the training, ahead of it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from cedm_ray.diffusion.image_source import Batch, check_class_index
from cedm_ray.diffusion.order import EpochOrder
from cedm_ray.errors import UserError
from cedm_ray.stages.inputs.read_images import read_images

CHUNK_BYTES, CHUNK_IMAGES = 256 * 2**20, 2**16
"""Most that one dataset holds; two of them lie in the object store at most, for each process of a training."""
TASK_BYTES = 8 * 2**20
"""Images that a task reads."""
READERS = 2
"""Tasks that read at once."""
AHEAD = 4
"""Batches that wait on the device."""
TIMEOUT_S = 300.0
"""Longest wait for a batch, the start of the processes that read included."""
_TICK_S = 0.1
_CLOSE_S = 10.0


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images in a file, streamed through Ray Data: the same batches, bit for bit, as from resident images.

    Each process of a training makes its own. The order is cut into chunks, each a Ray Dataset of its own, so that a
    plan is never longer than a chunk; a quarter into one the next is started. The tasks that read take no CPU of
    the cluster's, for a training may hold all of them, and run on the node of the process that they read for. What
    grows with the set is its permutation and its clusters, 16 bytes an image.

    Args:
        file: Images ``(N, C, R, R)``, uint8, in NumPy's format, as ``pack`` writes them.
        class_index: Cluster of each image, shape ``(N,)``, int64, on the CPU; None without a condition.
        device: Where the batches shall lie.
        chunk_bytes: Images of one dataset.
        timeout_s: Longest wait for a batch.

    Raises:
        ValueError: If ``class_index`` does not go with the images.
    """

    file: Path
    class_index: Tensor | None
    device: torch.device
    chunk_bytes: int = CHUNK_BYTES
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        check_class_index(self.class_index, len(self))

    def __len__(self) -> int:
        return len(_mapped(self.file))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = _mapped(self.file).shape[1:]
        return channels, height, width

    def batches(self, seed: int, start: int, count: int, stride: int) -> Generator[Batch, None, None]:
        """Endless batches, as :class:`cedm_ray.diffusion.image_source.ImageSource` says.

        Raises:
            UserError: If a batch is not there in time.
            RuntimeError: If the stream does not keep to the order.
        """
        order = EpochOrder(len(self), seed)
        images = min(CHUNK_IMAGES, self.chunk_bytes // int(np.prod(self.image_shape)))
        length = max(1, images // count)
        chunk = self._chunk(order, start, count, stride, length)
        following: _Chunk | None = None
        try:
            while True:
                for number in range(length):
                    if number == length // 4:
                        start += length * stride
                        following = self._chunk(order, start, count, stride, length)
                    yield chunk.take()
                assert following is not None
                chunk, following = following, None
        finally:
            for opened in (chunk, following):
                if opened is not None:
                    opened.close()

    def _chunk(self, order: EpochOrder, start: int, count: int, stride: int, length: int) -> _Chunk:
        index = torch.stack([order.take(start + number * stride, count) for number in range(length)])
        return _Chunk(self, index)


class _Chunk:
    """So many batches: a dataset, and a thread that brings what comes out of it to the device.

    Args:
        source: Whose images they are.
        index: Image at each place of each batch, shape ``(length, count)``, int64.
    """

    def __init__(self, source: StreamedImages, index: Tensor) -> None:
        self._source, self._index = source, index
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamed-images", daemon=True)
        self._thread.start()

    def take(self) -> Batch:
        """The next batch."""
        try:
            found = self._ready.get(timeout=self._source.timeout_s)
        except queue.Empty:
            raise UserError(
                f"no images have come from {self._source.file} for {self._source.timeout_s:g} s; see that "
                "the folder can be read on every node, and that Ray can start processes there"
            ) from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Stop reading; nothing is left in the object store, and no task of this chunk runs on."""
        self._stopped.set()
        self._thread.join(_CLOSE_S)  # a stream that hangs holds its thread, not the training

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:
            self._put(error)

    def _read(self) -> None:
        if self._source.device.type == "cuda":
            torch.cuda.set_device(self._source.device)
        stream = iter(
            _dataset(self._source.file, self._index.flatten().numpy()).iter_torch_batches(
                batch_size=self._index.shape[1], prefetch_batches=AHEAD, device="cpu"
            )
        )
        try:
            for expected in self._index:
                found = next(stream, None)
                if found is None or not torch.equal(found["index"], expected):
                    raise RuntimeError(f"images of {self._source.file} have come in another order than was asked for")
                if not self._put(self._on_device(found["image"], expected)):
                    return
        finally:
            stream.close()

    def _on_device(self, images: Tensor, index: Tensor) -> Batch:
        classes = self._source.class_index
        return self._sent(images), None if classes is None else self._sent(classes[index])

    def _sent(self, values: Tensor) -> Tensor:
        if self._source.device.type == "cuda":
            values = values.pin_memory()  # so that the training does not wait for the copy
        return values.to(self._source.device, non_blocking=True)

    def _put(self, item: Batch | Exception) -> bool:
        """Whether it could be handed over before the chunk was closed."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=_TICK_S)
            except queue.Full:
                continue
            return True
        return False


def _dataset(file: Path, index: NDArray[np.int64]) -> ray.data.Dataset:
    """The images at these places, in this order, read when they are asked for."""
    rows = max(1, TASK_BYTES // int(np.prod(_mapped(file).shape[1:])))
    dataset = ray.data.from_blocks([pa.table({"index": index[at : at + rows]}) for at in range(0, len(index), rows)])
    context = dataset.context
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a training may pause for as long as it likes
    return dataset.map_batches(
        read_images,
        batch_size=None,
        fn_kwargs={"file": file, "column": "index"},
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(READERS),
    )


def _mapped(file: Path) -> np.ndarray:
    found: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return found
