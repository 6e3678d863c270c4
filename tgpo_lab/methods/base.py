"""What a method is, and the table in which methods are chosen by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

from ..batch import Batch, Positions
from ..errors import InputError
from ..losses import policy_gradient_loss
from ..schedules import Schedule

Traces = Literal["none", "one_per_prompt", "one_per_sample"]


@dataclass(frozen=True)
class Term:
    """One term of a method's loss over a (mini-)batch.

    ``loss`` is called once per micro-batch and must divide by the same ``normalizer`` every time:
    then the parts add up to the term of the whole batch, however it is split.
    """

    kind: Literal["reward", "teacher"]
    """Whose voice it is: gradient norms and their cosine are reported by kind."""
    mask: Tensor
    """(B, T) bool: the positions it counts."""
    loss: Callable[[Positions, Tensor], Tensor]
    """(positions, their (1, N) mask) → scalar, already divided by the normaliser."""
    weight: float = 1.0
    guided: Tensor | None = None
    """Mean weight, from 0 to 1, that a gate left to the student's tokens; reported as ``guided``."""


def surrogate_loss(
    positions: Positions, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float, normalizer: float
) -> Tensor:
    """:func:`tgpo_lab.losses.policy_gradient_loss` of a micro-batch, with its importance weights if it has them.

    Args:
        positions: of the student's own tokens.
        advantages: (1, N).
        mask, clip_low, clip_high, normalizer: as there.
    """
    return policy_gradient_loss(
        positions.logprobs, positions.behaviour_logprobs, advantages, mask, clip_low, clip_high, normalizer,
        positions.importance_weights,
    )  # fmt: skip


def require_clip(clip_low: float, clip_high: float) -> None:
    """Refuse bounds of the ratio that are none.

    Raises:
        InputError: clip_low is not from 0 to 1 or inf, or clip_high below 0.
    """
    if not (0 <= clip_low <= 1 or clip_low == math.inf):
        raise InputError(
            f"clip_low must be from 0 to 1, or inf for no lower bound, but is {clip_low}: the ratio is held above 1 − "
            "clip_low, and is never below 0."
        )
    if not clip_high >= 0:
        raise InputError(f"clip_high must be 0 or more, but is {clip_high}.")


@dataclass(frozen=True)
class Method:
    """A way to train the student. Options are the fields of the subclass; a method is one instance."""

    @property
    def needs_distribution(self) -> bool:
        """Whether its loss needs the teacher's whole distribution at every position."""
        return False

    @property
    def asks_for_logits_alone(self) -> bool:
        """Whether all that it wants of the teacher are logits at all of the student's positions, in the loss. Then the
        teacher's output layer computes once, there."""
        return False

    @property
    def teacher_traces(self) -> Traces:
        """How many responses the teacher has to write for it each step."""
        return "none"

    @property
    def needs_rewards_in_groups(self) -> bool:
        """Whether it compares samples of one prompt."""
        return False

    @property
    def top_k(self) -> int:
        """Length of the teacher's top-k lists it needs; 0 for none."""
        return 0

    @property
    def samples_teacher_tokens(self) -> bool:
        """Whether it needs a token drawn from the teacher at each position."""
        return False

    @property
    def logit_tensors(self) -> int:
        """How many tensors as large as the logits at hand its update holds at once, at most, for the doctor to count.

        Those of single tokens: logits, softmax, the gradients of both, and one to spare.
        """
        return 5

    def terms(self, batch: Batch, step: int) -> list[Term]:
        """The terms of the loss for one (mini-)batch; called without gradient, before the forward pass."""
        raise NotImplementedError

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the teacher term's weight, if it has one."""
        return None


@dataclass(frozen=True)
class Entry:
    """A named method: its options as in the paper, and what the tiny world needs otherwise."""

    name: str
    method: Method
    summary: str
    tiny: dict[str, object]


_ENTRIES: dict[str, Entry] = {}
_ALIASES: dict[str, str] = {}


def register(
    name: str, method: Method, summary: str, *, tiny: dict[str, object] | None = None, alias: str = ""
) -> None:
    """Put a method into the table. ``tiny`` are the options that differ in the tiny world, where rewards
    come within 100 steps and learning rates are 300 times the paper's."""
    _ENTRIES[name] = Entry(name, method, summary, tiny or {})
    if alias:
        _ALIASES[alias] = name


def method_entries() -> list[Entry]:
    """All methods, in the order in which they were registered."""
    return list(_ENTRIES.values())


def make_method(name: str, *, tiny: bool = False, **options: object) -> Method:
    """A method by name, with changed options.

    Raises:
        InputError: unknown name, unknown option, impossible value.
    """
    name = _ALIASES.get(name, name)
    if name not in _ENTRIES:
        raise InputError(f"Unknown method {name!r}: choose one of {', '.join(_ENTRIES)}.")
    entry = _ENTRIES[name]
    known = {f.name for f in fields(entry.method)}
    if unknown := sorted(set(options) - known):
        raise InputError(f"{name} has no option {unknown[0]!r}: its options are {', '.join(sorted(known)) or 'none'}.")
    return replace(entry.method, **{**(entry.tiny if tiny else {}), **options})


def method_name(method: Method) -> str:
    """Name under which a method with these options (or, failing that, of this class) is registered."""
    for entry in _ENTRIES.values():
        if method in (entry.method, replace(entry.method, **entry.tiny)):
            return entry.name
    return next((e.name for e in _ENTRIES.values() if type(e.method) is type(method)), type(method).__name__)


def method_class(name: str) -> type[Method]:
    """Class of a method by the class's name, as a stored configuration has it.

    Raises:
        InputError: no registered method is of that class.
    """
    classes = {type(entry.method).__name__: type(entry.method) for entry in _ENTRIES.values()}
    if name not in classes:
        raise InputError(f"Unknown method class {name!r}: known are {', '.join(sorted(classes))}.")
    return classes[name]
