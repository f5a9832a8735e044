"""Flags of a command line as settings; what is wrong with them is one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from typing import TypeVar

from cedm_ray.errors import UserError, one_line

ALL_FLAGS = "--help lists every flag"
Settings = TypeVar("Settings")


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, the last one given; ``_`` stands for ``-``, as for tyro."""
    value = None
    for here, after in itertools.zip_longest(argv, argv[1:]):
        flag, equals, inside = here.partition("=")
        if flag.replace("_", "-") == name:
            value = inside if equals else after
    return value


def parse_flags(
    kind: type[Settings], argv: Sequence[str], *, prog: str, default: Settings | None = None, more: str = ALL_FLAGS
) -> Settings:
    """The settings that the flags of a command give.

    Args:
        kind: Class of the settings.
        argv: Flags, without the program's name.
        prog: How the command is called.
        default: Settings to start from (None: the class' own defaults).
        more: Where all flags can be seen; ends an error's message.

    Raises:
        UserError: If a flag is unknown or a value does not fit; the message is one line.
        SystemExit: With status 0 after ``--help``.
    """
    import tyro  # not at the top: it takes a while to import, which who reads a single flag need not wait for

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind, prog=prog, args=list(argv), default=default if default is not None else tyro.MISSING_NONPROP
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_unboxed(complaint.getvalue(), more)) from stop


def _unboxed(text: str, more: str) -> str:
    """What tyro says in a box of several lines, as one line."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in text.splitlines()]
    said = []
    for number, line in enumerate(lines):
        if number and not line:  # the rule under the message; what follows repeats the help text
            break
        said.append(line)
    message = one_line(" ".join(said[1:] or said)).removeprefix("Error parsing ")
    if message.startswith("Unrecognized options"):
        similar = sorted(re.findall(r"^│ {5}(--\S+)", text, flags=re.MULTILINE))  # help stands further to the right
        message += f"; did you mean {' or '.join(similar)}?" if similar else ""
    return f"{message} ({more})"
