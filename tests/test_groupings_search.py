"""Groupings as the condition of the same training, as a user starts it: one small search of the digits each.

Not here: temi, on which tests/test_search.py searches, and superclasses, which the digits do not have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cedm_ray.clustering.clustering_io import load_clustering
from cedm_ray.data.digits import digits

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = [
    "--temi.epochs=8", "--temi.warmup-epochs=1", "--granularity.num-trials=2", "--granularity.startup-trials=2",
    "--granularity.total-kimg=2", "--granularity.grace-kimg=1", "--granularity.no-baselines", "--score.num-images=100",
    "--score.num-steps=3", "--final.total-kimg=3", "--final.num-images=100", "--final.num-sets=1",
]  # fmt: skip


def search(storage: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cedm_ray.search", "--storage-path", str(storage), *TINY, *flags],
        capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def flags_for(grouping: str, folder: Path) -> list[str]:
    """What a grouping needs beside its name."""
    if grouping == "kmeans":
        return ["--bound.c-max=30"]
    if grouping == "file":
        np.save(folder / "groups.npy", (np.arange(1797) % 7).astype(np.uint16))
        return [f"--assignments={folder / 'groups.npy'}"]
    if grouping == "clip":
        import open_clip

        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-S-32-alt", pretrained=None).state_dict(), folder / "clip.pt")
        return ["--clip.model=open_clip:ViT-S-32-alt", f"--clip.weights={folder / 'clip.pt'}"]
    return []


@pytest.mark.parametrize(
    ("grouping", "num_groups"), [("kmeans", None), ("labels", 10), ("file", 7), ("clip", 10), ("none", 1)]
)
def test_a_model_is_trained_on_it_and_exported(tmp_path: Path, grouping: str, num_groups: int | None) -> None:
    storage = tmp_path / "runs"
    flags = [f"--grouping={grouping}", *flags_for(grouping, tmp_path)]
    done = search(storage, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = storage.glob("digits-*")
    result = json.loads((folder / "result.json").read_text())
    assert {trial["grouping"] for trial in result["trials"]} == {grouping}
    if num_groups is None:
        assert result["upper_bound"]["c_max"] == 30 and 2 <= result["best"] < 30 and len(result["trials"]) == 2
    else:
        assert result["upper_bound"] is None and result["best"] == num_groups
        assert f"Trained on {grouping} ({num_groups} groups): fd_lenet" in done.stdout
    facts = json.loads((folder / "export" / "model.json").read_text())
    assert facts["label_dim"] == (0 if grouping == "none" else result["best"])
    if grouping == "none":
        assert not (folder / "export" / "clustering.safetensors").exists()
        return
    clustering = load_clustering(folder / "export" / "clustering.safetensors", num_images=1797)
    assert clustering.num_clusters == result["best"]
    if grouping == "labels":
        assert np.array_equal(clustering.assignments, digits().labels())
    if grouping == "file":
        assert np.array_equal(clustering.assignments, np.arange(1797) % 7)
    again = search(storage, *flags)
    assert again.returncode == 0 and "all is done" in again.stdout
