import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cedm_ray.stages.training.streamed import StreamedImages

MIB = 2**20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    script = Path(__file__).with_name("streamed_run.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("streamed")],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_two_processes_that_hold_every_cpu_see_the_batches_of_resident_images(found: Any) -> None:
    assert found["free"] == 0
    assert len(found["alike"]) == 2
    for alike in found["alike"]:
        assert all(alike.values()), alike


@pytest.mark.ray
def test_memory_does_not_grow_with_the_set(found: Any) -> None:
    growth = found["growth"]
    assert growth["set"] > 580 * MIB
    assert growth["large"] - growth["small"] < 0.1 * growth["set"]


@pytest.mark.ray
def test_what_goes_wrong_reaches_the_training(found: Any) -> None:
    errors = found["errors"]
    assert errors["late"].startswith("UserError: no images have come from ") and " for 0.01 s; see " in errors["late"]
    assert "the disk is on fire" in errors["failing"]
    for name in ("mixed up", "too few"):
        assert errors[name].startswith("RuntimeError: images of ") and "in another order" in errors[name]


@pytest.mark.ray
def test_a_stream_that_is_closed_reads_no_more_and_leaves_no_threads(found: Any) -> None:
    before, after = found["stopped"]["reads"]
    assert 1 <= before < 20  # a chunk is 32 tasks
    assert after - before <= 2  # the tasks that were at it
    assert found["stopped"]["threads"] == []


def test_clusters_that_do_not_go_with_the_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((5, 1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"class_index has shape \(4,\), torch.int64; needed: \(5,\), int64"):
        StreamedImages(tmp_path / "images.npy", torch.zeros(4, dtype=torch.int64), torch.device("cpu"))


def test_the_processes_that_read_import_no_torch() -> None:
    program = "import sys, cedm_ray.stages.inputs.read_images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
