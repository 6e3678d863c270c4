"""JupyterLab on the loopback and a headless Chromium that visits it. Only `make test-browser` comes here.

Everything that Jupyter writes goes to temporary folders. Screenshots are kept in runs/browser, to be looked at.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tgpo_lab.pairs import load_pair
from tgpo_lab.widgets import GuidanceExplorer

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "runs" / "browser"
CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PATIENCE = 60  # seconds; the machine may be busy
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
    """A page and what went wrong on it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    """Addresses beyond the loopback that something asked for."""

    def shot(self, name: str, **options) -> None:
        """Keep a screenshot."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", **options)


def watched(context: BrowserContext) -> Visit:
    """A new page whose console and requests are watched."""
    visit = Visit(context.new_page())
    visit.page.set_default_timeout(1000 * PATIENCE)

    def request(asked) -> None:
        address = urlparse(asked.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname != "127.0.0.1":
            visit.strangers.append(asked.url)

    visit.page.on("request", request)
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
def folder(tmp_path_factory) -> Path:
    """The notebooks' folder, with the notebook that the tests run."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = [SETUP, RUNS, HOSTILE, *PANELS, STATE]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "explore.ipynb")

    # A saved notebook without widget state, as GitHub or a new JupyterLab gets it.
    explorer = GuidanceExplorer(load_pair("far"), "91+47+11=", samples=2)
    explorer.take_token(0)
    data, _ = explorer._repr_mimebundle_()
    saved = nbformat.v4.new_code_cell("explorer", execution_count=1)
    saved.outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    nbformat.write(nbformat.v4.new_notebook(cells=[saved], metadata=notebook.metadata), folder / "saved.ipynb")
    return folder


@pytest.fixture(scope="session")
def lab(folder, tmp_path_factory) -> Iterator[str]:
    """Address of a JupyterLab."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path_factory.mktemp("jupyter")
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
               "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")  # fmt: skip
    environment = os.environ | {name: str(home / name.lower()) for name in folders}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Otherwise a question about news covers a corner of the page.
    settings = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
        f"--ServerApp.root_dir={folder}", "--ServerApp.disable_check_xsrf=True", "--LabApp.news_url=None",
        "--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = home / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2 * PATIENCE):
            if server.poll() is not None:
                pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="session")
def visit(browser, lab) -> Iterator[Visit]:
    """The notebook in JupyterLab, with all its cells run."""
    context = browser.new_context(viewport={"width": 1280, "height": 1100}, color_scheme="light")
    visit = watched(context)
    page = visit.page
    page.goto(f"{lab}/lab/tree/explore.ipynb?reset")
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
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
        visit.shot("lab-all-cells-run")
    yield visit
    context.close()
