"""What a check says: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cedm_ray.errors import UserError

Level = Literal["ok", "warn", "fail"]
"""``fail``: the search would not come to its end; ``warn``: it would, at a price that the line names."""


@dataclass(frozen=True)
class Finding:
    """What one check found, in one line."""

    name: str
    """What was looked at."""
    level: Level
    text: str
    fix: str = ""
    """What to do, for everything but ``ok``."""

    @classmethod
    def refused(cls, name: str, error: UserError) -> Finding:
        """A failure from the line of an error: ``X is 3; it must be at least 4: do Y``, or ``A is wrong; do B``."""
        text, found, rest = str(error).partition("; ")
        more, colon, fix = rest.partition(": ")
        if colon and not fix.startswith("--"):  # a flag alone says too little
            return cls(name, "fail", f"{text}; {more}", fix)
        if found:
            return cls(name, "fail", text, rest)
        text, _, fix = text.partition(": ")
        return cls(name, "fail", text, fix)


def refuse_failures(findings: Iterable[Finding]) -> None:
    """End with the first failure.

    Raises:
        UserError: If there is one: its name, its text and the fix, where there is one.
    """
    for finding in findings:
        if finding.level == "fail":
            raise UserError(f"{finding.name}: {finding.text}" + (f"; {finding.fix}" if finding.fix else ""))


def merged(by_node: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The findings of several nodes as few lines: what is well everywhere in one, else one for each that is not.

    Args:
        by_node: Names of nodes, which need not differ, with their findings in the order in which they are to be told.
    """
    if len(by_node) == 1:
        return list(by_node[0][1])
    lines = []
    for name in dict.fromkeys(finding.name for _, findings in by_node for finding in findings):
        found = [(node, each) for node, findings in by_node for each in findings if each.name == name]
        well = [(node, each) for node, each in found if each.level == "ok"]
        for node, first in well[:1]:
            others = f" (as on {len(well) - 1} more)" if len(well) > 1 else ""
            lines.append(replace(first, text=f"{node}: {first.text}{others}"))
        lines += [replace(each, text=f"{node}: {each.text}") for node, each in found if each.level != "ok"]
    return lines
