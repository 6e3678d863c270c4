"""Where the student's responses come from: an engine samples them with the student's weights of now.

``own`` is the loop's own cached sampling, in the student itself. ``vllm`` keeps a second copy of the student in vLLM,
whose weights are renewed before each step (:mod:`tgpo_lab.sampling.vllm_engine`). Both say under which
log-probabilities they drew, so the difference to those of the update is measured, and can be corrected
(:mod:`tgpo_lab.importance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedModel

from ..models.positions import position_settings
from ..parallel.placement import device_of
from ..parallel.sharding import whole_weights
from ..rollouts import Rollouts
from .cached_sampling import sample_responses
from .converted_weights import ConvertedWeights
from .decoding import require_cached_reading
from .fixed_shape_decoding import FixedShapeDecoder, require_known_layers

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..models.pairs import Pair
    from ..parallel.processes import Processes


class Engine(Protocol):
    """Samples responses."""

    device: torch.device
    """Where its rollouts are."""

    def load_weights(self) -> AbstractContextManager[None]:
        """Context in which it samples with the student's weights as they are on entry. All processes must enter it."""

    def sample(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        end_tokens: list[int],
        pad_token: int,
        *,
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        vocabulary_size: int | None = None,
        first: int = 0,
        of: int | None = None,
    ) -> Rollouts:
        """Sample responses; arguments and result as of :func:`tgpo_lab.sampling.cached_sampling.sample_responses`.

        ``Rollouts.logprobs`` are those under which the engine drew the tokens.
        """


class OwnEngine:
    """The loop's own sampling."""

    def __init__(self, model: PreTrainedModel, *, compile_decoding: bool = False, rows_at_once: int = 0):
        """Sample with a model.

        Args:
            model: the model itself, not a copy.
            rows_at_once: see :func:`tgpo_lab.sampling.cached_sampling.sample_responses`.
            compile_decoding: see :class:`tgpo_lab.sampling.fixed_shape_decoding.FixedShapeDecoder`.

        Raises:
            InputError: decoding cannot be compiled for this architecture.
        """
        self.device = device_of(model)
        self._model, self._rows_at_once = model, rows_at_once
        self._decoder = FixedShapeDecoder(model, compiled=True) if compile_decoding else None
        self._converted = ConvertedWeights(model) if compile_decoding else None

    @contextmanager
    def load_weights(self) -> Iterator[None]:
        """Sharded weights are gathered; for compiled decoding under autocast those of products are converted."""
        with whole_weights(self._model):
            if self._converted is None:
                yield
            else:
                with self._converted.renewed(self.device.type):
                    yield

    def sample(self, prompts: list[list[int]], *arguments: object, **options: object) -> Rollouts:
        """See :class:`Engine`."""
        return sample_responses(
            self._model, prompts, *arguments, decoder=self._decoder, rows_at_once=self._rows_at_once, **options
        )


def require_engine(config: TrainConfig, student: PreTrainedModel, device: torch.device) -> None:
    """Refuse a run's engine where it cannot sample from this student, before it is made.

    Args:
        config: the run.
        student: loaded.
        device: where it will be in the run.

    Raises:
        InputError: decoding cannot be compiled for its architecture, it does not go on from a cache, or vLLM cannot
            renew its weights.
    """
    if config.engine == "vllm":
        from .vllm_engine import require_renewable_weights

        require_renewable_weights(student, device)
    elif config.compile_decoding:
        require_known_layers(student)
    else:
        require_cached_reading(student, config.student)


def make_engine(config: TrainConfig, pair: Pair, prompts: list[str], processes: Processes) -> Engine:
    """The engine that a run asks for.

    Args:
        config: names it, with its options.
        pair: whose student samples.
        prompts: every prompt that it will be given: vLLM has to know the longest.
        processes: each has an engine of its own.

    Raises:
        InputError: it cannot work with this student or on this machine.
    """
    if config.engine == "own":
        return OwnEngine(pair.student, compile_decoding=config.compile_decoding, rows_at_once=config.sampling_rows)
    from .vllm_engine import VLLMEngine  # vLLM is an extra

    longest = max(len(tokens) for tokens in pair.encode(prompts))
    return VLLMEngine(
        pair.student,
        max_length=longest + config.max_new_tokens,
        precision=config.precision,
        memory_share=config.vllm_memory_share,
        sleep=config.vllm_sleep,
        several=processes.number > 1,
        overrides=position_settings(pair.student.config) if any(config.position_options.values()) else None,
        vocabulary_size=pair.vocabulary_size,
    )
