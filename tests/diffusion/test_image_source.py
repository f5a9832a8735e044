from itertools import islice

import pytest
import torch
from torch import Tensor

from cedm_ray.diffusion.image_source import ResidentImages
from cedm_ray.diffusion.order import EpochOrder

N = 10


def images() -> Tensor:
    """Image i has the pixels 12 i to 12 i + 11."""
    return torch.arange(N * 12, dtype=torch.uint8).view(N, 3, 2, 2)


@pytest.mark.parametrize("start", [0, 7, 2 * N, 123_457])
@pytest.mark.parametrize(("count", "stride"), [(4, 4), (3, 6), (1, 1), (N, N), (25, 50), (2, 37)])
def test_batches_are_those_of_the_order_over_the_borders_of_epochs_and_beyond_the_set(
    start: int, count: int, stride: int
) -> None:
    classes = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    source = ResidentImages(images(), classes)
    for k, (batch, found) in enumerate(islice(source.batches(3, start, count, stride), 12)):
        chosen = EpochOrder(N, 3).take(start + k * stride, count)
        assert torch.equal(batch, images()[chosen]) and batch.dtype == torch.uint8
        assert found is not None and torch.equal(found, classes[chosen])


def test_every_image_is_seen_once_in_an_epoch_and_the_seed_decides_when() -> None:
    source = ResidentImages(images(), None)
    first = [batch[:, 0, 0, 0] // 12 for batch, _ in islice(source.batches(0, 0, 2, 2), 5)]
    other = [batch[:, 0, 0, 0] // 12 for batch, _ in islice(source.batches(1, 0, 2, 2), 5)]
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(other).tolist()) == list(range(N))
    assert torch.cat(first).tolist() != torch.cat(other).tolist()


def test_an_epoch_is_sent_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = []
    take = EpochOrder.take
    monkeypatch.setattr(EpochOrder, "take", lambda self, *args: takes.append(args) or take(self, *args))
    list(islice(ResidentImages(images(), None).batches(0, 0, 3, 3), 12))  # 36 images: epochs 0 to 3
    assert takes == [(0, N), (N, N), (2 * N, N), (3 * N, N)]


def test_a_source_tells_its_size_shape_and_clusters() -> None:
    classes = torch.zeros(N, dtype=torch.int64)
    source = ResidentImages(images(), classes)
    assert (len(source), source.image_shape, source.class_index is classes) == (N, (3, 2, 2), True)
    _, found = next(ResidentImages(images(), None).batches(0, 0, 2, 2))
    assert found is None


@pytest.mark.parametrize(
    ("pixels", "classes", "said"),
    [
        (torch.zeros(N, 3, 2, 2), None, r"images have shape \(10, 3, 2, 2\), torch.float32; needed: .* uint8"),
        (torch.zeros(N, 12, dtype=torch.uint8), None, r"images have shape \(10, 12\)"),
        (images()[:0], None, r"images have shape \(0, 3, 2, 2\)"),
        (images(), torch.zeros(N), r"class_index has shape \(10,\), torch.float32; needed: \(10,\), int64"),
        (images(), torch.zeros(N - 1, dtype=torch.int64), r"class_index has shape \(9,\)"),
        (images(), torch.zeros(N, dtype=torch.int64, device="meta"), "class_index lies on meta, the images on cpu"),
    ],
)
def test_what_is_no_set_of_images_is_refused(pixels: Tensor, classes: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResidentImages(pixels, classes)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_batches_and_nothing_waits_for_it() -> None:
    source = ResidentImages(images().cuda(), torch.arange(N).cuda())
    batches = source.batches(3, 5, 4, 8)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(islice(batches, 6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for k, (batch, classes) in enumerate(found, start=1):
        chosen = EpochOrder(N, 3).take(5 + 8 * k, 4)
        assert torch.equal(batch.cpu(), images()[chosen])
        assert classes is not None and torch.equal(classes.cpu(), chosen)
