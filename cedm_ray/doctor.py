"""python -m cedm_ray.doctor: what this machine or cluster lacks for a search, before hours are spent on it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cedm_ray.config import SearchConfig, load
from cedm_ray.errors import UserError
from cedm_ray.stages.checkup.disk import ImageSet, checkpoint_bytes
from cedm_ray.stages.checkup.inputs import images_finding, settings_findings, weights_of
from cedm_ray.stages.checkup.quick import Finding, quick_findings
from cedm_ray.stages.checkup.storage import is_server, server_finding
from cedm_ray.stages.checkup.versions import import_finding
from cedm_ray.stages.show.library_output import output_to
from cedm_ray.stages.show.terminal import Terminal

USAGE = """python -m cedm_ray.doctor [--json] [FLAGS]: what this machine or cluster lacks for a search with these flags.

Exit status 1 if the search would fail, 2 for a mistake in the flags. The flags are those of the search:
"""
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine(config: SearchConfig, terminal: Terminal) -> list[Finding]:
    """Everything that can be found out before a search with these settings starts.

    Args:
        config: The settings.
        terminal: Where it is said what takes its time.

    Returns:
        The findings, in the order in which a search would come upon them.
    """
    terminal.line("looking at the images, the weights and this machine")
    source, data = images_finding(config)
    images = ImageSet.of(config, source)
    weights = weights_of(config)
    loaded = all(each.present for each in weights)
    found = [
        *quick_findings(config, source),
        data,
        *(each.finding for each in weights),
        *settings_findings(config, source, images, loaded=loaded),
    ]
    if config.tracking_uri is not None and is_server(config.tracking_uri):
        found.append(server_finding(config.tracking_uri))
    terminal.line("importing the libraries")
    found.append(import_finding())
    return [*found, *_cluster(config, images, terminal)]


def _cluster(config: SearchConfig, images: ImageSet | None, terminal: Terminal) -> list[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    terminal.line(f"joining Ray at {address}" if address else "starting Ray, which takes some seconds")
    # Ray takes seconds to import.
    from cedm_ray.stages.checkup.nodes import cluster_findings

    with tempfile.TemporaryDirectory() as folder, output_to(Path(folder) / "ray.log", terminal.console):
        return cluster_findings(config, 0 if images is None else checkpoint_bytes(config.diffusion, images))


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print findings, one a line, and what they come to."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.level:<4}", STYLES[finding.level]), f"  {finding.name:<{width}}  {finding.text}"
        )
        line.append(f" -> {finding.fix}" if finding.fix else "")
        console.print(line, soft_wrap=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    verdict = "the search would fail" if counts["fail"] else "the search can start"
    console.print(f"{verdict}: {counts['fail']} failed, {counts['warn']} to be thought of, {counts['ok']} well")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1 if the search would fail, 2 for a mistake in the flags)."""
    given = list(sys.argv[1:] if argv is None else argv)
    flags = [flag for flag in given if flag != "--json"]
    if "--help" in flags or "-h" in flags:
        print(USAGE)
    try:
        config = load(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        findings = examine(config, Terminal(Console(file=sys.stderr, highlight=False, soft_wrap=True)))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if len(flags) < len(given):
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show(findings, Console(highlight=False))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
