"""Looks at tokenizers and models. Each adds its findings to a :class:`~tgpo_lab.doctor.diagnosis.Diagnosis`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..diagnostics.pair_card import measure_pair
from ..errors import InputError
from ..methods import TGPO
from ..models.pairs import Pair, end_tokens
from ..models.policy import project_to_vocabulary, response_hidden_states
from ..models.shared_vocabulary import SharedVocabulary, share_vocabulary
from ..rollouts import Rollouts
from .diagnosis import Diagnosis

NAMED = 8
"""Tokens that are named at most in one line."""
FAR_OPENING, RELIABLE, OFTEN_REJECTED = -6.0, 0.5, 0.3
"""A teacher's opening less probable than e⁻⁶ is hardly ever sampled; a teacher right on fewer than half of the
student's prefixes is a poor guide; above that share of rejected tokens reverse KL mostly says no."""
MOSTLY_CUT = 0.5
"""Share of the teacher's answers that were cut, from which figures of right answers say nothing."""
OFTEN_CUT = 0.2
"""The same share from which a run's own limit is too low."""


def check_tokenizers(
    found: Diagnosis, tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], names: tuple[str, str]
) -> SharedVocabulary:
    """Tokens, merges, and tokens put before every text.

    Raises:
        InputError: the two cannot share a vocabulary.
    """
    shared = share_vocabulary(*tokenizers, *names)
    found.add(
        "ok", "tokenizers", f"Every id from 0 to {shared.size - 1} means the same token, and texts are cut alike."
    )
    for who, lacking, tokens in (
        (names[0], names[1], shared.only_student),
        (names[1], names[0], shared.only_teacher),
        ("Both", "the range that is shared", shared.beyond),
    ):
        if tokens:
            text = f"{who} has {len(tokens)} tokens that {lacking} lacks: {_named(tokens)}."
            if who == "Both":
                text = f"Both have {len(tokens)} tokens beyond {lacking}: {_named(tokens)}."
            found.add(
                "warning", "tokenizers", f"{text} They are cut from both distributions.",
                "Nothing, unless prompts need them or the teacher answers with them, as Qwen3 thinks between <think> "
                "and </think>.",
            )  # fmt: skip
    before = [list((Counter(t.encode("a")) - Counter(t.encode("a", add_special_tokens=False))).elements())
              for t in tokenizers]  # fmt: skip
    before = [t.convert_ids_to_tokens(ids) for t, ids in zip(tokenizers, before, strict=True)]
    if before[0] != before[1]:
        found.add(
            "warning", "tokenizers",
            f"{names[0]} puts {before[0] or 'nothing'} around a text, {names[1]} {before[1] or 'nothing'}. The teacher "
            "reads what the student's tokenizer writes.",
            "Choose a teacher that was trained on such texts, or put the token into prompt_template.",
        )  # fmt: skip
    return shared


