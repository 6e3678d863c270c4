"""Bars that other libraries show: those of work that takes seconds are hidden, those of downloads stay until someone
asks for quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging


def hide_bars_of_weights() -> None:
    """In this process, transformers shows no bar while it puts weights into models or writes them."""
    shown = not hub.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's, too
    if shown:
        hub.enable_progress_bars()


def hide_bars_of_downloads() -> None:
    """In this process, nothing shows how far models and datasets have come from the hub."""
    datasets.disable_progress_bars()
    hub.disable_progress_bars()


@contextmanager
def no_bar_of_datasets() -> Iterator[None]:
    """Within it, ``datasets`` shows no bar, for a file that is here."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
