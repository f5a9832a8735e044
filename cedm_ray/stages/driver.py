"""From settings to a finished search: what it needs is opened, and closed again whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cedm_ray.addresses import without_credentials
from cedm_ray.config import SearchConfig, fingerprint_tree
from cedm_ray.data.pack import load_packed
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone
from cedm_ray.report.read_run import CONFIG_FILE
from cedm_ray.stages.budget.plan import plan_of
from cedm_ray.stages.checkup.disk import ImageSet, still_needed
from cedm_ray.stages.checkup.quick import quick_findings, refuse_failures
from cedm_ray.stages.inputs.detectors import check_detectors
from cedm_ray.stages.inputs.images import open_images, pack_images
from cedm_ray.stages.inputs.preflight import check_inputs
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.results.result_file import read_result
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.stopping import Signals
from cedm_ray.stages.show.terminal import Terminal
from cedm_ray.stages.show.warned import warned
from cedm_ray.stages.storage.disk_faults import find_fault
from cedm_ray.stages.storage.leftovers import remove_leftovers
from cedm_ray.stages.storage.lock import owned
from cedm_ray.stages.storage.mirror import Mirror
from cedm_ray.stages.storage.paths import ARTIFACTS_FOLDER, absolute, database_uri
from cedm_ray.stages.storage.storage_errors import Need, bytes_in_words, told_clearly
from cedm_ray.stages.storage.store import Store, for_this_user, key_of, prepare_storage, write_json
from cedm_ray.stages.tracking.outbox import OUTBOX_FILE, read_journal
from cedm_ray.weights.listing import file_sha256

if TYPE_CHECKING:
    from cedm_ray.stages.tracking.tracker import Tracker

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
    subject = _Subject.of(config)
    source = subject.source
    storage = prepare_storage(config.storage_path)
    key = subject.key(config)
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
    quiet = output_to(folder / "search.log", terminal.console)
    driving = mirror.driving(terminal.line)
    with told_clearly(storage, need), owned(folder), driving, quiet, terminal.shown(), warned(terminal), handled:
        write_json(folder / CONFIG_FILE, settings_of(config))
        return _search(config, subject, key, folder, terminal, signals)


@dataclass(frozen=True)
class _Subject:
    """What is looked at, and by which models."""

    source: ImageSource
    weights_hash: str
    """What identifies the backbone's weights."""
    detector_hashes: dict[str, str]
    """What identifies the weights of the detectors that are not of this search's own making."""

    @classmethod
    def of(cls, config: SearchConfig) -> _Subject:
        """What the settings name.

        Raises:
            UserError: If images or weights are not to be had.
        """
        return cls(
            open_images(config),
            check_backbone(config.backbone, absolute(config.backbone_weights)),
            check_detectors(config.score.detectors, config.detector_weights, config.dinov2_weights),
        )

    def key(self, config: SearchConfig) -> str:
        """What tells a search from others: everything that decides its result."""
        inputs = {"settings": fingerprint_tree(config), "images": self.source.fingerprint, "weights": self.weights_hash}
        return key_of({**inputs, "detectors": self.detector_hashes, "files": file_hashes(config)})


def _still_needed(config: SearchConfig, source: ImageSource, storage: Path) -> Need:
    return still_needed(config, ImageSet.of_source(source), storage)


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


def settings_of(config: SearchConfig) -> dict[str, Any]:
    """The settings as they are kept and logged: as plain JSON values, and without a name and a password in a URI."""
    tree = config.model_dump(mode="json")
    return {**tree, "tracking_uri": tree["tracking_uri"] and without_credentials(tree["tracking_uri"])}


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
    subject: _Subject,
    key: str,
    folder: Path,
    terminal: Terminal,
    signals: Signals | None,
) -> SearchResult:
    """Open what a search needs (packed images, MLflow, Ray), and go through its stages."""
    # Ray and MLflow take seconds to import, which a search that is done does not need.
    from cedm_ray.stages.cluster.board import Board
    from cedm_ray.stages.cluster.connection import connected
    from cedm_ray.stages.cluster.waiting import watched
    from cedm_ray.stages.context import Context
    from cedm_ray.stages.pipeline import find_visual_groups

    storage = folder.parent
    store = Store(storage / "store")
    terminal.line(f"search {folder.name}, everything is kept under {storage}")
    left, size = remove_leftovers(store.root)
    if left:
        terminal.line(f"removed what killed processes had left unfinished in the store: {bytes_in_words(size)}")
    images = pack_images(subject.source, store, terminal, config.on_bad_image)
    packed = load_packed(images)
    with (
        _tracked(config, key, subject.source.name, folder, terminal, packed.facts.skipped) as tracker,
        ExitStack() as stack,
    ):
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
            weights_hash=subject.weights_hash,
            detector_hashes=subject.detector_hashes,
            terminal=terminal,
            tracker=tracker,
            shares=shares,
            board=Board(),
        )
        with watched(terminal, ctx.board, shares):
            return find_visual_groups(ctx)


@contextmanager
def _tracked(
    config: SearchConfig, key: str, name: str, folder: Path, terminal: Terminal, skipped: int
) -> Iterator[Tracker]:
    """MLflow with the search's own run open; it is closed whatever happens, and says how the search has ended."""
    from cedm_ray.stages.tracking.tracker import CLOSE_WAIT_S, flat

    tracker = _tracker(config, name, folder, terminal)
    tags = {"stage": "search", "dataset": name, "state": "running", "skipped_images": skipped}
    parent, state, wait_s = "", "interrupted", CLOSE_WAIT_S
    try:
        parent = tracker.start(key, folder.name, flat(settings_of(config)), tags)
        yield tracker
        state = "complete"
    except Exception as error:
        if find_fault(error) is None:
            state = "failed"
        else:  # what is for MLflow stays in the journal; on a full disk there is no use in waiting
            wait_s = FULL_DISK_WAIT_S
        raise
    finally:
        try:
            if parent:
                tracker.end(parent, state)
        finally:
            tracker.close(wait_s)


def _tracker(config: SearchConfig, name: str, folder: Path, terminal: Terminal) -> Tracker:
    """MLflow, whose journal lies in the run folder."""
    from cedm_ray.stages.tracking.tracker import Tracker

    uri = config.tracking_uri or database_uri(folder.parent)
    artifacts = None if config.tracking_uri else folder.parent / ARTIFACTS_FOLDER
    return Tracker(uri, f"cedm_ray/{name}", artifacts, folder, terminal.line)
