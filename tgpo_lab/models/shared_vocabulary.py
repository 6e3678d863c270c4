"""Whether two tokenizers can share one vocabulary, and which ids belong to it.

Token-level distillation compares two distributions id by id, so an id has to mean the same token in both, and both
have to cut a text at the same places. Members of one family often differ a little all the same: Qwen3 has four added
tokens (``<think>`` and three more) after the 151,665 ids that it shares with Qwen2.5.

What is shared is a RANGE of ids, from 0 up to the first id that only one of the two has. A mask with holes would keep
shared ids beyond that one, but added tokens stand after all others in practice, and a range has three advantages: it
is a view of the logits that costs nothing at any position, no id has to be translated, and no logit becomes −∞, which
a KL would turn into 0·∞. Shared ids beyond the range are cut as well; they are named, and refused if ordinary text
needs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError

# Where tokenizers with equal vocabularies have been seen to differ: merges, normalisation (composed, decomposed and
# compatibility characters), white space, digits, contractions, scripts, source code.
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 3 o'clock; we'll see.",
    "  leading, double  inner   and trailing spaces  \n\n\nthree newlines\t\ttabs\r\n",
    "12345678901234567890 1,234.56 -7 +3 1e-9 0x1F 3/4 2^10 47+85+36=168 #168",
    "Let $f(x)=\\frac{x^2+1}{\\sqrt{2}}$. Then \\boxed{\\left(\\tfrac{1}{2},\\,3\\right)} \\le \\infty.",
    'def add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b  # done\n',
    "caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22\uff11 \u00c5ngstr\u00f6m \u212b \u1e9e\u00df na\u00efve",
    "Привет, мир! 你好,世界。 こんにちは 안녕하세요 مرحبا بالعالم नमस्ते שלום",
    "unbelievably antidisestablishmentarianism HTTPServer2Config snake_case camelCase SHOUTING",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2192 \u2248 \u2211 \u00a0 \u2026 \u201cq\u201d \u2014",
)


@dataclass(frozen=True)
class SharedVocabulary:
    """What two tokenizers share."""

    size: int
    """V: the ids from 0 to V − 1 are kept for both; all others are cut out of both distributions."""
    only_student: dict[str, int]
    """Tokens that the teacher lacks, with their ids, lowest first."""
    only_teacher: dict[str, int]
    """Tokens that the student lacks."""
    beyond: dict[str, int]
    """Tokens that both have, but beyond the range: cut as well."""


def share_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_name: str, teacher_name: str
) -> SharedVocabulary:
    """The vocabulary of a student's and a teacher's tokenizer.

    Raises:
        InputError: an id means two different tokens, one has ordinary tokens that the other lacks or that would be
            cut, or they cut one of :data:`PROBES` at different places. The message names both.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    advice = "Token-level distillation needs one tokenizer: choose a teacher with the student's tokenizer."
    if conflicts := sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]):
        first = conflicts[0]
        raise InputError(
            f"The tokenizers differ: {student_name} has {len(ours)} tokens and {teacher_name} has {len(theirs)}; "
            f"{len(conflicts)} disagree, for example id {first} is {ours[first]!r} in the student and "
            f"{theirs[first]!r} in the teacher. {advice}"
        )
    only_student, only_teacher = _named(ours, ours.keys() - theirs), _named(theirs, theirs.keys() - ours)
    for name, lacking, tokens, added in (
        (student_name, teacher_name, only_student, student.get_added_vocab()),
        (teacher_name, student_name, only_teacher, teacher.get_added_vocab()),
    ):
        if ordinary := [token for token in tokens if token not in added]:
            raise InputError(
                f"The tokenizers differ: {name} has {len(ordinary)} ordinary tokens that {lacking} lacks, for example "
                f"{ordinary[0]!r} ({tokens[ordinary[0]]}), so the two cut texts at different places. {advice}"
            )
    alone = [*only_student.values(), *only_teacher.values()]
    size = min(alone) if alone else max(ours) + 1
    beyond = _named(ours, (i for i in ours.keys() & theirs.keys() if i >= size))
    if ordinary := [token for token in beyond if token not in student.get_added_vocab()]:
        stranger = next(token for token, index in [*only_student.items(), *only_teacher.items()] if index == size)
        raise InputError(
            f"The tokenizers differ: only one of {student_name} and {teacher_name} has {stranger!r} ({size}), and "
            f"{len(ordinary)} ordinary tokens stand behind it, for example {ordinary[0]!r}. {advice}"
        )
    for text in PROBES:
        first, second = (t.encode(text, add_special_tokens=False) for t in (student, teacher))
        if first != second:
            place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
            raise InputError(
                f"The tokenizers have the same tokens but cut texts differently (other merges or another "
                f"normalisation): of {text!r}, token {place} is {_token(student, first, place)} in {student_name} and "
                f"{_token(teacher, second, place)} in {teacher_name}. {advice}"
            )
    return SharedVocabulary(size, only_student, only_teacher, beyond)


def named_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence ids that a model's generation configuration and its tokenizer name, each once."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({e for e in (*ends, tokenizer.eos_token_id) if e is not None})


def shared_end_tokens(
    size: int, student: list[int], teacher: list[int], tokenizers: tuple[PreTrainedTokenizerBase, ...]
) -> list[int]:
    """The ids that end a response: those of both models, as far as both know them.

    A base student and an instructed teacher seldom end alike. Were only the student's end counted, a student that has
    learned to end as its teacher does would go on to the token limit: the classic cause of length explosion.

    Args:
        size: V.
        student: ids that end the student's responses.
        teacher: ids that end the teacher's.
        tokenizers: of both, for their names and the names of tokens.

    Raises:
        InputError: there is none, or none of one model lies within the shared range.
    """
    names = [t.name_or_path for t in tokenizers]
    if not student and not teacher:
        raise InputError(
            f"{names[0]} names no end-of-sequence token, so a response could never end. "
            "Set eos_token in its tokenizer_config.json."
        )
    for role, ends, one, other in (("student", student, 0, 1), ("teacher", teacher, 1, 0)):
        known = [token for e in ends if (token := tokenizers[one].convert_ids_to_tokens(e)) is not None]
        if known and min(ends) >= size:
            tokens = ", ".join(map(repr, known))
            raise InputError(
                f"The {role} {names[one]} ends its responses with {tokens}, which is no shared token: {names[other]} "
                "lacks it, so no response could end that way. Choose models that share an end-of-sequence token, or "
                f"name a shared one as eos_token_id in the generation_config.json of {names[one]}."
            )
    # An id that is no token at all is a way to say that nothing ends a response.
    return sorted(
        {
            e
            for tokenizer, ends in zip(tokenizers, (student, teacher), strict=True)
            for e in ends
            if e < size or tokenizer.convert_ids_to_tokens(e) is None
        }
    )


def _named(tokens: dict[int, str], ids: Iterable[int]) -> dict[str, int]:
    return {tokens[index]: index for index in sorted(ids)}


def _token(tokenizer: PreTrainedTokenizerBase, ids: list[int], place: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(ids[place])) if place < len(ids) else "not there"
