"""What a person sees: Chromium opens a real MLflow server on a finished search of the digits.

``CEDM_RAY_UI_RUNS`` names a storage folder with one finished search, to be looked at instead of a small one that is
made now; ``CEDM_RAY_SCREENSHOTS`` a folder for pictures of the pages.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow.tracking import MlflowClient

from cedm_ray.stages.storage.paths import database_uri
from cedm_ray.stages.tracking import links
from helpers.ports import free_port

selenium = pytest.importorskip("selenium", reason="selenium drives the browser; pip install selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]
WAIT_S = 90
SMALL = [
    "--temi.epochs=8", "--temi.warmup-epochs=1", "--bound.c-start=150", "--bound.precision=2.0",
    "--granularity.rule=none", "--granularity.num-trials=3", "--granularity.share=0.3", "--granularity.total-kimg=4",
    "--granularity.grace-kimg=2", "--granularity.startup-trials=2", "--score.num-images=200", "--score.num-steps=4",
    "--final.total-kimg=5", "--final.num-images=150", "--final.num-sets=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None or shutil.which("chromedriver") is None:
        pytest.skip("no Chromium with its chromedriver on the path (Debian: apt-get install chromium chromium-driver)")
    return found


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Path:
    given = os.environ.get("CEDM_RAY_UI_RUNS")
    if given:
        return Path(given).absolute()
    storage = tmp_path_factory.mktemp("ui") / "runs"
    command = [sys.executable, "-m", "cedm_ray.search", "--dataset", "digits", "--storage-path", str(storage), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return storage


@pytest.fixture(scope="module")
def result(storage: Path) -> dict[str, Any]:
    (file,) = storage.glob("digits-*/result.json")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server(storage: Path) -> Iterator[str]:
    """The server that the search's own output says to start, on another port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(storage / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", database_uri(storage)],
            stdout=log, stderr=log, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None, (storage / "server.log").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


class Browser:
    """Chromium with a window of 1600 x 1000, in which MLflow's first-run panels are closed."""

    def __init__(self, chromium: str, root: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "use-angle=swiftshader", "hide-scrollbars",
                 "enable-unsafe-swiftshader", "window-size=1600,1000")  # fmt: skip
        for flag in flags:
            options.add_argument(f"--{flag}")
        self.driver, self._root = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))), root
        inner = self.driver.execute_script("return window.innerHeight")
        self.driver.set_window_size(1600, 2000 - inner)
        self.driver.set_page_load_timeout(WAIT_S)
        self.driver.get(root)
        self.script("localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true'")
        self.script("localStorage['mlflow.assistant.panelOpen_v1'] = 'false'")

    def script(self, code: str, *given: Any) -> Any:
        return self.driver.execute_script(code, *given)

    def open(self, address: str) -> None:
        """Open an address as :mod:`cedm_ray.stages.tracking.links` writes it, in a fresh page."""
        self.driver.get("about:blank")
        self.driver.get(address if address.startswith("http") else self._root + address)

    def wait(self, ready: Callable[[], Any], what: str) -> Any:
        return WebDriverWait(self.driver, WAIT_S, ignored_exceptions=[Exception]).until(lambda _: ready(), what)

    def text(self, text: str) -> Any:
        """The element with this text, once it is there."""
        quoted = f"contains(normalize-space(text()), '{text}')"
        return self.wait(lambda: self.driver.find_element(By.XPATH, f"//*[{quoted}]"), f"no text {text!r}")

    def click(self, text: str) -> None:
        self.script("arguments[0].scrollIntoView({block: 'center'})", element := self.text(text))
        element.click()

    def links(self) -> dict[str, str]:
        """The addresses on the page by their texts."""
        found = self.script("return [...document.querySelectorAll('a')].map(a => [a.innerText.trim(), a.href])")
        return dict(found)

    def points(self) -> list[list[tuple[float, float]]]:
        """The points of every scatter plot on the page, ascending in x."""
        plots = self.script(
            "return [...document.querySelectorAll('.js-plotly-plot')].map(p => p.data)"
            ".map(d => d.filter(t => /scatter/.test(t.type) && /markers/.test(t.mode)).map(t => [[...t.x], [...t.y]]))"
        )
        return [sorted((float(x), float(y)) for xs, ys in plot for x, y in zip(xs, ys, strict=True)) for plot in plots]

    def settle(self, pictures: str) -> None:
        """Wait until the pictures that a selector finds are loaded."""
        loaded = f"const all = [...document.querySelectorAll({json.dumps(pictures)})];"
        loaded += "return all.length > 0 && all.every(i => i.complete && i.naturalWidth > 0)"
        self.wait(lambda: self.script(loaded), f"pictures {pictures} are not shown")

    def shoot(self, name: str) -> None:
        """A picture of the window for the documentation, without the tool bars that Plotly shows to touch screens."""
        folder = os.environ.get("CEDM_RAY_SCREENSHOTS")
        if folder:
            style = "const s = document.createElement('style'); s.textContent = '.modebar{display:none!important}';"
            self.script(style + "document.head.append(s)")
            time.sleep(2)
            self.driver.save_screenshot(str(Path(folder) / f"mlflow_{name}.png"))


