import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cedm_ray.data.digits import digits
from cedm_ray.data.pack import load_packed
from cedm_ray.data.subset import FirstImages
from cedm_ray.stages.inputs.images import FILES, pack_images
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.show.warned import warned
from cedm_ray.stages.storage.store import Store
from cedm_ray.weights import listing


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("packed"))
    pack(store)
    return store.root


def pack(store: Store) -> tuple[Path, str]:
    said = io.StringIO()
    terminal = Terminal(Console(file=said, width=500))
    listing._sha256.cache_clear()  # as in a process that starts
    with warned(terminal):
        folder = pack_images(FirstImages(digits(), 40), store, terminal)
    return folder, said.getvalue()


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "facts.json", None])
def test_images_with_one_bit_changed_are_set_aside_and_packed_anew(
    packed: Path, tmp_path: Path, name: str | None, earlier: bool
) -> None:
    store = Store(tmp_path / "store")
    shutil.copytree(packed, store.root)
    (folder,) = (store.root / "images").iterdir()
    if earlier:
        (folder / FILES).unlink()
    if name is not None:
        content = bytearray((folder / name).read_bytes())
        content[-40] ^= 1
        (folder / name).write_bytes(bytes(content))
    again, said = pack(store)
    assert again == folder and (folder / FILES).is_file()
    noticed = name is not None and not (earlier and name == "labels.npy")  # of labels no hash was kept
    assert ("is not whole" in said) == noticed and ("reading 40 images" in said) == noticed
    assert folder.with_name(f"{folder.name}.torn-1").is_dir() == noticed
    if noticed:
        assert np.array_equal(load_packed(folder).images, digits().read(0, 40))


def test_packing_that_was_cut_off_is_done_again_without_a_word(packed: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shutil.copytree(packed, store.root)
    (folder,) = (store.root / "images").iterdir()
    (folder / "facts.json").unlink()
    assert "not whole" not in pack(store)[1]
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]
