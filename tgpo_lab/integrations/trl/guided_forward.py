"""The student's log-probabilities of the teacher's tokens, from the forward pass that TRL makes anyway.

TRL's model returns no logits: its fused head (``add_fused_lm_head``) projects hidden states tile by tile and gives the
log-probability of one label at each position. So the labels are put before it twice, as the completion has them and as
the teacher has them, and so are the hidden states: the layers run once, the projection once for each label. It all
happens inside the wrapped model's own forward, and what comes out is part of its output, as DDP, FSDP and DeepSpeed
need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

IGNORED = -100  # of labels: TRL's head gives 0 there


class GuidedForward:
    """What :meth:`GRPOTrainer._compute_loss` takes for the model: it is called once, as the model is there."""

    def __init__(self, model: nn.Module, backbone: nn.Module, teacher_tokens: Tensor):
        """Take the place of a model for one micro-batch.

        Args:
            model: as the launcher wrapped it.
            backbone: the part of it that gives the hidden states.
            teacher_tokens: (B, T, K) int64, the tokens whose log-probabilities are wanted at each position.
        """
        self._model, self._backbone, self._teacher_tokens = model, backbone, teacher_tokens

    def __call__(self, *, labels: Tensor, **inputs: object) -> ModelOutput:
        """The model's output for its own ``labels`` (B, P + T), the completion in the last T columns.

        Afterwards ``logprobs`` (B, T, K) holds log πθ of the teacher's tokens, with gradient, and ``most_probable``
        (B, T, K) bool whether the student, too, would most probably write them.
        """
        rows, steps, count = self._teacher_tokens.shape
        theirs = labels.new_full((count, *labels.shape), IGNORED)
        written = labels[:, -steps:] != IGNORED
        theirs[..., -steps:] = torch.where(written, self._teacher_tokens.permute(2, 0, 1), IGNORED)
        with self._repeated_hidden_states(1 + count):
            output = self._model(**inputs, labels=torch.cat([labels, theirs.flatten(0, 1)]))

        def of_the_teacher(values: Tensor) -> Tensor:
            return values[rows:, -steps:].unflatten(0, (count, rows)).permute(1, 2, 0)

        self.logprobs, self.most_probable = of_the_teacher(output.log_probs), of_the_teacher(output.is_top1)
        output.log_probs, output.entropy = output.log_probs[:rows], output.entropy[:rows]
        return output

    @contextmanager
    def _repeated_hidden_states(self, times: int) -> Iterator[None]:
        def repeat(module: nn.Module, inputs: tuple, output: ModelOutput) -> ModelOutput:
            output.last_hidden_state = output.last_hidden_state.repeat(times, 1, 1)
            return output

        hook = self._backbone.register_forward_hook(repeat)
        try:
            yield
        finally:
            hook.remove()