@pytest.fixture(scope="module")
def browser(chromium: str, server: str) -> Iterator[Browser]:
    found = Browser(chromium, server)
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def story(browser: Browser, result: dict[str, Any]) -> dict[str, str]:
    """The search's page is open; returns the links on it."""
    browser.open("#" + result["page"].split("#")[1])
    browser.click("Show more")
    return browser.links()


def scores_of(result: dict[str, Any], *groupings: str) -> list[tuple[float, float]]:
    """C and score at the budget, from the result's file."""
    trials = [trial for trial in result["trials"] if not groupings or trial["grouping"] in groupings]
    kimg = result["total_kimg"]
    return sorted((t["num_clusters"], r["score"]) for t in trials for r in t["rungs"] if r["kimg"] == kimg)


def compared_name(result: dict[str, Any]) -> str:
    return f"{result['total_kimg']}_kimg/{result['metric']}_{result['num_images']}"


def test_the_search_tells_its_story_on_its_own_page(
    browser: Browser, story: dict[str, str], result: dict[str, Any], storage: Path
) -> None:
    assert browser.text(f"C = {result['best']} is the best of the")
    browser.settle("img[src*='get-artifact']")
    sources = browser.script("return [...document.querySelectorAll('img[src*=get-artifact]')].map(i => i.src)")
    assert any("score_by_clusters.png" in source for source in sources)
    client = MlflowClient(tracking_uri=database_uri(storage))
    for trial in result["trials"]:
        run_id = story[trial["label"]].split("/runs/")[1].split("?")[0]
        assert client.get_run(run_id).info.run_name == trial["label"]
    browser.shoot("search")


def test_a_training_says_what_it_is_and_leads_back(
    browser: Browser, story: dict[str, str], result: dict[str, Any]
) -> None:
    browser.open(story[f"C={result['best']}"])
    browser.text("A training of the search")
    browser.settle("img[src*='get-artifact']")
    assert browser.links()[result["name"]].split("?")[0].endswith(f"/runs/{result['run_id']}")


def test_all_trainings_are_selected_and_compared_score_against_c(
    browser: Browser, story: dict[str, str], result: dict[str, Any]
) -> None:
    browser.open(story["table"])
    browser.text("unconditional")
    names = browser.script("return [...document.querySelectorAll('.ag-row a')].map(a => a.innerText)")
    wanted = [t["label"] for t in sorted(result["trials"], key=lambda t: t["num_clusters"])]
    assert list(dict.fromkeys(name for name in names if name in wanted)) == wanted
    everything = browser.driver.find_element(By.CSS_SELECTOR, "input[aria-label='Select all runs']")
    browser.script("arguments[0].click()", everything)
    browser.click("Compare")
    browser.text(f"Comparing {len(wanted)} Runs")
    browser.click("Scatter Plot")
    axes = "return [...document.querySelectorAll('select, [id$=axis-selector]')].map(s => s.value || s.innerText)"
    browser.wait(lambda: f"metric-{compared_name(result)}" in str(browser.script(axes)), "other axes were chosen")
    browser.wait(lambda: scores_of(result) in browser.points(), "the points are not the result's")


def test_the_page_leads_to_a_comparison_of_the_numbers_of_clusters_alone(
    browser: Browser, story: dict[str, str], result: dict[str, Any]
) -> None:
    browser.open(story["parallel coordinates and scatter plots"])
    own = scores_of(result, result["grouping"])
    browser.text("Comparing ")
    browser.click("Scatter Plot")
    browser.wait(lambda: own in browser.points(), "the points are not the result's")
    browser.shoot("compare")


def test_the_charts_show_score_and_r_c_against_c_and_parallel_coordinates(
    browser: Browser, story: dict[str, str], result: dict[str, Any]
) -> None:
    browser.open(story["charts"])
    browser.text(f"C vs. {compared_name(result)}")
    browser.text("Parallel Coordinates")
    browser.wait(lambda: scores_of(result) in browser.points(), "the points are not the result's")
    axes = "return document.querySelectorAll('g.dimension').length"  # C, r_C and the score
    browser.wait(lambda: browser.script(axes) == 3, "the parallel coordinates have other axes")
    browser.shoot("charts")


def test_figures_and_the_model_are_among_the_artifacts(
    browser: Browser, story: dict[str, str], result: dict[str, Any]
) -> None:
    names = {"1": result["run_id"]}
    shown = links.filled(links.artifacts("1", "score_by_clusters.png"), "1", names.get)
    browser.open(shown)
    browser.text("score_by_clusters.png")
    browser.wait(lambda: browser.script("return [...document.images].some(i => i.naturalWidth > 900)"), "no figure")
    browser.script(  # the folder of whoever takes the picture is nobody's business
        "[...document.querySelectorAll('*')].filter(e => !e.children.length || e.innerText?.startsWith('Path:'))"
        ".filter(e => e.innerText?.startsWith('Path:')).forEach(e => { e.style.visibility = 'hidden' })"
    )
    browser.shoot("artifact")
    browser.open(story["export"])
    for file in ("model.json", ".safetensors"):
        browser.text(file)
