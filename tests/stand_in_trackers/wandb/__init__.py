"""A small Weights & Biases: names and signatures of ``wandb`` as far as accelerate's WandBTracker uses them.

It fails where wandb would: ``config`` cannot be updated before ``init`` nor changed without ``allow_val_change``, a row
of an earlier step is dropped (core/internal/stream/handler.go), and a finished run takes no more rows.
"""

from __future__ import annotations

from typing import Any

from tracker_record import record


class Config:
    """The configuration of a run; as ``wandb.config`` before ``init`` it refuses all use."""

    def __init__(self, run: Run | None):
        self._run, self._items = run, {}

    def update(self, d: dict[str, Any], allow_val_change: bool | None = None) -> None:
        if self._run is None:
            raise RuntimeError("You must call wandb.init() before wandb.config.update")
        for key, value in d.items():
            if not allow_val_change and self._items.get(key, value) != value:
                raise RuntimeError(f'Attempted to change value of key "{key}"')
        self._items.update(d)
        record("wandb", "config", values=d)


class Run:
    def __init__(self) -> None:
        self.config, self._step, self._finished = Config(self), 0, False

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        if self._finished:
            raise RuntimeError("Run is finished. The call to `log` will be ignored.")
        step = self._step if step is None else step
        if step < self._step:
            return
        self._step = step
        record("wandb", "log", step=step, values=data)

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        self._finished = True
        record("wandb", "finish")


config = Config(None)


def init(
    entity: str | None = None,
    project: str | None = None,
    name: str | None = None,
    id: str | None = None,
    resume: bool | str | None = None,
) -> Run:
    global config
    record("wandb", "init", project=project, name=name, id=id, resume=resume)
    run = Run()
    config = run.config
    return run
