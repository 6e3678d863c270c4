"""What a reader may give the explorer to look at: prompts, rollouts, the folder of a run, or two of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..pairs import Pair
from ..prompts import known_answers, load_prompts
from ..rollouts import Rollouts
from ..runs import RunResult
from ..student_history import StudentHistory

Source = str | Sequence[str] | os.PathLike | RunResult | Rollouts | Mapping[str, str | os.PathLike | RunResult]


def resolve_source(pair: Pair, source: Source) -> tuple[list[StudentHistory], list[str], Rollouts | None]:
    """Students, prompts and rollouts that a source stands for.

    Raises:
        InputError: it stands for nothing, or a folder holds no run.
    """
    if not isinstance(pair, Pair):
        raise InputError(f"The first argument must be a pair (see tgpo_lab.load_pair), but is {type(pair).__name__}.")
    if isinstance(source, Rollouts):
        return [StudentHistory.of_pair(pair)], [], source
    if isinstance(source, Mapping):
        if not 1 <= len(source) <= 2:
            raise InputError(f"The explorer shows one run or two side by side, not {len(source)}.")
        return [StudentHistory.of_run(_folder(run), label) for label, run in source.items()], [], None
    if isinstance(source, (os.PathLike, RunResult)):
        return [StudentHistory.of_run(_folder(source))], [], None
    if isinstance(source, str):
        if _is_folder(source):
            return [StudentHistory.of_run(source)], [], None
        source = [source]
    if isinstance(source, Sequence) and source and all(isinstance(prompt, str) for prompt in source):
        return [StudentHistory.of_pair(pair)], list(source), None
    raise InputError(
        "There is nothing to look at: expected a prompt, a list of prompts, rollouts, the folder of a run, or "
        f"label → folder for two runs, but got {type(source).__name__}."
    )


def _folder(run: str | os.PathLike | RunResult) -> Path:
    return run.directory if isinstance(run, RunResult) else Path(run)


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except (OSError, ValueError):  # a prompt may be no possible path
        return False


def answers_of(pair: Pair, history: StudentHistory) -> dict[str, str]:
    """Prompt → answer, of the run's data or of the pair's own; empty without any."""
    config = history.config
    if config is not None and config.dataset:
        return known_answers(load_prompts(config.dataset, config.prompt_column, config.answer_column))
    return known_answers(load_prompts(pair.prompts)) if pair.prompts is not None else {}
