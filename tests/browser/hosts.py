"""The notebook programs that run here for real: how each is started, and where it shows a notebook."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds; the machine may be busy
# Where a host shows a notebook; without "reset" JupyterLab would open what an earlier visit had open.
PAGES = {"lab": "lab/tree/{}?reset", "notebook7": "notebooks/{}"}
# A server for one visitor on the loopback: no password, no browser of its own.
ALONE = (
    "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
    "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
)  # fmt: skip
# What Jupyter reads and writes besides the notebooks.
FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
           "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")  # fmt: skip


def lab_command(folder: Path) -> list[str]:
    """What `make lab` runs, with this Python and on another folder than notebooks/."""
    asked = ["make", "--dry-run", "--old-file=.venv/.installed", "lab", f"VENV_PYTHON={sys.executable}"]
    printed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = next(line for line in printed.replace("\\\n", " ").splitlines() if "-m jupyterlab" in line)
    return [str(folder) if part == "notebooks" else part for part in shlex.split(line)]


def notebook7_command(folder: Path) -> list[str]:
    """Jupyter Notebook 7 as it comes."""
    return [sys.executable, "-m", "notebook", str(folder)]


COMMANDS = {"lab": lab_command, "notebook7": notebook7_command}


@contextmanager
def running(host: str, folder: Path, home: Path) -> Iterator[str]:
    """Address of a host that shows ``folder`` and keeps its own files in ``home``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {name: str(home / name.lower()) for name in FOLDERS}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = home / "log.txt"
    command = [*COMMANDS[host](folder), *ALONE, f"--port={port}"]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2 * PATIENCE):
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError(f"{host} did not answer within {PATIENCE} s:\n{log.read_text()[-2000:]}")
        if server.poll() is not None:
            raise RuntimeError(f"{host} did not start:\n{log.read_text()[-2000:]}")
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
