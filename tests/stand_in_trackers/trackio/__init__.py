"""A small Trackio: names and signatures of ``trackio`` as far as accelerate's TrackioTracker uses them.

As there, ``config`` is a plain dictionary that ``init`` replaces by the run's, and it goes out with the first row only:
without a row it never arrives. Names that Trackio keeps for itself are renamed (run.py).
"""

from __future__ import annotations

from typing import Any

from tracker_record import record

RESERVED_KEYS = ("project", "run", "timestamp", "step", "time", "metrics")
config: dict[str, Any] = {}


class Run:
    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self._config_sent = False

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        metrics = {f"__{name}" if name in RESERVED_KEYS else name: value for name, value in metrics.items()}
        if not self._config_sent:
            record("trackio", "config", values=self.config)
            self._config_sent = True
        record("trackio", "log", step=step, values=metrics)

    def finish(self) -> None:
        record("trackio", "finish")


def init(project: str, name: str | None = None, config: dict[str, Any] | None = None, resume: str = "never") -> Run:
    record("trackio", "init", project=project, name=name, resume=resume)
    run = Run()
    globals()["config"] = run.config
    return run
