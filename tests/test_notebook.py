"""docs/notebook.md, run as a notebook: its cells in their order, in a kernel, on a Ray that runs already."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
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
    start, search, *rest = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    flags = ", ".join(map(repr, SMALL.split()))
    assert 'ray.init("auto")' in start and '"runs"]' in search
    small = search.replace('"runs"]', f'"runs", {flags}]')
    return [start.replace('ray.init("auto")', 'ray.init("local", num_cpus=2)'), small, *rest, "ray.is_initialized()"]


@pytest.fixture(autouse=True)
def descriptors_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pytest shows in the environment, a kernel leaves out what is written to the descriptors."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")


class Kernel:
    """A kernel whose cells are interrupted when they say something."""

    def __init__(self, folder: Path) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def run(self, cell: str, until: str = "\0") -> tuple[str, str]:
        """What a cell has printed, and the error that it ended with, if any."""
        said: list[str] = []

        def heard(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                said.append(message["content"]["text"])
                if until in said[-1]:
                    self.manager.interrupt_kernel()

        reply = self.client.execute_interactive(cell, output_hook=heard, timeout=300)["content"]
        return "".join(said), "" if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    found = Kernel(tmp_path)
    yield found
    found.client.stop_channels()
    found.manager.shutdown_kernel(now=True)


def test_an_interrupted_cell_goes_on_from_what_is_stored(kernel: Kernel) -> None:
    start, search, *_ = cells()
    kernel.run(start)
    first, error = kernel.run(search, until="C=150: ")
    assert error.startswith("KeyboardInterrupt") and "C_max is" not in first
    _, error = kernel.run(search)  # Ray was started in the kernel, and its dashboard was interrupted with it
    assert error.startswith("UserError: Ray's dashboard does not answer") and "ray.shutdown()" in error
    again, error = kernel.run(f"ray.shutdown()\n{search}", until="searching over C")
    assert error.startswith("KeyboardInterrupt") and "C_max is" in again and "embedding 1,797" in again
    (told,) = re.findall(r"  C=150: .*", first)
    assert told in again and "clustering into 150" not in again


def test_the_page_runs_in_a_kernel_on_a_ray_that_runs_and_stays(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells()])
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    _, searched, table, figure, _, running = (cell.outputs for cell in notebook.cells)
    assert {each.output_type for each in searched} == {"stream"}
    said = "".join(each.text for each in searched if each.name == "stdout")
    assert "C_max is" in said and "evaluating C=" in said and "\x1b" not in said
    noise = "".join(each.text for each in searched if each.name == "stderr").splitlines()
    assert all("ipywidgets" in line for line in noise)  # of Ray's import; the rest is in search.log
    (folder,) = (tmp_path / "runs").glob("digits-*")
    best = read_run(folder).best
    assert f"<td>{best}</td>" in table[-1].data["text/html"]
    assert len(figure[-1].data["image/png"]) > 20_000
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    assert running[-1].data["text/plain"] == "True"
