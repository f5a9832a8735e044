"""What all stages of one search share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cedm_ray.config import SearchConfig
from cedm_ray.data.pack import PackedImages
from cedm_ray.stages.cluster.board import Board
from cedm_ray.stages.cluster.shares import Shares
from cedm_ray.stages.show.stopping import Stopping
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.storage.store import Store

if TYPE_CHECKING:  # MLflow takes seconds to import, and only the driver needs it
    from cedm_ray.stages.tracking.tracker import Tracker


@dataclass(frozen=True)
class Context:
    """One search in its driver; never sent to another process."""

    config: SearchConfig
    folder: Path
    """Of this search; what searches share is in the store."""
    store: Store
    images: Path
    """Folder of the packed images."""
    packed: PackedImages
    weights_hash: str
    """What identifies the backbone's weights."""
    detector_hashes: dict[str, str]
    """What identifies the weights of the detectors that are not of this search's own making."""
    terminal: Terminal
    tracker: Tracker
    shares: Shares
    """What the stages ask for of the cluster."""
    board: Board
    """Where processes tell how far they are."""

    @property
    def stopping(self) -> Stopping:
        """Whether the search is asked to end."""
        return self.terminal.stopping
