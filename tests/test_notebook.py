"""docs/notebook.md, run as a notebook: its cells in their order, in a kernel, on a Ray that runs already."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from cedm_ray.report.read_run import read_run

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SMALL = (
    "--temi.epochs=8 --temi.warmup-epochs=1 --bound.c-start=150 --bound.precision=2 --bound.low-heads=2 "
    "--bound.low-spread=0.6 --granularity.rule=fitted --granularity.num-trials=2 --granularity.share=0.2 "
    "--granularity.total-kimg=4 --granularity.grace-kimg=2 --granularity.startup-trials=2 --score.num-images=200 "
    "--score.num-steps=4 --score.num-sets=2 --final.total-kimg=5 --final.num-images=150 --final.num-sets=2"
)
PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"


def cells() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    flags = ", ".join(map(repr, SMALL.split()))
    assert '"runs"]' in found[0] and 'ray.init("auto")' in found[0]
    small = found[0].replace('"runs"]', f'"runs", {flags}]')
    small = small.replace('ray.init("auto")', 'ray.init("local", num_cpus=2)')
    return [small, *found[1:], "ray.is_initialized()"]


def test_the_page_runs_in_a_kernel_on_a_ray_that_runs_and_stays(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells()])
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    searched, table, figure, _, running = (cell.outputs for cell in notebook.cells)
    said = "".join(each.text for each in searched if each.output_type == "stream")
    assert "C_max is" in said and "Traceback" not in said
    (folder,) = (tmp_path / "runs").glob("digits-*")
    best = read_run(folder).best
    assert f"<td>{best}</td>" in table[-1].data["text/html"]
    assert len(figure[-1].data["image/png"]) > 20_000
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert running[-1].data["text/plain"] == "True"
