"""Where a run's teacher is: in this process, on any device or offloaded, or behind a server. One interface for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..config import TrainConfig
from ..models.pairs import Pair
from ..parallel.placement import device_of, offload
from ..parallel.processes import ALONE, Processes
from ..randomness import generator_for
from ..rollouts import Rollouts
from ..sampling.cached_sampling import sample_responses
from ..sampling.divided_sampling import sample_divided
from ..sampling.engine import OwnEngine
from ..teacher import TeacherAnswers, ask_teacher
from .server import ServerTeacher
from .trace_cache import TraceCache


class Teacher(Protocol):
    """Whoever answers for the teacher. What is given and what comes back is on the student's device."""

    gives_distributions: bool
    """Whether whole distributions can be had; without them the divergences of a step are not measured."""

    def ask(
        self,
        rollouts: Rollouts,
        *,
        micro_batch_tokens: int,
        keep_distribution: Tensor | None = None,
        top_k: int = 0,
        sampling_seed: int | None = None,
        rows: Tensor | None = None,
        states_only: bool = False,
    ) -> TeacherAnswers:
        """The teacher's answers at every prefix of rollouts; arguments as in :func:`tgpo_lab.teacher.ask_teacher`.

        Raises:
            InputError: this teacher cannot give what is asked for.
            RunError: it failed.
        """
        ...

    def write(self, prompts: list[list[int]], samples_per_prompt: int, step: int) -> Rollouts:
        """The teacher's own responses to prompts, groups together.

        Raises:
            InputError: this teacher cannot.
        """
        ...


class LocalTeacher:
    """A teacher whose weights are in this process."""

    gives_distributions = True

    def __init__(self, pair: Pair, config: TrainConfig, device: torch.device, processes: Processes = ALONE):
        """Take the teacher of a pair.

        Args:
            pair: loaded with its teacher where ``config`` wants it.
            config: the run.
            device: the student's.
            processes: over which the prompts that it writes to are divided.

        Raises:
            InputError: the folder for its responses cannot be used.
        """
        self._pair, self._config, self._device, self._processes = pair, config, device, processes
        self._limits = _limits(config, pair)
        self._cache = open_cache(config, pair)  # before the weights are offloaded: it may read them
        if config.teacher_offload:
            offload(pair.teacher, config.teacher_device or device)

    def ask(
        self,
        rollouts: Rollouts,
        *,
        micro_batch_tokens: int,
        keep_distribution: Tensor | None = None,
        top_k: int = 0,
        sampling_seed: int | None = None,
        rows: Tensor | None = None,
        states_only: bool = False,
    ) -> TeacherAnswers:
        """See :class:`Teacher`."""
        there = device_of(self._pair.teacher)
        answers = ask_teacher(
            self._pair.teacher,
            rollouts.to(there),
            vocabulary_size=self._pair.vocabulary_size,
            micro_batch_tokens=micro_batch_tokens,
            keep_distribution=None if keep_distribution is None else keep_distribution.to(there),
            top_k=top_k,
            sampling_seed=sampling_seed,
            rows=rows,
            states_only=states_only,
        )
        return answers.to(self._device)

    def write(self, prompts: list[list[int]], samples_per_prompt: int, step: int) -> Rollouts:
        """See :class:`Teacher`: drawn anew in each step, or with a cache once for each prompt."""
        if self._cache is None:
            written = sample_divided(
                self._processes,
                OwnEngine(self._pair.teacher, rows_at_once=self._config.sampling_rows),
                prompts,
                samples_per_prompt=samples_per_prompt,
                generator=generator_for(self._config.seed, "sampling", "teacher", step),
                **self._limits,
            )
        else:
            # Every process draws what is missing: one may see a file that another does not see yet.
            def draw(prompts: list[list[int]], uniform: Tensor) -> Rollouts:
                return sample_responses(
                    self._pair.teacher, prompts, samples_per_prompt=samples_per_prompt, uniform=uniform,
                    rows_at_once=self._config.sampling_rows, **self._limits,
                )  # fmt: skip

            written = self._cache.responses(prompts, samples_per_prompt, draw)
        return written.to(self._device)


def open_cache(config: TrainConfig, pair: Pair, *, keep: bool = True) -> TraceCache | None:
    """Where a run keeps its teacher's responses; None if it keeps none.

    Args:
        config: the run.
        pair: loaded.
        keep: see :class:`tgpo_lab.teachers.trace_cache.TraceCache`.

    Raises:
        InputError: the folder cannot be used, or nothing tells this teacher from others.
    """
    if config.teacher_cache is None:
        return None
    return TraceCache(Path(config.teacher_cache), pair.teacher, seed=config.seed, keep=keep, **_limits(config, pair))


def _limits(config: TrainConfig, pair: Pair) -> dict[str, object]:
    """What ends the teacher's responses."""
    return {"max_new_tokens": config.max_new_tokens, "end_tokens": pair.end_tokens, "pad_token": pair.pad_token,
            "vocabulary_size": pair.vocabulary_size}  # fmt: skip


def open_teacher(
    config: TrainConfig, pair: Pair, prompts: Sequence[str], device: torch.device, processes: Processes = ALONE
) -> Teacher:
    """The teacher that a configuration asks for.

    Args:
        config: the run.
        pair: loaded with its teacher where ``config`` wants it.
        prompts: those that it will be asked about.
        device: the student's.
        processes: of the run.

    Raises:
        InputError: the server cannot answer for this run, or the cache cannot be used.
    """
    if config.teacher_server is None:
        return LocalTeacher(pair, config, device, processes)
    server = server_of(config, pair)
    server.check(longest_sequence(config, pair, prompts), config.method.top_k)
    return server


def server_of(config: TrainConfig, pair: Pair) -> ServerTeacher:
    """The server that a configuration names, not asked for anything yet."""
    return ServerTeacher(
        config.teacher_server,
        vocabulary_size=pair.vocabulary_size,
        teacher_rows=pair.teacher.get_output_embeddings().weight.shape[0],
        model=config.teacher_server_model,
        requests=config.teacher_server_requests,
        timeout=config.teacher_server_timeout,
        retries=config.teacher_server_retries,
    )


def longest_sequence(config: TrainConfig, pair: Pair, prompts: Sequence[str]) -> int:
    """Tokens of the longest prompt with the longest response."""
    return max(map(len, pair.encode(list(prompts)))) + config.max_new_tokens
