"""What made a result: command, versions, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime

import torch

PACKAGES = ("tgpo-lab", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def provenance(device: torch.device | None = None) -> dict[str, object]:
    """Command line, package versions, processor and threads, and the time, as plain values.

    Args:
        device: where it was computed; left out, on the GPU if there is one.
    """
    return {
        "command": command_line(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor_name() -> str:
    """What the CPU calls itself, as "AMD EPYC"; empty where that cannot be known."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # which the oldest PyTorch allowed may lack
    return str(capabilities.get("cpu_name") or platform.processor())


def _device_name(device: torch.device | None) -> str:
    if device is not None and device.type != "cuda":
        return device.type.upper()
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "CPU"


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
