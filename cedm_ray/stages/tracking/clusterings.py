"""A clustering in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cedm_ray.clustering.clustering_io import MOSAIC_FILE
from cedm_ray.stages.storage.bucket_entries import here
from cedm_ray.stages.tracking.tracker import Tracker


def track_clustering(tracker: Tracker, run: str, file: Path, facts: Mapping[str, Any]) -> None:
    """Log the loss of each head, the assignments and the mosaic (an older entry may have none)."""
    tracker.series(run, "head_loss", facts.get("head_losses", []))
    tracker.series(run, "head_utilization_ratio", facts.get("head_utilization", []))
    tracker.artifact(run, here(file), "clustering")
    mosaic = file.with_name(MOSAIC_FILE)
    if mosaic.is_file():
        tracker.artifact(run, mosaic)
