"""What a reader may give the explorer to look at: prompts, rollouts, the folder of a run, or two of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..explorer.exploration import Exploration
from ..explorer.student_history import StudentHistory
from ..models.pairs import Pair
from ..rollouts import Rollouts
from ..runs import RunResult
from ..tasks.prompts import known_answers, load_prompts

DEFAULT_LIMIT, DEFAULT_TEMPERATURE, DEFAULT_REWARD = 80, 1.0, "marked_answer"

Source = str | Sequence[str] | os.PathLike | RunResult | Rollouts | Mapping[str, str | os.PathLike | RunResult]


def explore(
    pair: Pair,
    source: Source,
    *,
    prompt: str | Sequence[str] | None = None,
    answer: str | Sequence[str | None] | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    reward: str | None = None,
    **options: object,
) -> Exploration:
    """What :class:`~tgpo_lab.widgets.GuidanceExplorer` looks at; its constructor explains the arguments.

    Whatever is not given is taken from the run; without a run it is a constant above.

    Raises:
        InputError: nothing to look at, no run there, or impossible numbers.
    """
    histories, prompts, rollouts = resolve_source(pair, source)
    if prompt is not None:
        if prompts or rollouts is not None:
            raise InputError("prompt= goes with the folder of a run; here the prompts are given already.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    known = answers_of(pair, histories[0])
    if not prompts and rollouts is None:
        if not known:
            raise InputError(f"{histories[0].label} has no prompts of its own. Give prompt=…")
        prompts = [next(iter(known))]
    if answer is None:
        answer = [known.get(text) for text in prompts or pair.tokenizer.batch_decode(rollouts.prompts)]
    config = histories[0].config
    if max_new_tokens is None:
        max_new_tokens = config.max_new_tokens if config else DEFAULT_LIMIT
    if temperature is None:
        temperature = config.temperature if config else DEFAULT_TEMPERATURE
    return Exploration(
        pair,
        histories,
        prompts,
        [answer] if isinstance(answer, str) else list(answer),
        rollouts=rollouts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        reward=reward or (config.reward if config else DEFAULT_REWARD),
        **options,
    )


def title_of(exploration: Exploration) -> str:
    """The runs and the first prompt, in one line."""
    runs = " and ".join(history.label for history in exploration.histories)
    first, *others = dict.fromkeys(exploration.prompts)
    more = f" and {len(others)} more prompts" if others else ""
    return f"{runs}: {first[:60]!r}{more}"


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
        return known_answers(load_prompts(config.dataset, **config.prompt_options))
    return known_answers(load_prompts(pair.prompts)) if pair.prompts is not None else {}
