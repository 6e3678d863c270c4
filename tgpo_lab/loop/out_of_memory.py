"""When the memory runs out: micro-batches are halved, twice at most, because a split changes nothing but rounding."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..allocation_errors import is_out_of_memory
from ..config import TrainConfig
from ..errors import RunError
from ..micro_batches import padded_tokens
from ..parallel.processes import Processes
from ..rollouts import Rollouts

Result = TypeVar("Result")
HALVINGS = 2


class OutOfMemoryError(RunError):
    """The memory of the processor or accelerator ran out; the message says what to lower."""


class MicroBatchTokens:
    """The limit of tokens in a micro-batch, lowered for the rest of a run where memory ran out."""

    def __init__(self, tokens: int, processes: Processes):
        self.tokens, self._processes = tokens, processes
        self._halvings = 0

    def fit(self, rollouts: Rollouts, work: Callable[[int], Result]) -> Result:
        """Do ``work`` under the limit, and again from its beginning under half of it where memory runs out.

        Args:
            rollouts: those of this process; half of the limit means nothing where they do not fill it.
            work: gets the limit; it must not communicate with other processes, since all of them start again where one
                ran out.

        Raises:
            OutOfMemoryError: it was halved twice already. Under FSDP, where the passes themselves communicate, at once.
        """
        while True:
            reason, result = "", None
            try:
                result = work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = _first_line(error)  # and nothing of the error itself: its frames hold tensors
            if reason and self._processes.sharded:
                raise self._too_large(reason)
            if not self._processes.any(bool(reason)):
                return result
            filled = min(self.tokens, self._processes.largest(padded_tokens(rollouts)))
            if self._halvings == HALVINGS or filled < 2:
                raise self._too_large(reason or "in another process")
            self.tokens, self._halvings = filled // 2, self._halvings + 1
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self._processes.is_first:
                print(
                    f"tgpo-lab: out of memory ({reason or 'in another process'}). Going on with micro-batches of "
                    f"{self.tokens} tokens: set micro_batch_tokens to that.",
                    file=sys.stderr,
                )

    def _too_large(self, reason: str) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"Out of memory in micro-batches of {self.tokens} tokens ({reason}). Lower micro_batch_tokens, or where it "
            "is below the longest sequence max_new_tokens; or set gradient_checkpointing, or precision to bfloat16."
        )


def elsewhere(error: BaseException, config: TrainConfig) -> OutOfMemoryError:
    """The sentence for memory that ran out where there are no micro-batches: sampling, or the optimiser's moments.

    Args:
        error: what was raised.
        config: the run; its engine decides what helps.
    """
    changes = []
    if config.engine == "vllm":
        changes.append(
            f"lower vllm_memory_share ({config.vllm_memory_share:g}), the part of the memory that vLLM takes"
        )
        if not config.vllm_sleep:
            changes.append("set vllm_sleep, so that it gives that part back while the student learns")
    if config.compile_decoding:
        changes.append("set compile_decoding to false, whose buffers stay all the time")
    if config.engine == "own" or config.traces_per_prompt:  # the teacher's responses never come from vLLM
        whose = "of the teacher's " if config.engine == "vllm" else ""
        changes.append(f"let fewer {whose}responses be written at once (sampling_rows)")
    needs = "which decide what sampling needs" if config.engine == "own" else "which decide how large a step is"
    changes.append(f"lower prompts_per_step, group_size or max_new_tokens, {needs}")
    advice = "; or ".join(changes)
    return OutOfMemoryError(
        f"Out of memory ({_first_line(error)}). {advice[0].upper()}{advice[1:]}. tgpo-lab doctor estimates what a run "
        "takes."
    )


@contextmanager
def told_while_loading() -> Iterator[None]:
    """Within it, memory that runs out is one sentence about loading.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except Exception as error:  # a file that cannot be mapped has an exception of its own
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"Out of memory while student and teacher were loaded ({_first_line(error)}). Set precision to bfloat16 or "
            "lora_rank, or take the teacher's weights elsewhere: teacher_device, teacher_offload or teacher_server; "
            "tgpo-lab doctor estimates what they take."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:160]
