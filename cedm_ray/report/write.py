"""Every figure and table of a search, written into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from cedm_ray.errors import UserError
from cedm_ray.report.groupings import compare_groupings
from cedm_ray.report.pages import LeftOut, Page, pages
from cedm_ray.report.run import Run
from cedm_ray.weights.whole_file import whole_file


@dataclass(frozen=True)
class Report:
    """What was written and what was not."""

    files: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]
    """File names, each with the reason."""


def write_report(run: Run, out: Path) -> list[Path]:
    """Write every figure and table that a run holds enough for; files of an earlier report are replaced.

    Args:
        run: The search.
        out: Folder for the files; made if need be.

    Returns:
        The files.

    Raises:
        UserError: If the folder cannot be written.
    """
    return list(make_report(run, out).files)


def make_report(run: Run, out: Path, others: Sequence[Run] = ()) -> Report:
    """The same, with what was left out and why.

    Args:
        run: The search.
        out: Folder for the files; made if need be.
        others: Searches whose trainings stand beside its own in the table of groupings.

    Raises:
        UserError: If the folder cannot be written, or if another search was scored on other terms.
    """
    files, left_out = [], []
    groupings = compare_groupings([run, *others])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, make in pages(run, groupings):
            try:
                page = make()
            except (LeftOut, ValueError) as reason:  # values that make no sense cost their own page only
                left_out.append((name, str(reason)))
                continue
            write_page(page, out / name)
            files.append(out / name)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another folder with --out") from error
    return Report(tuple(files), tuple(left_out))


def write_page(page: Page, file: Path) -> None:
    """Write a figure, a picture, a text or a copy of a file: whole, or the file that was there stays as it was."""
    if isinstance(page, Path) and file.exists() and page.samefile(file):
        return
    with whole_file(file) as partial:
        if isinstance(page, Figure):
            page.savefig(partial, dpi=120)
        elif isinstance(page, Image.Image):
            page.save(partial)
        elif isinstance(page, str):
            partial.write_text(page, encoding="utf-8")
        else:
            shutil.copyfile(page, partial)
