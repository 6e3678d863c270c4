"""Seconds of each phase of a step."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds since the last lap; on a GPU the work in flight is waited for."""

    def __init__(self, device: torch.device):
        self._device = device

    def start(self) -> None:
        """Begin the first lap."""
        self.lap_at = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds, self.lap_at = now - self.lap_at, now
        return seconds
