"""python -m cedm_ray.report: the figures and tables of a run, from the JSON in its folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from cedm_ray.errors import UserError
from cedm_ray.report.groupings import compare_groupings, groupings_tables
from cedm_ray.report.pages import efficiencies
from cedm_ray.report.read_run import read_run
from cedm_ray.report.run import Run
from cedm_ray.report.tables import probes_table, scores_table, trials_table
from cedm_ray.report.write import Report, make_report


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every flag)")


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m cedm_ray.report", description="Make the figures and tables of a search.")
    parser.add_argument("run", type=Path, help="folder of the search, such as runs/digits-1a2b3c4d")
    parser.add_argument(
        "others",
        type=Path,
        nargs="*",
        help="folders of other searches on the same images, whose trainings stand beside its own in groupings.csv",
    )
    parser.add_argument("--out", type=Path, help="folder for the files (when not given: the folder of the search)")
    return parser.parse_args(given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for a mistake of the user, 130 after Ctrl-C)."""
    try:
        arguments = _arguments(sys.argv[1:] if argv is None else argv)
        run, *others = (read_run(folder.expanduser()) for folder in (arguments.run, *arguments.others))
        report = make_report(run, run.folder if arguments.out is None else arguments.out.expanduser(), others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command makes the report anew", file=sys.stderr)
        return 130
    console = Console(highlight=False)
    _show_tables(run, others, console)
    _show_files(report, console)
    return 0


def _show_tables(run: Run, others: Sequence[Run], console: Console) -> None:
    bound = run.upper_bound
    if bound is not None and bound.probes:
        console.print(
            probes_table(run.probe_rows(), utilization_cutoff=run.cutoff, c_max=bound.c_max, interval=bound.interval)
        )
        console.print()
    console.print(trials_table(run.rows(), run.metric, run.best, run.grouping))
    groupings = compare_groupings([run, *others])
    if len(groupings.cells) > 1:
        for table in groupings_tables(groupings):
            console.print()
            console.print(table)
    if run.final is not None and run.final.scores:
        console.print()
        console.print(scores_table(run.final.scores))
    for each in efficiencies(run):
        console.print(f"C = {run.best} {escape(each.sentence())}", soft_wrap=True)


def _show_files(report: Report, console: Console) -> None:
    console.print()
    for file in report.files:
        console.print(escape(str(file)), soft_wrap=True)
    for name, why in report.left_out:
        console.print(f"left out: {escape(name)}: {escape(why)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
