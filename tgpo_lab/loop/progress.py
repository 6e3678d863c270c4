"""Live progress of a training run: a bar with the latest measurements and the time left."""

from __future__ import annotations

from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Context with a progress bar; on a stream that is no terminal, one line every tenth of the run."""

    def __init__(self, title: str, first_step: int, steps: int, show: bool):
        self._console = Console()
        self._steps, self._show = steps, show
        self._live = show and (self._console.is_terminal or self._console.is_jupyter)
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(title, total=steps, completed=first_step, state="")
        self._accuracy = float("nan")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the measurements of the step just made."""
        self._accuracy = row.get("accuracy", self._accuracy)
        state = (
            f"reward {row['reward']:.2f}  accuracy {self._accuracy:.2f}  length {row['length']:.0f}  "
            f"gradient {row['gradient_norm']:.2g}"
        )
        self._progress.update(self._task, completed=step, state=state)
        if self._show and not self._live and (step % max(1, self._steps // 10) == 0 or step == self._steps):
            with suppress(BrokenPipeError):  # a run does not end because nobody reads on
                print(f"{self._title}  step {step}/{self._steps}  {state}", flush=True)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._show:
            self._console.print(text, soft_wrap=True)
