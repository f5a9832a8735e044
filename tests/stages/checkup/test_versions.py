"""The bounds of this project against distributions that are installed for the test, by their metadata alone."""

import importlib
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cedm_ray.stages.checkup import versions as checkup_versions
from cedm_ray.stages.checkup.versions import Asked, asked, import_finding, installed, version_findings

ROOT = Path(__file__).parents[3]


def install(folder: Path, name: str, version: str, *requires: str) -> None:
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (made / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
    importlib.invalidate_caches()  # a folder that was looked into some milliseconds ago has the same time stamp


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_bounds_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert asked() == Asked(project["requires-python"], tuple(project["dependencies"]))
    assert {"ray", "torch", "mlflow"} <= {Requirement(line).name for line in asked().requirements}


def test_without_a_checkout_they_are_those_of_the_installation(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup_versions, "_PYPROJECT", site / "none.toml")
    monkeypatch.setattr(checkup_versions, "PACKAGE", "some-project")
    install(site, "some-project", "1.0", "some-library>=2", "some-linter>=1; extra == 'dev'")
    assert asked() == Asked("", ("some-library>=2",))


def test_what_is_installed_here_is_within_the_bounds() -> None:
    (finding,) = version_findings(asked())
    assert finding.level == "ok" and f"torch {installed('torch')}" in finding.text


@pytest.mark.parametrize(("version", "level"), [("1.9", "fail"), ("2.0", "ok"), ("2.5rc1", "ok"), ("3.0", "fail")])
def test_a_version_out_of_its_bounds_is_a_failure_that_says_what_to_install(
    site: Path, version: str, level: str
) -> None:
    install(site, "some-library", version)
    (finding,) = version_findings(Asked(">=3.0", ("some-library<3,>=2",)))
    assert finding.level == level
    if level == "fail":
        assert finding.text == f"some-library is {version}; it must be <3,>=2"
        assert finding.fix == "pip install 'some-library<3,>=2'"


def test_every_package_that_is_missing_is_told_but_those_of_other_systems() -> None:
    lines = ("surely-not-there>=1", "nor-this-one", "not-for-us>=1; sys_platform == 'plan9'")
    assert [finding.text for finding in version_findings(Asked(">=3.0", lines))] == [
        "surely-not-there is not installed",
        "nor-this-one is not installed",
    ]


def test_packages_of_an_extra_are_looked_for_too(site: Path) -> None:
    install(site, "some-library", "2.0", "its-server>=4; extra == 'default'", "its-docs; extra == 'docs'", "plain")
    (finding,) = version_findings(Asked(">=3.0", ("some-library[default]>=2",)))
    assert finding.text == "its-server, which some-library[default] needs, is not installed"


def test_another_python_is_a_failure() -> None:
    (finding,) = version_findings(Asked(">=3.99", ()))
    assert finding.level == "fail" and "it must be >=3.99" in finding.text and finding.fix


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('operator nms does not exist')", "RuntimeError: operator nms does not exist"),
        ("import os; os.abort()", "the process ended with status -6"),
    ],
)
def test_a_library_that_does_not_go_with_the_others_is_named(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = import_finding(("json", "broken_library", "csv"))
    assert finding.level == "fail" and finding.text == f"broken_library cannot be imported ({reason})"
    assert import_finding(("json", "csv")).level == "ok"
