import json
import re
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cedm_ray.diffusion.model_file import FACTS_FILE, FORMAT, WEIGHTS_FILE, load_model, read_model_facts
from cedm_ray.diffusion.precond import EDMPrecond
from cedm_ray.diffusion.settings import NetSettings, TrainSettings, build_net
from cedm_ray.errors import UserError

NET = NetSettings(8, (1, 2), 1, (4,), 0.2)


def write(folder: Path, **changes: Any) -> EDMPrecond:
    torch.manual_seed(0)
    net = build_net(NET, 8, 1, 3, augment=True, sigma_data=0.4)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    save_file(net.state_dict(), folder / WEIGHTS_FILE)
    facts = {"format": FORMAT, "img_resolution": 8, "img_channels": 1, "label_dim": 3,
             "diffusion": {**asdict(NET), **asdict(TrainSettings(sigma_data=0.4))}}  # fmt: skip
    (folder / FACTS_FILE).write_text(json.dumps({**facts, **changes}))
    return net


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_a_model_answers_after_loading_as_it_did_before(tmp_path: Path) -> None:
    net = write(tmp_path).eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loaded = load_model(tmp_path)
    assert torch.equal(torch.rand(2), expected)  # no random number was drawn
    x, sigma, cluster = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, torch.tensor([0, 2, 1, -1])
    assert torch.equal(loaded(x, sigma, cluster), net(x, sigma, cluster))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_model_facts(tmp_path)["label_dim"] == 3


def test_no_model_json_or_another_kind_of_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FACTS_FILE
    assert f"{path} does not describe a model (" in refused(tmp_path)
    for content in ("[]", "{}", '{"format": "other/1"}', "[" * 5000, "\x00", '{"format": 3}'):
        path.write_text(content)
        assert f"{path} does not describe a model (" in refused(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "does not describe a model" in refused(tmp_path)


def test_a_model_json_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    whole = (tmp_path / FACTS_FILE).read_text()
    for length in range(0, len(whole) - 1, 9):
        (tmp_path / FACTS_FILE).write_text(whole[:length])
        assert "does not describe a model" in refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"label_dim": "many"}, {"label_dim": -2}, {"img_resolution": None}, {"img_resolution": 7}, {"diffusion": 5},
        {"diffusion": {}}, {"diffusion": {**asdict(NET), **asdict(TrainSettings()), "channel_mult": [1, "x"]}},
        {"diffusion": {**asdict(NET), **asdict(TrainSettings()), "model_channels": 1e300}},
    ],
)  # fmt: skip
def test_values_that_make_no_network_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, **changes)
    assert "does not describe a model" in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_blocks": 10**9}, "it has 1000000000 blocks at each of 2 resolutions"),
        ({"model_channels": 4096}, r"it has [\d,]{11,} numbers, and model.safetensors [\d,]{5,6}\)"),
    ],
)
def test_a_description_far_larger_than_the_weights_takes_no_memory(
    changes: dict[str, int], said: str, tmp_path: Path
) -> None:
    write(tmp_path, diffusion={**asdict(NET), **asdict(TrainSettings()), **changes})
    tracemalloc.start()
    try:
        assert re.search(said, refused(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write(tmp_path, label_dim=4)
    assert "have another shape for model.map_label.weight; pass the weights of the model that model.json" in refused(
        tmp_path
    )
    write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors.pop("model.out_conv.bias")
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert "lack model.out_conv.bias" in refused(tmp_path)


def test_weights_that_are_missing_cut_off_or_a_pickle_are_refused(tmp_path: Path) -> None:
    net = write(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        assert f"model weights {path} cannot be read" in refused(tmp_path)
    torch.save(net.state_dict(), path)
    assert f"model weights {path} cannot be read" in refused(tmp_path)
    path.unlink()
    assert f"model weights {path} cannot be read" in refused(tmp_path)
