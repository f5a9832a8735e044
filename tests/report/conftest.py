"""Results as a search writes them, of which the tests change what they are about."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Tree = dict[str, Any]
METRICS = ("fid", "fdd")


def trial_tree(
    grouping: str,
    num_clusters: int,
    scores: Mapping[int, float],
    *,
    key: str | None = None,
    state: str = "complete",
    ratio: float | None = 1.0,
    **params: Any,
) -> Tree:
    """A trial with these scores by kimg; the second metric is ten times the first."""
    params = {"grouping": grouping, "num_clusters": num_clusters, **params}
    label = {"none": "unconditional", "temi": f"C={num_clusters}"}.get(grouping, f"{grouping} ({num_clusters})")
    rungs = [
        {"kimg": kimg, "nimg": kimg * 1000, "loss": 1.0, "images_per_s": 9.0, "score": score, "num_images": 5000,
         "fid": score, "fdd": 10 * score, "checkpoint_path": None}
        for kimg, score in scores.items()
    ]  # fmt: skip
    return {
        "key": key or "-".join(str(value) for value in params.values()),
        "label": label,
        "grouping": grouping,
        "num_clusters": num_clusters,
        "params": params,
        "state": state,
        "utilization_ratio": ratio,
        "rungs": rungs,
        "reason": None,
    }


def run_tree(trials: Sequence[Tree] | None = None, **changed: Any) -> Tree:
    """A search that found C = 20 among three, with a tie set of two."""
    default = (
        trial_tree("none", 1, {100: 8.0, 200: 4.0}),
        trial_tree("labels", 10, {100: 5.0, 200: 2.5}),
        trial_tree("temi", 10, {100: 6.0, 200: 3.03}),
        trial_tree("temi", 20, {100: 6.0, 200: 3.0, 400: 2.0}),
        trial_tree("temi", 90, {100: 9.0}, state="stopped", ratio=0.97),
    )
    curve = {"num_clusters": [50.0, 200.0], "ratio": [1.0, 0.9], "low": [0.99, 0.85], "high": [1.0, 0.95]}
    probe = {"num_clusters": 100, "ratio": 0.965, "fidelity": "full", "seed": 0, "num_heads": 4, "epochs": 60}
    bound = {"c_max": 110, "interval": [100, 120], "confidence": 0.95, "outcome": "found", "probes": [probe],
             "curve": curve}  # fmt: skip
    score = {"metric": "fid", "value": 2.1, "std": 0.1, "detector": "inception", "weights_hash": "ab", "resize": "none",
             "dtype": "float32", "num_images": 5000, "num_reference": 50000, "num_sets": 3}  # fmt: skip
    final = {"num_clusters": 20, "kimg": 400, "mean": 2.1, "std": 0.1, "num_sets": 3, "num_images": 5000,
             "export": "/gone/export", "scores": [score]}  # fmt: skip
    return {
        "name": "toy-1",
        "folder": "/gone/runs/toy-1",
        "grouping": "temi",
        "metric": "fid",
        "metrics": list(METRICS),
        "images_sha256": "5a",
        "scored": {"detector": "inception", "weights_hash": "ab", "resize": "none", "dtype": "float32", "dim": 2048,
                   "count": 50000},
        "num_images": 5000,
        "total_kimg": 200,
        "cutoff": 0.96,
        "upper_bound": bound,
        "lower_bound": None,
        "searched": [2, 120],
        "trials": list(default if trials is None else trials),
        "best": 20,
        "tie_set": {"clusters": [10, 20], "smallest": 10, "best": 20, "margin": 0.02, "low": 3.0, "high": 3.06},
        "pareto": [20],
        "final": final,
        "tracking_uri": "sqlite:///x",
        "ui_command": "mlflow",
        "run_id": "1",
        **changed,
    }  # fmt: skip


def write_run(folder: Path, tree: Tree, name: str = "result.json") -> Path:
    """The folder of a run with this result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(tree), encoding="utf-8")
    return folder


def add_pictures(folder: Path, tree: Tree) -> Tree:
    """Samples for every trial, samples by confidence and pictures of clusterings, in the storage of a run."""
    store = folder.parent / "store"
    for number, trial in enumerate(tree["trials"]):
        for rung in trial["rungs"][-1:]:
            checkpoint = store / trial["key"]
            checkpoint.mkdir(parents=True, exist_ok=True)
            np.save(checkpoint / "samples.npy", np.full((64, 3, 8, 8), number, np.uint8))
            rung["checkpoint_path"] = str(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: np.full((4, 3, 8, 8), shade, np.uint8) for name, shade in (("high", 10), ("low", 20))}
    probs = {"high_probs": np.array([0.99, 0.98, 0.97, 0.96]), "low_probs": np.array([0.1, 0.2, 0.3, 0.4])}
    np.savez(folder / "confidence.npz", **shown, **probs, unconditional=np.full((4, 3, 8, 8), 30, np.uint8))
    mosaics = {}
    for clusters in (10, 20):
        (store / f"clusters-{clusters}.png").write_bytes(b"picture %d" % clusters)
        mosaics[str(clusters)] = str(store / f"clusters-{clusters}.png")
    return {**tree, "folder": str(folder), "mosaics": mosaics, "confidence": str(folder / "confidence.npz")}


@pytest.fixture
def trial() -> Callable[..., Tree]:
    return trial_tree


@pytest.fixture
def result() -> Callable[..., Tree]:
    return run_tree


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a result into a folder of its own, with its pictures, and gives the folder."""

    def write(tree: Tree | None = None, name: str = "toy-1", *, pictures: bool = True) -> Path:
        folder = tmp_path / "runs" / name
        whole = run_tree() if tree is None else tree
        return write_run(folder, add_pictures(folder, whole) if pictures else whole)

    return write
