"""Where the small wandb and trackio of this folder write down what reaches them.

Tests put the folder on PYTHONPATH of a training and name a file in TRACKER_RECORD. accelerate takes a tracker for
installed when it finds the module and its metadata: hence the dist-info folders.
"""

from __future__ import annotations

import json
import os


def record(tracker: str, event: str, **values: object) -> None:
    """Append one JSON line: who was called, with what."""
    with open(os.environ["TRACKER_RECORD"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"tracker": tracker, "event": event, **values}) + "\n")
