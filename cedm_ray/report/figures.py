"""The figures of a search as objects, for a notebook."""

from __future__ import annotations

from matplotlib.figure import Figure

from cedm_ray.report.groupings import compare_groupings
from cedm_ray.report.pages import LeftOut, pages
from cedm_ray.report.run import Run


def figures(run: Run) -> dict[str, Figure]:
    """Every figure that a search holds enough for, by the name of its file without the ending.

    Args:
        run: The search, from :func:`cedm_ray.report.read_run.read_run`; it may still go on.
    """
    found = {}
    for name, make in pages(run, compare_groupings([run])):
        try:
            page = make()
        except (LeftOut, ValueError):
            continue
        if isinstance(page, Figure):
            found[name.removesuffix(".png")] = page
    return found
