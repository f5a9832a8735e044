"""The result of a search in the folder of its run: written when all else is there, and read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from cedm_ray.errors import UserError
from cedm_ray.report.read_run import RESULT_FILE, SO_FAR_FILE
from cedm_ray.report.run import Run, damaged
from cedm_ray.report.write import write_report
from cedm_ray.stages.results.logged import track_result
from cedm_ray.stages.results.result import SearchResult
from cedm_ray.stages.storage.store import read_json, write_json
from cedm_ray.stages.tracking import story
from cedm_ray.stages.training.records import TrialRecord

if TYPE_CHECKING:
    from cedm_ray.stages.context import Context


def write_result(ctx: Context, result: SearchResult) -> None:
    """Keep a result with its tables and figures in the folder of its run and in MLflow.

    The JSON comes last: what makes a search count as done is written when everything else is.
    """
    run = result.view
    files = write_report(run, ctx.folder)
    track_result(ctx.tracker, result, files)
    story.tell(ctx.tracker, run, result.facts(), {file.name for file in files})
    ctx.tracker.end(ctx.tracker.parent_key, "complete")  # a search that is done is not opened again to say so
    write_json(ctx.folder / RESULT_FILE, asdict(result))
    (ctx.folder / SO_FAR_FILE).unlink(missing_ok=True)


def write_so_far(ctx: Context, base: Mapping[str, Any], records: Sequence[TrialRecord]) -> None:
    """Keep what a search has found so far, for whoever looks at it while it goes on."""
    tree = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in base.items()
    }
    tree["trials"] = [asdict(record) for record in records]
    write_json(ctx.folder / SO_FAR_FILE, tree)
    story.tell(ctx.tracker, Run.from_tree(tree, ctx.folder))


def read_result(folder: Path) -> SearchResult | None:
    """The result of a finished run, or None.

    Raises:
        UserError: If a value is missing or of the wrong kind.
    """
    tree = read_json(folder / RESULT_FILE)
    if tree is None:
        return None
    what = f"the result of {folder}"
    if not isinstance(tree, dict):
        raise UserError(damaged(what, "it holds no map"))
    try:
        found = _RESULT.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(damaged(what, f"{place}: {first['msg'].lower()}")) from error
    return found


_RESULT = TypeAdapter(SearchResult)
