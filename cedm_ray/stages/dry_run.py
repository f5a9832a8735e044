"""What a search would do, said without doing any of it."""

from __future__ import annotations

from cedm_ray.config import SearchConfig
from cedm_ray.errors import UserError
from cedm_ray.stages.budget.plan import plan_of
from cedm_ray.stages.checkup.disk import ImageSet
from cedm_ray.stages.inputs.images import open_images
from cedm_ray.stages.results.printed import print_pairs
from cedm_ray.stages.show.progress import PlanFacts
from cedm_ray.stages.show.terminal import Terminal


def dry_run(config: SearchConfig, terminal: Terminal) -> None:
    """Print what a search would train and what that would take; nothing is started, downloaded or written.

    Raises:
        UserError: If the settings cannot work, or if the budget is too small for a single training.
    """
    try:
        source = open_images(config, download=False)
    except UserError:
        known = ImageSet.of(config, None)
        if known is None:
            raise
        images, name, note = known, config.dataset, "the images are not there yet"
    else:
        images, name, note = ImageSet.of_source(source), source.name, f"{len(source):,} images"
    storage = config.storage_path.expanduser().absolute()
    plan = plan_of(config, storage, images.resolution, has_labels=images.has_labels)
    plan.check()
    said = f"plan for {name}, {note} (nothing is started)"
    if terminal.mode == "json":
        terminal.tell(said, PlanFacts(tuple(plan.lines())))
        return
    terminal.console.print(said)
    print_pairs(plan.lines(), terminal.console)
