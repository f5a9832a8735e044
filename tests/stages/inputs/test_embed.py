import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cedm_ray.stages.inputs.embed import gather


def write(folder: Path, *files: list[int]) -> None:
    for number, index in enumerate(files):
        rows = [np.full(4, i, dtype=np.float32) for i in index]
        pd.DataFrame({"index": index, "embedding": rows}).to_parquet(folder / f"{number}.parquet")


def test_rows_in_any_order_and_file_end_up_at_their_index(tmp_path: Path) -> None:
    write(tmp_path, [4, 0, 2], [1, 3])
    gather(tmp_path, tmp_path / "out.npy", 5)
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32 and np.array_equal(found, np.repeat(np.arange(5.0), 4).reshape(5, 4))


@pytest.mark.parametrize(
    ("files", "said"),
    [([[0, 1]], "not whole: 2 of 3"), ([[0, 1, 1]], "twice"), ([[0, 1], [1, 2]], "twice"), ([], "not whole: 0 of 3")],
)
def test_a_missing_or_doubled_image_is_found(tmp_path: Path, files: list[list[int]], said: str) -> None:
    write(tmp_path, *files)
    with pytest.raises(RuntimeError, match=said):
        gather(tmp_path, tmp_path / "out.npy", 3)


@pytest.mark.slow
@pytest.mark.ray
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    script = Path(__file__).with_name("embed_growth.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    more = found["large"]["embeddings"] - found["small"]["embeddings"]
    assert more > 300 * 2**20  # what would have to lie somewhere if anything held the whole set
    assert found["large"]["peak"] - found["small"]["peak"] < 0.4 * more
    assert min(each["order"] for each in found.values()) > 0.999
