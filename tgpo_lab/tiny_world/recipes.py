"""Recipes of the shipped models and pairs: every number that a rebuild from a seed needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .arithmetic import AdditionTask


@dataclass(frozen=True)
class Pretraining:
    """Supervised training of one tiny model (AdamW, cosine learning rate with linear warm-up)."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    seed: int = 0


@dataclass(frozen=True)
class StudentRecipe:
    """A student that masters the worked style but rarely opens it.

    Half of its training text is terse with a noisy answer, half worked. The opening token of a
    worked text gets no loss of its own; in the second stage a squared-error term sets its
    log-probability instead, at the start and along a terse answer: that is the DIVERGENCE dial.
    """

    opening_logprob: float
    """Wanted log πθ(``<think>``), in nats."""
    answer_noise: float = 12.0
    """Standard deviation of the error in the answers of the terse texts."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    skill: Pretraining = Pretraining(steps=2500, batch_size=128, learning_rate=3e-3)
    """First stage: both styles. It does not depend on ``opening_logprob``, so students share it."""
    opening: Pretraining = Pretraining(steps=400, batch_size=128, learning_rate=1e-3, warmup_steps=20)
    """Second stage: the opening is pulled to ``opening_logprob``, and worked texts follow terse ones too."""
    task: AdditionTask = field(default_factory=AdditionTask)


@dataclass(frozen=True)
class TeacherRecipe:
    """A teacher that writes the worked style.

    ``foreign_share`` of its training text starts with a prefix that it did not write (the
    student's terse style, junk, or its own style with slips) and goes on rightly from there, with
    no loss on the prefix: that is the RELIABILITY dial. At 0 the teacher has seen clean text only.
    """

    foreign_share: float
    terse_prefix: float = 0.35
    """Of the foreign texts: prefix of a terse answer, right or wrong; finishes it, then works it out."""
    junk_prefix: float = 0.25
    """Of the foreign texts: random tokens, or a terse answer mixed with them; then opens ``<think>``."""
    slip_prefix: float = 0.40
    """Of the foreign texts: worked text with wrong tokens in it; goes on as if they were right."""
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 384
    training: Pretraining = Pretraining(steps=2500, batch_size=64, learning_rate=2e-3)
    task: AdditionTask = field(default_factory=AdditionTask)


@dataclass(frozen=True)
class PairRecipe:
    """A student and a teacher over one tokenizer."""

    student_name: str
    student: StudentRecipe
    teacher_name: str
    teacher: TeacherRecipe
    summary: str

    def as_dict(self) -> dict:
        """Plain dictionary, for the card and for JSON."""
        return asdict(self)


ROBUST_TEACHER = TeacherRecipe(foreign_share=0.6)
FRAGILE_TEACHER = TeacherRecipe(foreign_share=0.0, training=Pretraining(steps=1500, batch_size=64, learning_rate=2e-3))

NEAR_STUDENT = StudentRecipe(opening_logprob=-1.4)
MID_STUDENT = StudentRecipe(opening_logprob=-9.0)
FAR_STUDENT = StudentRecipe(opening_logprob=-13.0)

PAIR_RECIPES: dict[str, PairRecipe] = {
    "near": PairRecipe(
        "student-near", NEAR_STUDENT, "teacher-robust", ROBUST_TEACHER,
        "In-family: the student already opens the teacher's way about one time in four. Reverse KL works here.",
    ),
    "mid": PairRecipe(
        "student-mid", MID_STUDENT, "teacher-robust", ROBUST_TEACHER,
        "Between: the teacher's way is open about once in 8,000 places, so exploration finds it after a while.",
    ),
    "far": PairRecipe(
        "student-far", FAR_STUDENT, "teacher-robust", ROBUST_TEACHER,
        "The paper's situation: the skill is there, but the opening token is one that sampling does not find.",
    ),
    "far-fragile": PairRecipe(
        "student-far", FAR_STUDENT, "teacher-fragile", FRAGILE_TEACHER,
        "The premise broken: the teacher is right from scratch and lost on the prefixes that the student writes.",
    ),
}  # fmt: skip
