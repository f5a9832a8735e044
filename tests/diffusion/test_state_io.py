from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cedm_ray.diffusion.settings import NetSettings, build_net
from cedm_ray.diffusion.state_io import load_state, read_ema, read_nimg, save_ema, save_state
from cedm_ray.diffusion.train_state import TrainState, new_state


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
        said = f"{file.name} has format {kind}; 'cedm_ray.diffusion.train_state/1' is due"
        for read in (read_nimg, partial(load_state, start())):
            with pytest.raises(ValueError, match=said):
                read(file)
    with pytest.raises(ValueError, match=r"other\.safetensors has format None; '.*train_state/1' or '.*averaged/1' is"):
        read_ema(other)
    run.write_bytes(run.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        read_nimg(run)


@pytest.mark.parametrize("nimg", [None, "", "-8", "8.5", "many"])
def test_a_header_without_the_images_seen_is_refused_and_changes_nothing(nimg: str | None, tmp_path: Path) -> None:
    saved, state = start(), start()
    with torch.no_grad():
        saved.net.model.out_conv.bias.fill_(7)
    path = tmp_path / "run.safetensors"
    save_state(saved, path)
    header = {"format": "cedm_ray.diffusion.train_state/1"} | ({} if nimg is None else {"nimg": nimg})
    save_file(load_file(path), path, metadata=header)
    for read in (read_nimg, read_ema, partial(load_state, state)):
        with pytest.raises(ValueError, match=f"run.safetensors has nimg '{nimg or ''}' in its header; a whole number"):
            read(path)
    assert state.nimg == 12_345 and not state.net.model.out_conv.bias.any()


ONE = torch.ones(())


@pytest.mark.parametrize("scale", [{"scale": ONE}, {"scale": torch.ones(2), "_growth_tracker": ONE}])
def test_a_damaged_scale_is_refused_and_changes_nothing(scale: dict[str, torch.Tensor], tmp_path: Path) -> None:
    saved, state = start(), start()
    with torch.no_grad():
        saved.net.model.out_conv.bias.fill_(7)
    path = tmp_path / "run.safetensors"
    save_state(saved, path)
    tensors = load_file(path) | {f"scaler.{name}": value for name, value in scale.items()}
    save_file(tensors, path, metadata={"format": "cedm_ray.diffusion.train_state/1", "nimg": "8"})
    with pytest.raises(ValueError, match=r"scaler\._growth_tracker|scaler\.scale \(2,\) instead of \(\)"):
        load_state(state, path)
    assert state.nimg == 12_345 and state.scaler is None and not state.net.model.out_conv.bias.any()


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
