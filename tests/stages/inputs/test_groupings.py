"""Groupings given from outside: made once, and read from the store from then on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.config import load
from cedm_ray.data.digits import digits
from cedm_ray.data.pack import load_packed, pack
from cedm_ray.data.subset import FirstImages
from cedm_ray.stages.inputs import groupings
from cedm_ray.stages.inputs.groupings import given_groupings
from cedm_ray.stages.storage.store import Store


def test_what_is_given_is_looked_at_once_and_read_when_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(pack(FirstImages(digits(), 100), tmp_path / "images"))
    np.save(tmp_path / "groups.npy", np.arange(100) % 7)
    config = load(["--grouping", "file", "--assignments", str(tmp_path / "groups.npy")])
    packed = load_packed(tmp_path / "images")
    ctx = cast(Any, SimpleNamespace(config=config, packed=packed, store=Store(tmp_path / "store")))
    found = given_groupings(ctx)
    assert {name: each.num_clusters for name, each in found.items()} == {"labels": 10, "file": 7}
    assert (load_clustering(found["labels"].file).assignments == digits().labels()[:100]).all()
    assert (load_clustering(found["file"].file).assignments == np.arange(100) % 7).all()

    def again(*_: object, **__: object) -> None:
        pytest.fail("it is made again")

    for name in ("from_labels", "read_assignments", "keep"):
        monkeypatch.setattr(groupings, name, again)
    assert given_groupings(ctx) == found
