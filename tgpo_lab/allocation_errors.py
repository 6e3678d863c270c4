"""Telling memory that ran out from other errors."""

from __future__ import annotations

import signal

import torch
from safetensors import SafetensorError

from .errors import RunError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out here: PyTorch has a type of its own for accelerators alone."""
    texts = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed", "bad_alloc")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RunError):  # a sentence of ours, which may quote what a server says of its own memory
        return False
    said = str(error).lower()
    return isinstance(error, (RuntimeError, OSError, SafetensorError)) and any(text in said for text in texts)


def is_killed_for_memory(status: int) -> bool:
    """Whether a process ended as Linux ends one when memory runs out: by SIGKILL, without a word.

    Args:
        status: of :mod:`subprocess`, negative for a signal.
    """
    return status == -signal.SIGKILL
