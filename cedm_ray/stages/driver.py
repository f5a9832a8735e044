"""From settings to a finished search: what it needs is opened, and closed again whatever happens."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cedm_ray.config import SearchConfig, fingerprint_tree
from cedm_ray.data.pack import load_packed
from cedm_ray.data.registry import KNOWN_DATASETS, TEST_SPLITS
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone
from cedm_ray.stages.budget import Plan, Speeds, workload
from cedm_ray.stages.checkup import quick_findings, refuse_failures
from cedm_ray.stages.checkup_disk import Pile, still_needed
from cedm_ray.stages.checkup_finding import gigabytes
from cedm_ray.stages.disk_faults import find_fault
from cedm_ray.stages.features import check_detectors
from cedm_ray.stages.images import open_images, pack_images
from cedm_ray.stages.leftovers import remove_leftovers
from cedm_ray.stages.lock import owned
from cedm_ray.stages.mirror import Mirror
from cedm_ray.stages.noise import noise_to
from cedm_ray.stages.outbox import OUTBOX_FILE, read_journal, shown
from cedm_ray.stages.preflight import check_inputs
from cedm_ray.stages.progress import PlanFacts
from cedm_ray.stages.result import SearchResult, print_pairs, read_result
from cedm_ray.stages.stopping import Signals
from cedm_ray.stages.storage_errors import Need, told_clearly
from cedm_ray.stages.store import Store, for_this_user, key_of, prepare_storage, write_json
from cedm_ray.stages.terminal import Terminal
from cedm_ray.stages.warned import warned
from cedm_ray.weights.files import file_sha256

if TYPE_CHECKING:
    from cedm_ray.stages.tracking import Tracker

FULL_DISK_WAIT_S = 2.0


@for_this_user()
def run(config: SearchConfig, terminal: Terminal | None = None, signals: Signals | None = None) -> SearchResult:
    """Search for the visual groups of a dataset; a search that was begun goes on, one that is done is read.

    Args:
        config: The settings, from :func:`cedm_ray.config.load`.
        terminal: Where progress is shown.
        signals: Turns Ctrl-C and SIGTERM into ``terminal.stopping`` (None: they are left alone).

    Returns:
        C_max, every trial and the best of them.

    Raises:
        UserError: If the settings cannot work; nothing was computed then.
        Stopped: If ``terminal.stopping`` was asked; the same call goes on.
    """
    terminal = terminal or Terminal()
    source = open_images(config)
    weights_hash = check_backbone(config.backbone, config.backbone_weights)
    detector_hashes = check_detectors(config.score.detectors, config.detector_weights, config.dinov2_weights)
    storage = prepare_storage(config.storage_path)
    inputs = {"settings": fingerprint_tree(config), "images": source.fingerprint, "weights": weights_hash}
    key = key_of({**inputs, "detectors": detector_hashes, "files": file_hashes(config)})
    folder = storage / f"{source.name}-{key[:8]}"
    mirror = Mirror(folder)
    mirror.fetch()
    done = read_result(folder)
    if done is not None:
        terminal.line(f"{folder} is complete: all is done")
        if read_journal(folder / OUTBOX_FILE).waiting():  # the tracking server was down when the search ended
            _tracker(config, source.name, folder, terminal).close()
            mirror.push()
        return done
    check_inputs(config, source)
    _look(config, source, terminal)
    plan_of(config, storage, source.resolution, has_labels=source.num_classes is not None).check()
    folder.mkdir(exist_ok=True)
    handled = signals.handled() if signals else nullcontext()
    need = partial(_still_needed, config, source, storage)
    quiet = noise_to(folder / "search.log", terminal.console)
    driving = mirror.driving(terminal.line)
    with told_clearly(storage, need), owned(folder), driving, quiet, terminal.shown(), warned(terminal), handled:
        write_json(folder / "config.json", settings_of(config))
        return _search(config, key, source, weights_hash, detector_hashes, folder, terminal, signals)


def _still_needed(config: SearchConfig, source: ImageSource, storage: Path) -> Need:
    pile = Pile.of(config, source)
    assert pile is not None  # of images that are there it is known
    return still_needed(config, pile, storage)


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


def dry_run(config: SearchConfig, terminal: Terminal) -> None:
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
    said = f"plan for {name}, {note} (nothing is started)"
    if terminal.mode == "json":
        terminal.tell(said, PlanFacts(tuple(plan.lines())))
        return
    terminal.console.print(said)
    print_pairs(plan.lines(), terminal.console)


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
    signals: Signals | None,
) -> SearchResult:
    """Open what a search needs (packed images, MLflow, Ray), and close its run in MLflow whatever happens."""
    # Ray and MLflow take seconds to import, which a search that is done does not need.
    from cedm_ray.stages.board import Board
    from cedm_ray.stages.cluster import connected
    from cedm_ray.stages.context import Context
    from cedm_ray.stages.pipeline import find_visual_groups
    from cedm_ray.stages.tracking import CLOSE_WAIT_S, flat
    from cedm_ray.stages.waiting import watched

    storage = folder.parent
    store = Store(storage / "store")
    terminal.line(f"search {folder.name}, everything is kept under {storage}")
    left, size = remove_leftovers(store.root)
    if left:
        terminal.line(f"removed what killed processes had left unfinished in the store: {gigabytes(size)}")
    images = pack_images(source, store, terminal, config.on_bad_image)
    packed = load_packed(images)
    tracker = _tracker(config, source.name, folder, terminal)
    tags = {"stage": "search", "dataset": source.name, "state": "running", "skipped_images": packed.facts.skipped}
    run_id, state, wait_s = "", "interrupted", CLOSE_WAIT_S
    try:
        run_id = tracker.start(key, folder.name, flat(settings_of(config)), tags)
        with ExitStack() as stack:
            with terminal.stage("starting Ray"):
                shares = stack.enter_context(connected(config))
            if signals is not None:
                signals.install()  # Ray takes SIGTERM when it starts
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
            with watched(terminal, ctx.board, shares):
                result = find_visual_groups(ctx)
        state = "complete"
        return result
    except Exception as error:
        if find_fault(error) is None:
            state = "failed"
        else:  # what is for MLflow stays in the journal; on a full disk there is no use in waiting
            wait_s = FULL_DISK_WAIT_S
        raise
    finally:
        try:
            if run_id:
                tracker.end(run_id, state)
        finally:
            tracker.close(wait_s)


def _tracker(config: SearchConfig, name: str, folder: Path, terminal: Terminal) -> Tracker:
    """MLflow, whose journal lies in the run folder."""
    from cedm_ray.stages.tracking import Tracker, database_uri

    uri = config.tracking_uri or database_uri(folder.parent)
    artifacts = None if config.tracking_uri else folder.parent / "mlflow-artifacts"
    return Tracker(uri, f"cedm_ray/{name}", artifacts, folder, terminal.line)
