from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.diffusion.state_io import load_state, read_ema, read_nimg, save_ema, save_state
from cedm_ray.diffusion.train import TrainState, new_state


def start() -> TrainState:
    torch.manual_seed(0)
    state = new_state(build_net(NetSettings(8, (1, 2), 1, (4,), 0.2), 8, 1, 3, augment=True))
    state.nimg = 12_345
    with torch.no_grad():
        for parameter in state.ema.parameters():
            parameter.mul_(0.5)
    return state


def test_the_averaged_weights_come_back_alone_from_a_run_and_from_a_file_of_them(tmp_path: Path) -> None:
    state = start()
    save_state(state, tmp_path / "run.safetensors")
    tensors, nimg = read_ema(tmp_path / "run.safetensors")
    save_ema(tensors, nimg, tmp_path / "averaged.safetensors")
    again, nimg_again = read_ema(tmp_path / "averaged.safetensors")
    assert nimg == nimg_again == 12_345
    for found in (tensors, again):
        assert list(sorted(found)) == sorted(state.ema.state_dict())
        assert all(torch.equal(found[name], value) for name, value in state.ema.state_dict().items())
    assert not torch.equal(again["model.first_conv.weight"], state.net.state_dict()["model.first_conv.weight"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["averaged.safetensors", "run.safetensors"]
    assert (tmp_path / "averaged.safetensors").stat().st_size < 0.6 * (tmp_path / "run.safetensors").stat().st_size


def test_the_images_seen_are_told_of_a_run_and_of_nothing_else(tmp_path: Path) -> None:
    run, averaged, other = (tmp_path / f"{name}.safetensors" for name in ("run", "averaged", "other"))
    save_state(start(), run)
    assert read_nimg(run) == 12_345
    save_ema(*read_ema(run), averaged)
    save_file({"a": torch.zeros(1)}, other)
    for file, kind in ((averaged, "'cedm_ray.diffusion.averaged/1'"), (other, "None")):
        with pytest.raises(ValueError, match=f"it has format {kind}; a training state has"):
            read_nimg(file)
        with pytest.raises(ValueError, match=f"{file.name} has format {kind}; a training state has"):
            load_state(start(), file)
    run.write_bytes(run.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        read_nimg(run)


def test_a_disk_that_fills_leaves_the_older_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    save_state(start(), path)

    def full(tensors: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cedm_ray.diffusion.state_io.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(start(), path)
    assert read_nimg(path) == 12_345 and list(tmp_path.iterdir()) == [path]
