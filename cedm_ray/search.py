"""python -m cedm_ray.search: from a pile of images to its visual groups."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cedm_ray.config import SearchConfig, fingerprint_tree, load
from cedm_ray.data.pack import load_packed
from cedm_ray.data.registry import KNOWN_DATASETS, TEST_SPLITS
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone
from cedm_ray.stages.budget import Plan, Speeds, workload
from cedm_ray.stages.checkup import quick_findings, refuse_failures
from cedm_ray.stages.features import check_detectors
from cedm_ray.stages.images import open_images, pack_images
from cedm_ray.stages.lock import owned
from cedm_ray.stages.outbox import OUTBOX_FILE, read_journal, shown
from cedm_ray.stages.preflight import check_inputs
from cedm_ray.stages.progress import Terminal, noise_to
from cedm_ray.stages.result import SearchResult, print_pairs, read_result, show
from cedm_ray.stages.store import Store, key_of, prepare_storage, write_json
from cedm_ray.weights.files import file_sha256

if TYPE_CHECKING:
    from cedm_ray.stages.tracking import Tracker


def run(config: SearchConfig, terminal: Terminal | None = None) -> SearchResult:
    """Search for the visual groups of a dataset; a search that was begun goes on, one that is done is read.

    Args:
        config: The settings, from :func:`cedm_ray.config.load`.
        terminal: Where progress is shown.

    Returns:
        C_max, every trial and the best of them.

    Raises:
        UserError: If the settings cannot work; nothing was computed then.
    """
    terminal = terminal or Terminal()
    source = open_images(config)
    weights_hash = check_backbone(config.backbone, config.backbone_weights)
    detector_hashes = check_detectors(config.score.detectors, config.detector_weights, config.dinov2_weights)
    storage = prepare_storage(config.storage_path)
    inputs = {"settings": fingerprint_tree(config), "images": source.fingerprint, "weights": weights_hash}
    key = key_of({**inputs, "detectors": detector_hashes, "files": file_hashes(config)})
    folder = storage / f"{source.name}-{key[:8]}"
    done = read_result(folder)
    if done is not None:
        terminal.line(f"{folder} is complete: all is done")
        if read_journal(folder / OUTBOX_FILE).waiting():  # the tracking server was down when the search ended
            _tracker(config, source.name, folder, terminal).close()
        return done
    check_inputs(config, source)
    _look(config, source, terminal)
    plan_of(config, storage, source.resolution, has_labels=source.num_classes is not None).check()
    folder.mkdir(exist_ok=True)
    with owned(folder), noise_to(folder / "search.log", terminal):
        write_json(folder / "config.json", settings_of(config))
        return _search(config, key, source, weights_hash, detector_hashes, folder, terminal)


def _look(config: SearchConfig, source: ImageSource, terminal: Terminal) -> None:
    """What this machine lacks, as far as that shows in no time; python -m cedm_ray.doctor looks at the rest.

    Raises:
        UserError: If the search would fail.
    """
    findings = quick_findings(config, source)
    refuse_failures(findings)
    for finding in findings:
        if finding.level == "warn" or finding.name == "disk":
            terminal.line(f"  {finding.name}: {finding.text}" + (f"; {finding.fix}" if finding.fix else ""))


def dry_run(config: SearchConfig, console: Console) -> None:
    """Print what a search would train and what that would take; nothing is started, downloaded or written.

    Raises:
        UserError: If the settings cannot work, or if the budget is too small for a single training.
    """
    resolution, has_labels = KNOWN_DATASETS.get(config.dataset, 0), config.dataset in TEST_SPLITS
    name, note = config.dataset, "the images are not there yet"
    try:
        source = open_images(config, download=False)
    except UserError:
        if not resolution:
            raise
    else:
        resolution, has_labels = source.resolution, source.num_classes is not None
        name, note = source.name, f"{len(source):,} images"
    plan = plan_of(config, config.storage_path.expanduser().absolute(), resolution, has_labels=has_labels)
    plan.check()
    console.print(f"plan for {name}, {note} (nothing is started)")
    print_pairs(plan.lines(), console)


def settings_of(config: SearchConfig) -> dict[str, Any]:
    """The settings as they are kept and logged: as plain JSON values, and without a name and a password in a URI."""
    tree = config.model_dump(mode="json")
    return {**tree, "tracking_uri": tree["tracking_uri"] and shown(tree["tracking_uri"])}


def plan_of(config: SearchConfig, storage: Path, resolution: int, *, has_labels: bool) -> Plan:
    """What a search of such images is going to train, as far as that is known before the cluster is."""
    work = workload(config, has_labels=has_labels)
    known = Speeds(storage, config, resolution).known(gpus=config.resources.gpus_per_worker != 0)
    return Plan(config, work, known, config.granularity.max_concurrent)


def file_hashes(config: SearchConfig) -> dict[str, str]:
    """What the files hold that decide the result beside the weights of backbone and detectors."""
    files = {
        "assignments": config.assignments,
        "clip.weights": config.clip.weights,
        "clip.class_names": config.clip.class_names,
    }
    missing = [f"{name} {file}" for name, file in files.items() if file and not file.expanduser().is_file()]
    if missing:
        raise UserError(f"{missing[0]} does not exist; give the path of a file")
    return {name: file_sha256(file.expanduser()) for name, file in files.items() if file}


def _search(
    config: SearchConfig,
    key: str,
    source: ImageSource,
    weights_hash: str,
    detector_hashes: dict[str, str],
    folder: Path,
    terminal: Terminal,
) -> SearchResult:
    """Open what a search needs (packed images, MLflow, Ray), and close its run in MLflow whatever happens."""
    # Ray and MLflow take seconds to import, which a search that is done does not need.
    from cedm_ray.stages.board import Board
    from cedm_ray.stages.cluster import connected
    from cedm_ray.stages.context import Context
    from cedm_ray.stages.pipeline import find_visual_groups
    from cedm_ray.stages.tracking import flat

    storage = folder.parent
    store = Store(storage / "store")
    terminal.line(f"search {folder.name}, everything is kept under {storage}")
    images = pack_images(source, store, terminal, config.on_bad_image)
    packed = load_packed(images)
    tracker = _tracker(config, source.name, folder, terminal)
    tags = {"stage": "search", "dataset": source.name, "state": "running", "skipped_images": packed.facts.skipped}
    run_id = tracker.start(key, folder.name, flat(settings_of(config)), tags)
    state = "interrupted"
    try:
        terminal.line("starting Ray")
        with connected(config) as shares:
            ctx = Context(
                config=config,
                folder=folder,
                store=store,
                images=images,
                packed=packed,
                weights_hash=weights_hash,
                detector_hashes=detector_hashes,
                terminal=terminal,
                tracker=tracker,
                shares=shares,
                board=Board(),
            )
            result = find_visual_groups(ctx)
        state = "complete"
        return result
    except Exception:
        state = "failed"
        raise
    finally:
        tracker.end(run_id, state)
        tracker.close()


def _tracker(config: SearchConfig, name: str, folder: Path, terminal: Terminal) -> Tracker:
    """MLflow, whose journal lies in the run folder."""
    from cedm_ray.stages.tracking import Tracker, database_uri

    uri = config.tracking_uri or database_uri(folder.parent)
    artifacts = None if config.tracking_uri else folder.parent / "mlflow-artifacts"
    return Tracker(uri, f"cedm_ray/{name}", artifacts, folder, terminal.line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    try:
        config = load(sys.argv[1:] if argv is None else argv)
        if config.dry_run:
            dry_run(config, Console(highlight=False))
            return 0
        result = run(config)
    except UserError as error:
        # An error that comes out of a Ray task carries the task's traceback; its cause is the line for the user.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is stored", file=sys.stderr)
        return 130
    show(result, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
