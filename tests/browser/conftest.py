"""Jupyter on the loopback and a headless Chromium that visits it. Only `make test-browser` comes here.

Everything that Jupyter writes goes to temporary folders. Screenshots are kept in runs/browser, to be looked at.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tgpo_lab.models.pairs import load_pair
from tgpo_lab.widgets import GuidanceExplorer

from .hosts import PAGES, PATIENCE, ROOT, running

SHOTS = ROOT / "runs" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
expect.set_options(timeout=1000 * PATIENCE)

SETUP = """
import tgpo_lab
from tgpo_lab.widgets import GuidanceExplorer, kl_panel, softmax_panel, schedule_panel

pair = tgpo_lab.load_pair("far")
explorer = GuidanceExplorer(pair, "91+47+11=", seed=0)
explorer
"""
RUNS = """
config = tgpo_lab.TrainConfig.preset(
    "tiny", "tgpo", student="far", steps=4, prompts_per_step=2, group_size=4, evaluate_every=0, evaluation_prompts=2,
    gradient_terms_every=0, checkpoint_every=1, keep_checkpoints=0, learning_rate=3e-3, output="run",
)
result = tgpo_lab.train(config, show_progress=False)
steps = GuidanceExplorer(pair, {"first": "run", "second": "run"}, samples=4)
steps
"""
HOSTILE = """
hostile = GuidanceExplorer(pair, "91+47+11=", samples=2)
bad = "<script>window.hacked=1</script></div><img src=x onerror=window.hacked=1>"
entry = hostile.scene["responses"][0]
texts = {**hostile.scene["texts"], str(entry["tokens"][0]): bad, str(entry["best"][0]): bad}
hostile.scene = {**hostile.scene, "texts": texts}
hostile
"""
PANELS = ["kl_panel()", "softmax_panel()", 'schedule_panel("run")']
STATE = """
print("branches", [(b.name, b.branch.position, b.reward, b.right_continuations) for b in explorer.branches])
print("selected", explorer.selected_frame()["token"].tolist())
print("saved", explorer.save_html("saved.html"))
"""


@dataclass
class Visit:
    """A page, what it asked for and what went wrong on it."""

    page: Page
    host: str = ""
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Every address that the page asked for."""

    @property
    def strangers(self) -> list[str]:
        """Addresses beyond the loopback among them."""
        found = [urlparse(url) for url in self.asked]
        return [a.geturl() for a in found if a.scheme in ("http", "https", "ws", "wss") and a.hostname != "127.0.0.1"]

    def cell(self, number: int) -> Locator:
        """A code cell, scrolled into sight."""
        found = self.page.locator(".jp-CodeCell").nth(number)
        found.scroll_into_view_if_needed()
        return found

    def shot(self, name: str, **options) -> None:
        """Keep a screenshot."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        name = "-".join(filter(None, [self.host, name]))
        self.page.screenshot(path=SHOTS / f"{name}.png", **options)


def watched(context: BrowserContext, host: str = "") -> Visit:
    """A new page whose console and requests are watched."""
    visit = Visit(context.new_page(), host)
    visit.page.set_default_timeout(1000 * PATIENCE)
    visit.page.on("request", lambda asked: visit.asked.append(asked.url))
    visit.page.on("console", lambda line: visit.errors.append(line.text) if line.type == "error" else None)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    return visit


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("There is no Chromium: install it, or set CHROMIUM to its path.")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update"]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="session")
def explored() -> GuidanceExplorer:
    """An explorer with a branch, as a notebook leaves it."""
    explorer = GuidanceExplorer(load_pair("far"), "91+47+11=", samples=2)
    explorer.take_token(0)
    return explorer


@pytest.fixture(scope="session", params=list(PAGES))
def host(request) -> str:
    """Name of a host that runs for real."""
    return request.param


@pytest.fixture(scope="session")
def folder(host, explored, tmp_path_factory) -> Path:
    """The notebooks' folder, with the notebook that the tests run."""
    folder = tmp_path_factory.mktemp(f"notebooks-{host}")
    cells = [SETUP, RUNS, HOSTILE, *PANELS, STATE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "explore.ipynb")

    # A saved notebook without widget state, as GitHub or a new Jupyter gets it.
    data, _ = explored._repr_mimebundle_()
    saved = nbformat.v4.new_code_cell("explorer", execution_count=1)
    saved.outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    nbformat.write(nbformat.v4.new_notebook(cells=[saved], metadata=notebook.metadata), folder / "saved.ipynb")
    return folder


@pytest.fixture(scope="session")
def address(host, folder, tmp_path_factory) -> Iterator[str]:
    """Where the host is found."""
    with running(host, folder, tmp_path_factory.mktemp(f"home-{host}")) as found:
        yield found


def wait_for_kernel(page: Page, address: str) -> None:
    """Until a kernel is idle and connected: before, JupyterLab would ask for one."""
    for _ in range(2 * PATIENCE):
        sessions = page.request.get(f"{address}/api/sessions").json()
        if any(s["kernel"]["execution_state"] == "idle" and s["kernel"]["connections"] for s in sessions):
            return
        page.wait_for_timeout(500)
    pytest.fail(f"No kernel was ready within {PATIENCE} s.")


@pytest.fixture(scope="session")
def visit(browser, host, address) -> Iterator[Visit]:
    """The notebook in the host, with all its cells run."""
    context = browser.new_context(viewport={"width": 1280, "height": 1100}, color_scheme="light")
    visit = watched(context, host)
    page = visit.page
    page.goto(f"{address}/{PAGES[host].format('explore.ipynb')}")
    page.locator(".jp-CodeCell").first.wait_for()
    wait_for_kernel(page, address)
    first, last = (getattr(page.locator(".jp-CodeCell"), end).locator(".jp-InputPrompt") for end in ("first", "last"))
    try:
        for _ in range(5):
            # What is asked for in the moment in which the kernel connects can be lost.
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            page.wait_for_timeout(4000)
            if first.inner_text().strip() != "[ ]:":
                break
        expect(last).to_contain_text(f"[{3 + len(PANELS) + 1}]", timeout=4000 * PATIENCE)
    finally:
        visit.shot("all-cells-run")
    yield visit
    context.close()
