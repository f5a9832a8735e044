"""Whether the installed packages are those that this project works with, and whether they work with one another."""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cedm_ray.stages.checkup.finding import Finding

PACKAGE = "cedm-ray"
IMPORTED = (
    "torch", "torchvision", "timm", "open_clip", "faiss", "ray.train.torch", "ray.tune", "ray.data", "optuna", "mlflow",
    "torch_fidelity", "sklearn", "scipy.linalg", "pandas", "pyarrow.parquet", "matplotlib.pyplot",
)  # fmt: skip
_PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
_IMPORT_TIMEOUT_S = 300
_IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    print(name, flush=True)
    importlib.import_module(name)
print("done", flush=True)
"""


@dataclass(frozen=True)
class Asked:
    """What this project asks for."""

    python: str
    """Versions of Python, for example ``>=3.11,<3.13``."""
    requirements: tuple[str, ...]


def asked() -> Asked:
    """The bounds of this project: a checkout's own, since what an installation in place recorded may be older."""
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        return Asked(project["requires-python"], tuple(project["dependencies"]))
    facts = metadata.distribution(PACKAGE)
    plain = [line for line in facts.requires or () if "extra ==" not in line]
    # Once a library imports the backport of importlib.metadata, what is missing raises instead of giving None.
    (python,) = facts.metadata.get_all("Requires-Python") or ("",)
    return Asked(python, tuple(plain))


def version_findings(wanted: Asked) -> list[Finding]:
    """One finding for each package that is missing or out of its bounds; one in all if there is none.

    Args:
        wanted: The bounds; extras such as ``ray[default]`` are followed to the packages that they add.
    """
    python = platform.python_version()
    found = []
    if not SpecifierSet(wanted.python).contains(python, prereleases=True):
        fix = f"make an environment with a Python {wanted.python} and install there"
        found.append(Finding("versions", "fail", f"Python is {python}; it must be {wanted.python}", fix))
    seen: dict[str, str] = {}
    for requirement, asker in _followed(wanted.requirements):
        version = installed(requirement.name)
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        if version is None:
            found.append(Finding("versions", "fail", f"{requirement.name}{asker} is not installed", fix))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name}{asker} is {version}; it must be {requirement.specifier}"
            found.append(Finding("versions", "fail", text, fix))
        else:
            seen[requirement.name] = version
    if found:
        return found
    main = ", ".join(f"{name} {seen[name]}" for name in ("ray", "torch") if name in seen)
    return [
        Finding("versions", "ok", f"Python {python}, {main} and {len(seen) - 2} other packages within their bounds")
    ]


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _followed(lines: Sequence[str]) -> Iterator[tuple[Requirement, str]]:
    """The requirements that apply here, and those of their extras, each with who asks for it."""
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        yield requirement, ""
        if installed(requirement.name) is None:
            continue
        for extra in sorted(requirement.extras):
            for each in map(Requirement, metadata.requires(requirement.name) or ()):
                if each.marker is not None and not each.marker.evaluate() and each.marker.evaluate({"extra": extra}):
                    yield each, f", which {requirement.name}[{extra}] needs,"


def import_finding(modules: Sequence[str] = IMPORTED) -> Finding:
    """Whether all libraries can be imported together; in a process of its own, which a broken one may end.

    Args:
        modules: What to import, in this order.
    """
    command = [sys.executable, "-c", _IMPORT, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        text = f"importing {len(modules)} libraries did not end within {_IMPORT_TIMEOUT_S} s"
        return Finding("imports", "warn", text, "put the environment on a local disk")
    last = done.stdout.split()[-1:]
    if done.returncode == 0 and last == ["done"]:
        return Finding("imports", "ok", f"{len(modules)} libraries can be imported into one process")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1].strip()[:200] if said else f"the process ended with status {done.returncode}"
    name = last[0] if last else modules[0]
    fix = "install the versions of constraints.txt: pip install --constraint constraints.txt cedm-ray"
    return Finding("imports", "fail", f"{name} cannot be imported ({reason})", fix)
