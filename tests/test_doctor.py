"""The doctor as a user calls it; its parts are tested in tests/stages/checkup."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cedm_ray import doctor
from cedm_ray.doctor import main
from cedm_ray.stages.checkup.quick import Finding


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds: Ray, and the imports."""
    monkeypatch.setattr(doctor, "_cluster", lambda *_: [Finding("one trial", "ok", "fits")])
    monkeypatch.setattr(doctor, "import_finding", lambda: Finding("imports", "ok", "all"))


def lines_of(said: str) -> dict[str, str]:
    return {line[6:].split("  ")[0].strip(): line for line in said.splitlines()}


def test_where_nothing_is_lacking_the_status_is_0(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--storage-path", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    lines = lines_of(said.out)
    assert {"versions", "storage", "disk", "tracking", "data", "backbone", "settings", "imports", "one trial"} <= set(
        lines
    )
    assert lines["data"] == "ok    data           digits: 1,797 images of 8 x 8 pixels, in 10 classes"
    assert "the search can start: 0 failed" in said.out and "looking at the images" in said.err
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_makes_the_status_1_and_everything_is_told_at_once(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    flags = ["--storage-path", str(tmp_path / "file"), "--tracking-uri", "http://127.0.0.1:9"]
    assert main([*flags, "--num-neighbors", "5000"]) == 1
    lines = lines_of(capsys.readouterr().out)
    failed = {name for name, line in lines.items() if line.startswith("fail")}
    assert failed == {"storage", "tracking", "settings"}
    assert all(" -> " in lines[name] for name in failed)
    assert "would fail: 3 failed" in next(line for line in lines.values() if "would fail" in line)


def test_findings_as_json(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--storage-path", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "one trial", "level": "ok", "text": "fits", "fix": ""} in found


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--diffusion.lr", "0"], ["--search-space", "/no/where.yaml"]])
def test_a_mistake_in_the_flags_is_status_2_and_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_help_says_what_it_is_and_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert (
        stopped.value.code == 0 and said.startswith("python -m cedm_ray.doctor [--json]") and "--storage-path" in said
    )


def test_it_can_be_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> list[Finding]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert main([]) == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.ray
def test_a_real_run_starts_ray_and_says_that_a_trial_fits(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    flags = ["--storage-path", str(tmp_path / "runs"), "--resources.num-workers", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "cedm_ray.doctor", *flags],
        capture_output=True, text=True, timeout=200, check=False,
        env={**environment, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(done.stdout)
    for name in ("imports", "shared storage", "GPUs", "one trial"):
        assert lines[name].startswith("ok  "), lines[name]
    assert "refuses a client without the token" in lines["jobs API"]
    assert "starting Ray" in done.stderr and "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
