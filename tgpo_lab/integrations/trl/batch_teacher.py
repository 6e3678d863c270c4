"""The teacher of a TGPOTrainer: checked against the student, and asked about a batch of TRL's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ...errors import InputError
from ...guidance import apply_gate
from ...methods.tgpo import TGPO
from ...models.pairs import check_vocabulary, load_model, load_tokenizer
from ...models.shared_vocabulary import share_vocabulary
from ...randomness import derived_seed
from ...rollouts import Rollouts
from ...teacher import TeacherAnswers, ask_teacher


def load_teacher(
    teacher: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, object]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher's model, frozen and in evaluation mode, and its tokenizer.

    Args:
        teacher: a model, or the folder or hub name of one.
        tokenizer: the teacher's; None for the one that stands beside the model.
        options: arguments of ``from_pretrained``.

    Raises:
        InputError: nothing there, no such model, or one that does not say where its tokenizer is.
    """
    if isinstance(teacher, PreTrainedModel):
        name = teacher.config._name_or_path
        if tokenizer is None and not name:
            raise InputError(
                "The teacher is a model without a name, so its tokenizer cannot be found: give it as "
                "teacher_processing_class."
            )
    elif isinstance(teacher, str | Path):
        name = str(teacher)
        options = {"dtype": "auto", **options}
        options.pop("trust_remote_code", None)  # refused if true
        dtype = options.pop("dtype")
        teacher = load_model(name, dtype, None, **options)  # the launcher decides where it goes
    else:
        raise InputError(
            "teacher_model must be a causal language model of transformers, or its folder or hub name, but is a "
            f"{type(teacher).__name__}. Merge adapters first (merge_and_unload)."
        )
    return teacher.eval().requires_grad_(False), tokenizer or load_tokenizer(name)


def shared_tokens(
    student: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> int:
    """V: ids from this one on are padded rows of a matrix, or tokens that only one of the two has.

    Raises:
        InputError: the tokenizers differ, or a model does not fit its own.
    """
    names = [model.config._name_or_path or role for model, role in ((student, "the student"), (teacher, "the teacher"))]
    shared = share_vocabulary(student_tokenizer, teacher_tokenizer, *names)
    if not is_deepspeed_zero3_enabled():  # there no process has all of the weights yet
        check_vocabulary(student, student_tokenizer, shared.size, names[0])
        check_vocabulary(teacher, teacher_tokenizer, shared.size, names[1])
    return shared.size


def answer_in_forward(teacher: PreTrainedModel) -> None:
    """Make ``teacher(rollouts=…, …)`` give :func:`tgpo_lab.teacher.ask_teacher`'s answers, in one pass over all rows.

    FSDP and DeepSpeed bring the weights together around a model's own forward, so the question has to be put there.
    """
    usual = teacher.forward

    def forward(self: PreTrainedModel, *inputs, rollouts: Rollouts | None = None, **options):
        if rollouts is None:
            return usual(*inputs, **options)
        with _whole_head(self):
            return ask_teacher(self, rollouts, micro_batch_tokens=sys.maxsize, **options)

    teacher.forward = MethodType(forward, teacher)


@contextmanager
def _whole_head(model: PreTrainedModel) -> Iterator[None]:
    """Under DeepSpeed's ZeRO-3, keep the head's weights together once the layers have run.

    They would come together at every call of the head, which all processes have to make equally often; but one that
    has more positions projects more chunks of them, and would wait for the others forever.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    head = model.get_output_embeddings()
    with ExitStack() as stack:

        def gather(*_: object) -> None:
            stack.enter_context(maybe_gather_lm_head_ctx(head.weight, getattr(head, "bias", None)))

        stack.callback(model.base_model.register_forward_hook(gather).remove)
        model.get_output_embeddings = lambda: head.forward  # past DeepSpeed's hooks
        stack.callback(delattr, model, "get_output_embeddings")
        yield


def ask_about_batch(
    teacher: nn.Module,
    batch: dict[str, Tensor],
    method: TGPO,
    *,
    vocabulary_size: int,
    rows_at_once: int,
    sampling_seed: int | None,
) -> dict[str, Tensor]:
    """What guidance needs to know of a batch, to be kept with it.

    Args:
        teacher: made ready by :func:`answer_in_forward` and wrapped by the launcher.
        batch: of TRL, B rows of T completion tokens. Tokens of a tool or an environment count as prefix alone.
        method: which tokens are asked for, and the gate.
        vocabulary_size: V. The teacher cannot read a prefix with an id from V on: such positions get weight 0.
        rows_at_once: rows of a pass. It splits the batch in the same way on all processes, which FSDP needs.
        sampling_seed: for tokens drawn from the teacher; None if none are.

    Returns:
        ``teacher_tokens`` (B, T, K) int64, ``teacher_logprobs`` (B, T, K), zero but for a top-k list, and
        ``guidance_weights`` (B, T) from 0 to 1.
    """
    prompt_mask, mask = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    strange_prompt = (batch["prompt_ids"] >= vocabulary_size) & prompt_mask
    strange = (batch["completion_ids"] >= vocabulary_size) & mask
    prompts = batch["prompt_ids"].masked_fill(strange_prompt, 0)
    completions = batch["completion_ids"].masked_fill(strange, 0)
    rollouts = Rollouts(
        prompts=[ids[there].tolist() for ids, there in zip(prompts.cpu(), prompt_mask.cpu(), strict=True)],
        responses=completions,
        mask=mask,
        finished=mask.any(-1),  # TRL does not say, and no teacher asks
        pad_token=0,
    )
    answers = _joined(
        [
            teacher(
                rollouts=rollouts.rows(rows),
                vocabulary_size=vocabulary_size,
                top_k=method.top_k,
                sampling_seed=None if sampling_seed is None else derived_seed(sampling_seed, part),
            ).padded_to(mask[rows].shape)
            for part, rows in enumerate(torch.arange(len(rollouts), device=mask.device).split(rows_at_once))
        ]
    )
    own_words = batch.get("tool_mask", mask).bool()
    weights = apply_gate(
        method.gate,
        method.gate_threshold,
        torch.where(own_words, completions, answers.tokens),  # what a tool wrote is neither departure nor surprise
        replace(answers, logprobs=answers.logprobs.masked_fill(~own_words, 0.0)),
        doubt=method.doubt,
        memory=method.doubt_memory,
        soft=method.soft_horizon,
    )
    strange_before = (strange.cumsum(-1) - strange.long() + strange_prompt.sum(-1, keepdim=True)) > 0
    tokens = {"argmax": answers.tokens, "sampled": answers.sampled_tokens, "top_k": answers.top_tokens}[method.guidance]
    tokens = tokens if tokens.ndim == 3 else tokens.unsqueeze(-1)
    return {
        "teacher_tokens": tokens,
        "teacher_logprobs": torch.zeros_like(tokens, dtype=torch.float32)
        if answers.top_logprobs is None
        else answers.top_logprobs,
        "guidance_weights": weights.masked_fill(strange_before, 0.0),
    }


def _joined(parts: list[TeacherAnswers]) -> TeacherAnswers:
    """Answers about rows, one part after the other."""
    columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(TeacherAnswers)}
    return TeacherAnswers(**{name: None if None in values else torch.cat(values) for name, values in columns.items()})
