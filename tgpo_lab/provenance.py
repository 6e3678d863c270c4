"""What made a result: command, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime

import torch

PACKAGES = ("tgpo-lab", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def provenance() -> dict[str, object]:
    """Command line, package versions, processor and threads, and the time, as plain values."""
    return {
        "command": command_line(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that runs, as anyone would type it; of a path of this machine only the last part."""
    program = os.path.basename(sys.argv[0] or "python")
    words = ["tgpo-lab" if program == "__main__.py" else program, *sys.argv[1:]]
    return " ".join(os.path.basename(word) if os.path.isabs(word) else word for word in words)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