def check_chat_template(
    found: Diagnosis, config: TrainConfig, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Whether a chat template is used, and whether the teacher knows it.

    Raises:
        InputError: one is asked for and there is none.
    """
    if not config.chat_template:
        unused = [role for role, t in (("student", student), ("teacher", teacher)) if t.chat_template]
        text = "Prompts are plain text."
        if unused:
            text += f" There is a chat template of the {' and of the '.join(unused)}; chat_template would use it."
        found.add("ok", "chat template", text)
        return
    ours = config.prompt_format.text(student, "…")
    if config.chat_template_options and ours == replace(config.prompt_format, chat_template_options=()).text(
        student, "…"
    ):
        found.add(
            "warning", "chat template",
            f"The student's writes the same without {', '.join(config.chat_template_options)}.",
            "Look for the option's name in the template, or leave chat_template_options out.",
        )  # fmt: skip
    try:
        theirs = config.prompt_format.text(teacher, "…")
    except InputError:
        theirs = None
    if ours == theirs:
        found.add("ok", "chat template", f"Both write {ours!r}.")
    else:
        found.add(
            "warning", "chat template",
            f"The student's writes {ours!r}, the teacher's {theirs!r}. Both models read the student's."
            if theirs is not None else f"The student's writes {ours!r}; the teacher has none, but reads it too.",
            "Choose a system_prompt that both know, or give both the same template.",
        )  # fmt: skip


def check_rows(found: Diagnosis, pair: Pair, shared: SharedVocabulary) -> None:
    """Rows of the output layers against the shared range."""
    rows = [model.get_output_embeddings().weight.shape[0] for model in (pair.student, pair.teacher)]
    cut = " Those above are cut." if max(rows) > shared.size else ""
    found.add("ok", "vocabulary", f"Student {rows[0]} rows, teacher {rows[1]}, shared tokens {shared.size}.{cut}")


def check_ends(
    found: Diagnosis, config: TrainConfig, pair: Pair, tokenizers: tuple[PreTrainedTokenizerBase, ...]
) -> None:
    """The tokens that end a response of either model."""
    # load_pair has told the student's generation configuration of the teacher's ends: its tokenizer names its own.
    teacher = set(end_tokens(pair.teacher, tokenizers[1], config.prompt_format))
    student = set(pair.student_end_tokens)
    named = [", ".join(repr(t.convert_ids_to_tokens(e)) for e in sorted(ends)) or "none"
             for t, ends in zip(tokenizers, (student, teacher), strict=True)]  # fmt: skip
    if student == teacher:
        found.add("ok", "end tokens", f"Both models end with {named[0]}.")
        return
    counted = ", ".join(repr(tokenizers[0].convert_ids_to_tokens(e)) for e in pair.end_tokens)
    found.add(
        "ok", "end tokens",
        f"The student ends with {named[0]}, the teacher with {named[1]}. A student that learns to end as the teacher "
        f"does would go on for ever if only its own end counted, so any of {counted} ends a response here. Checkpoints "
        "name all of them in generation_config.json, which other programs must heed; of adapters they heed the base's.",
    )  # fmt: skip


@torch.no_grad()
def check_opening(found: Diagnosis, pair: Pair, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """The token with which the teacher would open its response if nothing were cut."""
    encoded = pair.encode(list(prompts))
    nothing = torch.zeros(len(encoded), 1, dtype=torch.long, device=pair.teacher.device)
    opening = Rollouts(encoded, nothing, torch.ones_like(nothing, dtype=torch.bool), nothing[:, 0] > 0, 0)
    logits = project_to_vocabulary(pair.teacher, response_hidden_states(pair.teacher, opening), len(tokenizer))
    first = Counter(logits.argmax(-1).tolist())
    outside = {token: count for token, count in first.items() if token >= pair.vocabulary_size}
    if not outside:
        usual = first.most_common(1)[0][0]
        found.add("ok", "opening", f"The teacher opens with shared tokens, most often {tokenizer.decode([usual])!r}.")
        return
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in outside)
    found.add(
        "warning", "opening",
        f"On {sum(outside.values())} of {len(encoded)} prompts the teacher {tokenizer.name_or_path} would open with "
        f"{names}, which the student {pair.tokenizer.name_or_path} lacks. It is cut, and the next best takes its "
        "place: the teacher is not itself.",
        "Use a chat template or prompt_template after which the teacher opens otherwise (of a reasoning model, the one "
        "without thinking), or another teacher.",
    )  # fmt: skip


def check_divergence(found: Diagnosis, config: TrainConfig, pair: Pair, prompts: Dataset, max_new_tokens: int) -> None:
    """The divergence card on a few prompts."""
    try:
        card = measure_pair(
            pair, prompts, count=len(prompts), max_new_tokens=max_new_tokens, reward=config.reward,
            rejection_threshold=config.rejection_threshold, seed=config.seed,
        )  # fmt: skip
    except InputError as error:
        if f"The reward {config.reward} " in str(error):  # of the user's own: training would end with it as well
            found.add("refused", "reward", str(error))
        else:
            found.add("warning", "divergence", f"It was not measured: {error}")
        return
    found.card = card
    figures = (
        f"KL(student‖teacher) {card.reverse_kl:.2f} nats per token, agreement {card.agreement:.2f}, rejected "
        f"{card.rejected:.2f}, opening {card.opening!r} at {card.opening_logprob:.1f} nats, teacher right on "
        f"{card.reliability:.2f} of the student's prefixes"
    )
    cut = f", responses cut after {max_new_tokens} tokens" if max_new_tokens < config.max_new_tokens else ""
    found.add("ok", "divergence", f"On {card.prompts} prompts{cut}: {figures}.")
    mostly_cut = card.teacher_cut >= MOSTLY_CUT
    if cut:
        by_whom = "this measurement cuts them, so what is said here of right answers says nothing"
        longer = f"Measure whole answers: --card-tokens {config.max_new_tokens} (in Python card_tokens)."
    else:
        by_whom = "the run cuts them, and an answer that is cut counts as wrong"
        longer = f"Give a larger max_new_tokens: --max-new-tokens {2 * max_new_tokens} or more."
    guided = isinstance(config.method, TGPO)  # which is for such a student
    for bad, text, change in (
        (card.teacher_cut >= (MOSTLY_CUT if cut else OFTEN_CUT),
         f"{card.teacher_cut:.2f} of the teacher's answers are longer than the {max_new_tokens} tokens after which "
         f"{by_whom}.", longer),
        (not mostly_cut and card.teacher_accuracy <= card.student_accuracy and card.teacher_accuracy < 1,
         f"The teacher is right in {card.teacher_accuracy:.2f} of its answers, the student in "
         f"{card.student_accuracy:.2f}.", "Look at its answers, the prompt format and the reward before its logits."),
        (not mostly_cut and card.reliability < RELIABLE,
         f"The teacher goes on to a right answer from {card.reliability:.2f} of the student's prefixes.",
         "Choose another teacher, or gate its guidance: tgpo-confidence, tgpo-trust-horizon."),
        (not guided and card.opening_logprob < FAR_OPENING,
         f"The teacher's opening {card.opening!r} has {card.opening_logprob:.1f} nats under the student: it is hardly "
         "ever sampled.",
         "Prefer tgpo to methods that only judge the student's own tokens: rkl, kdrl, grpo."),
        (not guided and card.rejected > OFTEN_REJECTED,
         f"The teacher rejects {card.rejected:.2f} of the student's tokens.",
         "Prefer tgpo or a smaller teacher weight to rkl, whose reward is unbounded on such tokens."),
    ):  # fmt: skip
        if bad:
            found.add("warning", "divergence", text, change)


def _named(tokens: dict[str, int]) -> str:
    shown = [f"{token!r} ({index})" for token, index in list(tokens.items())[:NAMED]]
    return ", ".join(shown) + (f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else "")
