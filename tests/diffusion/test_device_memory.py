import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cedm_ray.diffusion import device_memory
from cedm_ray.diffusion.device_memory import RESIDENT_SHARE, available_memory, fits

CPU = torch.device("cpu")
GIB = 2**30


def test_a_share_of_the_memory_is_divided_by_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "available_memory", lambda: 8 * GIB)
    bound = int(RESIDENT_SHARE * 8 * GIB)
    assert fits(bound, CPU) and not fits(bound + 1, CPU)
    assert fits(bound // 2, CPU, 2) and not fits(bound // 2 + 1, CPU, 2)


def test_on_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GIB, 16 * GIB))
    cuda = torch.device("cuda", 0)
    assert fits(4 * GIB, cuda) and not fits(4 * GIB + 1, cuda)
    assert not fits(4 * GIB, cuda, 2)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/\n", {"memory.max": "max\n"}, 8 * GIB),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        ("0::/not/seen/from/here\n", {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ("0::/\n", {"memory.max": f"{20 * GIB}\n"}, 8 * GIB),
        ("4:memory:/a\n3:cpu:/b\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n", "cpu/b/x": "1"}, GIB),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, 8 * GIB),
    ],
)
def test_the_lowest_limit_of_the_cgroups_bounds_what_is_free(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int
) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal:  16777216 kB\nMemFree:  100 kB\nMemAvailable:  8388608 kB\n")
    write(tmp_path / "proc/self/cgroup", cgroup)
    for name, content in limits.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert available_memory(tmp_path) == expected


def test_without_proc_all_memory_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > GIB // 4


def test_a_node_can_be_asked_for_its_memory_before_it_is_known_to_have_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import cedm_ray.diffusion.device_memory"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
