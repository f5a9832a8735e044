import pytest
import torch

from cedm_ray.devices import default_device, net_device


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_where_nobody_names_a_device_it_is_a_gpu_if_there_is_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    assert default_device() == torch.device(kind)


def test_a_network_lies_where_its_weights_do() -> None:
    assert net_device(torch.nn.Linear(1, 1, device="meta")) == torch.device("meta")
