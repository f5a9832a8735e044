"""What a node lends: small file systems, mounted where that is permitted, and limits set in a process of its own."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cedm_ray.stages.checkup.machine import (
    local_disk_finding,
    memory_bytes,
    open_files_finding,
    shared_memory_finding,
)

GIB = 2**30


def test_the_memory_is_what_the_system_says_unless_a_container_has_less() -> None:
    total_kb = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 0 < memory_bytes() <= total_kb * 1024


@pytest.mark.parametrize(
    ("free_mb", "memory_mb", "level"),
    [(64, 200, "ok"), (59, 200, "warn"), (64, 32_000, "warn"), (9_999, 40_000, "warn"), (10_001, 900_000, "ok")],
)
def test_shared_memory_must_hold_three_tenths_of_the_memory_or_ten_gigabytes(
    free_mb: int, memory_mb: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_frsize=1000, f_bavail=free_mb * 1000))
    finding = shared_memory_finding(memory_mb * 10**6)
    assert finding.level == level
    assert (level == "ok") == (finding.fix == "")


def test_the_shared_memory_of_a_container_is_too_small_for_ray(small_disk: Any) -> None:
    folder = small_disk("64m").path
    finding = shared_memory_finding(32 * GIB, folder)
    assert finding.level == "warn" and finding.text.startswith(f"67.1 MB free in {folder}, Ray's object store takes up")
    assert "10.3 GB" in finding.text and "--shm-size=11g" in finding.fix
    assert shared_memory_finding(200 * 2**20, folder).level == "ok"


def test_without_shared_memory_ray_does_not_start(tmp_path: Path) -> None:
    finding = shared_memory_finding(GIB, tmp_path / "shm")
    assert finding.level == "fail" and "No such file" in finding.text and "mount" in finding.fix


@pytest.mark.parametrize(
    ("limit", "cpus", "level"),
    [
        # 64 files and three for each process, of which there are 16 more than CPUs.
        (117, 2, "fail"), (118, 2, "warn"), (303, 64, "fail"), (304, 64, "warn"), (8_191, 2, "warn"), (8_192, 2, "ok"),
        (65_536, 64, "ok"),
    ],
)  # fmt: skip
def test_the_limits_of_open_files(limit: int, cpus: int, level: str) -> None:
    finding = open_files_finding(limit, cpus)
    assert finding.level == level and f"{limit:,}" in finding.text
    assert (level == "ok") == (finding.fix == "")
    assert ("large cluster" in finding.text) == (limit == 8_192)


def test_the_hard_limit_of_the_process_counts() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 900))\n"
        "from cedm_ray.stages.checkup.machine import open_files_limit; print(open_files_limit())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "900"


def test_a_local_disk_must_hold_a_checkpoint(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert local_disk_finding(2 * free, tmp_path).level == "fail"
    assert local_disk_finding(1000, tmp_path).level in ("ok", "warn")


def test_a_disk_that_is_nearly_full_gets_no_spilled_objects(small_disk: Any) -> None:
    folder = small_disk("100m").path
    assert local_disk_finding(1000, folder).level == "ok"
    (folder / "data").write_bytes(bytes(97 * 2**20))
    finding = local_disk_finding(1000, folder)
    assert (
        finding.level == "warn" and "above 95% full Ray spills no objects" in finding.text and "TMPDIR" in finding.fix
    )
    finding = local_disk_finding(20 * 2**20, folder)
    assert finding.level == "fail" and "a checkpoint takes 21.0 MB" in finding.text
