"""python -m cedm_ray.search: from a pile of images to its visual groups."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cedm_ray.config import SearchConfig, fingerprint_tree, load
from cedm_ray.data.pack import PackedImages, load_packed, pack
from cedm_ray.data.registry import open_source
from cedm_ray.data.sources import ImageSource
from cedm_ray.data.subset import FirstImages
from cedm_ray.errors import UserError
from cedm_ray.features.backbones import check_backbone
from cedm_ray.stages.preflight import check_inputs
from cedm_ray.stages.progress import Terminal, noise_to
from cedm_ray.stages.result import SearchResult, read_result, show, write_result
from cedm_ray.stages.store import Store, key_of, prepare_storage, write_json


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
    storage = prepare_storage(config.storage_path)
    source = _open(config)
    weights_hash = check_backbone(config.backbone, config.backbone_weights)
    key = key_of({"settings": fingerprint_tree(config), "images": source.fingerprint, "weights": weights_hash})
    folder = storage / f"{source.name}-{key[:8]}"
    done = read_result(folder)
    if done is not None:
        terminal.line(f"{folder} is complete: all is done")
        return done
    check_inputs(config, source)
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    with noise_to(folder / "search.log", terminal):
        return _search(config, key, source, weights_hash, folder, storage, terminal)


def _open(config: SearchConfig) -> ImageSource:
    source = open_source(config.dataset, data_dir=config.data_dir.expanduser(), resolution=config.resolution)
    return source if config.max_images is None else FirstImages(source, config.max_images)


def _pack(source: ImageSource, store: Store, terminal: Terminal) -> tuple[Path, PackedImages]:
    path = store.path("images", {"images": source.fingerprint})
    try:
        return path, load_packed(path)
    except UserError:  # not there yet, or torn
        with terminal.stage(f"reading {len(source):,} images"):
            for _ in pack(source, path):
                pass
    return path, load_packed(path)


def _search(
    config: SearchConfig,
    key: str,
    source: ImageSource,
    weights_hash: str,
    folder: Path,
    storage: Path,
    terminal: Terminal,
) -> SearchResult:
    store = Store(storage / "store")
    terminal.line(f"search {folder.name}, everything is kept under {storage}")
    images, packed = _pack(source, store, terminal)

    # Ray and MLflow take seconds to import, which a search that is done does not need.
    import ray

    from cedm_ray.stages.board import Board
    from cedm_ray.stages.cluster import connected
    from cedm_ray.stages.embed import embed, neighbors
    from cedm_ray.stages.final import train_final
    from cedm_ray.stages.granularity import Ledger, best_of, search_granularity
    from cedm_ray.stages.groupings import keep_labels
    from cedm_ray.stages.plan import Planner
    from cedm_ray.stages.scoring import prepare_scoring
    from cedm_ray.stages.tracking import Tracker, database_uri, flat, ui_command
    from cedm_ray.stages.upper_bound import find_upper_bound

    uri = config.tracking_uri or database_uri(storage)
    tracker = Tracker(uri, f"cedm_ray/{packed.name}", None if config.tracking_uri else storage / "mlflow-artifacts")
    parent = tracker.start(
        key,
        folder.name,
        flat(config.model_dump(mode="json")),
        {
            "stage": "search",
            "dataset": packed.name,
            "state": "running",
        },
    )
    state = "interrupted"
    try:
        terminal.line("starting Ray")
        with connected(config) as shares:
            board = Board()
            with terminal.stage(f"embedding {len(packed):,} images with {config.backbone}", board):
                embeddings = embed(config, images, packed, weights_hash, store, shares, board)
                nearest = neighbors(config, embeddings, store, shares)
            with terminal.stage("preparing the score", board):
                scoring = prepare_scoring(config, images, embeddings, weights_hash, store, shares)
            with terminal.stage(f"searching C_max: the first C with r_C at or below {config.bound.cutoff:g}", board):
                bound = find_upper_bound(config, embeddings, nearest, store, folder, shares, terminal, tracker, board)
            terminal.line(f"C_max is {bound.c_max} (probes: {len(bound.probes)})")
            labels = packed.labels()
            planner = Planner(
                config=config,
                store=store,
                embedding_inputs=embeddings.inputs,
                images=images,
                images_sha256=packed.facts.pixels_sha256,
                scoring=scoring,
                num_classes=packed.num_classes,
                labels=None
                if labels is None or packed.num_classes is None
                else keep_labels(labels, packed.num_classes, packed.facts.pixels_sha256, store),
            )
            data = {"embeddings": ray.put(embeddings.values), "neighbors": ray.put(nearest)}
            ledger = Ledger(planner, folder, terminal, tracker, board)
            records = search_granularity(config, ledger, bound.c_max, data, folder, shares, terminal, board)
            best = best_of(records, config.granularity.total_kimg)
            if best is None:
                raise UserError(
                    f"no trial was trained to the end; the reasons stand above and in {folder / 'search.log'}"
                )
            terminal.line(f"the best number of clusters is {best.num_clusters}", style="bold")
            final = train_final(config, ledger, best, data, folder, shares, terminal, board)
            records = ledger.records
        result = SearchResult(
            name=folder.name,
            folder=str(folder),
            metric=scoring.metric,
            scored=asdict(scoring.facts),
            num_images=config.score.num_images,
            total_kimg=config.granularity.total_kimg,
            cutoff=config.bound.cutoff,
            c_max=bound.c_max,
            outcome=bound.outcome,
            probes=bound.probes,
            trials=tuple(records),
            best=best.num_clusters,
            final=final,
            tracking_uri=uri,
            ui_command=ui_command(uri),
            run_id=parent,
        )
        write_result(folder, result)
        result.track(tracker)
        state = "complete"
        return result
    except Exception:
        state = "failed"
        raise
    finally:
        tracker.end(parent, state)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    try:
        result = run(load(sys.argv[1:] if argv is None else argv))
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
