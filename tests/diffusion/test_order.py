import pytest
import torch

from cedm_ray.diffusion.order import EpochOrder


@pytest.mark.parametrize("batch", [7, 20, 33])
def test_every_image_is_taken_once_per_epoch(batch: int) -> None:
    order = EpochOrder(20, seed=0)
    row = torch.cat([order.take(start, batch) for start in range(0, 20 * batch, batch)])
    epochs = row.reshape(-1, 20)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(20).expand(len(epochs), 20))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_the_order_is_the_same_however_it_is_sliced() -> None:
    whole = EpochOrder(20, seed=4).take(0, 96)
    slices = [EpochOrder(20, seed=4).take(start, 12) for start in range(0, 96, 12)]
    assert torch.equal(torch.cat(slices), whole)
    assert not torch.equal(EpochOrder(20, seed=5).take(0, 96), whole)
