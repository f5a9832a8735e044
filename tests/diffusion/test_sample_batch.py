import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cedm_ray.diffusion.sample_batch import batch_for, even_batch, fitting_batch, image_bytes
from cedm_ray.diffusion.settings import NetSettings, build_net

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, which: int, size: int) -> None:
        self.seen.discard(which)
        self.now -= size


@pytest.mark.parametrize(
    "settings",
    [
        NetSettings(32, (1, 2, 2), 2, (8,)),
        NetSettings(32, (2, 2, 2), 4, (16,)),
        NetSettings(32, (1, 1), 8, (16,)),
        NetSettings(32, (1, 2, 4), 1, ()),
    ],
)
def test_an_image_takes_no_more_memory_than_is_reckoned_with_and_not_far_less(settings: NetSettings) -> None:
    net = build_net(settings, 32, 3, 5, augment=False).eval()
    peaks = []
    for count in (1, 3):
        inputs = torch.randn(count, 3, 32, 32), torch.ones(count), torch.zeros(count, dtype=torch.int64)
        with torch.no_grad(), LiveBytes() as live:
            net(*inputs)
        peaks.append(live.peak)
    per_image = (peaks[1] - peaks[0]) / 2
    assert 0.4 * image_bytes(net) < per_image <= image_bytes(net)


def test_the_bytes_of_an_image_are_those_of_the_layers() -> None:
    # Kept: 8 channels of 8x8, a block of 8 of 8x8, one of 8 of 4x4 that halves, one of 16 of 4x4; the widest: 512.
    net = build_net(NetSettings(8, (1, 2), 1, (), 0.0), 8, 1, 0, augment=False)
    assert image_bytes(net) == 4 * ((512 + 512 + 128 + 256) + 8 * 512)


def test_a_batch_takes_half_of_what_is_free_and_no_more_than_a_million_pixels() -> None:
    assert batch_for(140 * GIB, 14_000_000, 32) == 1024
    assert batch_for(140 * GIB, 40_000_000, 64) == 256
    assert batch_for(8 * GIB, 14_000_000, 32) == 256  # 306 would fit
    assert batch_for(10 * 2**20, 14_000_000, 32) == 1
    assert batch_for(140 * GIB, 1, 2048) == 1


def test_a_processor_computes_64_images_together() -> None:
    assert fitting_batch(build_net(NetSettings(8, (1, 2), 1, ()), 8, 1, 0, augment=False), "cpu") == 64


@pytest.mark.parametrize("total, most, size", [(10, 4, 4), (9, 4, 3), (2500, 1024, 834), (3, 64, 3), (64, 64, 64)])
def test_batches_of_a_set_are_as_few_as_they_can_be_and_alike(total: int, most: int, size: int) -> None:
    assert even_batch(total, most) == size
    assert -(-total // size) == -(-total // most)


def test_no_images_make_no_batch_of_none() -> None:
    assert even_batch(0, 64) == 1


def test_on_a_gpu_half_of_what_is_free_or_held_by_torch_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_net(NetSettings(8, (1, 2), 1, ()), 8, 1, 0, augment=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600 * image_bytes(net), 10**12))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100 * image_bytes(net))
    for reserved, size in ((100, 256), (1600, 1024)):  # 300 and 1,050 images fit into half
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, held=reserved: held * image_bytes(net))
        assert fitting_batch(net, "cuda") == size
