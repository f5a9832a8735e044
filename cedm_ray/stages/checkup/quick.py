"""The checks that take less than two seconds together: no network, no Ray, no GPU."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from cedm_ray.config import SearchConfig
from cedm_ray.data.sources import ImageSource
from cedm_ray.stages.checkup.disk import ImageSet, checkpoint_bytes, disk_finding, still_needed
from cedm_ray.stages.checkup.finding import Finding, refuse_failures
from cedm_ray.stages.checkup.machine import machine_findings
from cedm_ray.stages.checkup.ports import token_finding
from cedm_ray.stages.checkup.storage import is_server, storage_finding, store_finding
from cedm_ray.stages.checkup.versions import asked, version_findings
from cedm_ray.stages.storage.paths import database_uri

__all__ = ["Finding", "quick_findings", "refuse_failures"]


def quick_findings(config: SearchConfig, source: ImageSource | None = None) -> list[Finding]:
    """What this machine lacks for a search, as far as that shows in no time.

    Args:
        config: The settings.
        source: The images (None: not there yet; of a named data set their number is known all the same).

    Returns:
        One finding or more for each check; give them to :func:`refuse_failures` to end with the first failure.
    """
    storage, images = config.storage_path.expanduser().absolute(), ImageSet.of(config, source)
    found = [
        *version_findings(asked()),
        *machine_findings(0 if images is None else checkpoint_bytes(config.diffusion, images)),
        token_finding(os.environ, Path.home()),
    ]
    if images is None:
        found.append(storage_finding(storage))
    else:
        need = partial(still_needed, config, images, storage)
        found += [storage_finding(storage, need), disk_finding(config, images, storage)]
    uri = config.tracking_uri or database_uri(storage)
    if not is_server(uri):
        found.append(store_finding(uri))
    return found
