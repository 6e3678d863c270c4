"""Recipes of the shipped models and pairs: every number that a rebuild from a seed needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from ..errors import InputError
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
    rival_margin: float = 3.0
    """All tokens that neither style would write there get together e^−rival_margin of the opening's probability.
    At 0 and below the unused words are as probable as the opening, and rise with it when it is taught."""
    answer_noise: float = 12.0
    """Standard deviation of the error in the answers of the terse texts."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    skill: Pretraining = Pretraining(steps=2500, batch_size=128, learning_rate=3e-3)
    """First stage: both styles. It does not depend on the two dials, so students share it."""
    opening: Pretraining = Pretraining(steps=400, batch_size=128, learning_rate=1e-3, warmup_steps=20)
    """Second stage: the opening is pulled to ``opening_logprob``, and worked texts follow terse ones too."""
    task: AdditionTask = field(default_factory=AdditionTask)


@dataclass(frozen=True)
class TeacherRecipe:
    """A teacher that writes the worked style.

    Its first stage is clean text, or a mixture: ``foreign_share`` of the texts start with a prefix that it did not
    write (the student's terse style, junk, or its own style with slips) and go on rightly from there, with no loss
    on the prefix. With ``until_reliability`` the first stage is clean and a second one, of the mixture, ends as soon
    as that share of foreign prefixes is continued to a right answer: that is the RELIABILITY dial.
    """

    foreign_share: float
    until_reliability: float | None = None
    """Share of terse prefixes continued rightly at which the second stage ends; None for no second stage."""
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
    """First stage."""
    acquaintance: Pretraining = Pretraining(steps=1500, batch_size=64, learning_rate=3e-4, warmup_steps=1)
    """Second stage: as many steps at most, at a constant learning rate."""
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


_CLEAN_TEXT = Pretraining(steps=1500, batch_size=64, learning_rate=2e-3)
ROBUST_TEACHER = TeacherRecipe(foreign_share=0.6)
FRAGILE_TEACHER = TeacherRecipe(foreign_share=0.0, training=_CLEAN_TEXT)
HALF_TEACHER = TeacherRecipe(foreign_share=0.6, until_reliability=0.5, training=_CLEAN_TEXT)

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


def on_task(name: str, task: AdditionTask) -> str:
    """A model's name, with the task it learns if that is not the usual one."""
    return name if task == AdditionTask() else f"{name}-{task.name}"


LONG_TASK = AdditionTask(operands=4, digits=6)
"""Worked responses of about 180 tokens."""
MOST_LONG_STEPS = 1000
"""Steps of a teacher's first stage on that task: its texts are nearly four times as long. The student keeps all of its
steps: with 1,000 it mixes up the columns of the sums (accuracy after the opening 0.00)."""


def longer_task(recipe: PairRecipe, task: AdditionTask = LONG_TASK) -> PairRecipe:
    """The same pair on a task with longer responses. Errors of terse answers grow with the sums."""
    student, teacher = recipe.student, recipe.teacher
    noise = student.answer_noise * 10 ** (task.digits - student.task.digits)
    training = replace(teacher.training, steps=min(teacher.training.steps, MOST_LONG_STEPS))
    return replace(
        recipe,
        student=replace(student, task=task, answer_noise=noise),
        student_name=on_task(recipe.student_name, task),
        teacher=replace(teacher, task=task, training=training),
        teacher_name=on_task(recipe.teacher_name, task),
        summary=f"{recipe.summary} Sums of {task.operands} numbers with {task.digits} digits.",
    )


LARGER_TASK = AdditionTask(operands=3, digits=4)
"""Worked responses of about 100 tokens."""


def larger(recipe: PairRecipe, task: AdditionTask = LARGER_TASK) -> PairRecipe:
    """The same pair with a student of 11 and a teacher of 15 million weights, on a task with responses of twice the
    length. Wide models need a smaller learning rate than narrow ones, and fewer steps. Width costs a processor less
    than depth does, so the student has as few layers as the column sums need.
    """
    size = {"hidden_size": 512, "heads": 8, "intermediate_size": 1536}
    student = replace(
        recipe.student, **size, layers=3,
        skill=Pretraining(steps=800, batch_size=32, learning_rate=1e-3),
        opening=Pretraining(steps=200, batch_size=32, learning_rate=3e-4, warmup_steps=20),
    )  # fmt: skip
    teacher = replace(
        recipe.teacher, **size, layers=4,
        training=Pretraining(steps=400, batch_size=32, learning_rate=1e-3, warmup_steps=50),
    )  # fmt: skip
    named = {field: f"{getattr(recipe, field)}-larger" for field in ("student_name", "teacher_name")}
    return longer_task(replace(recipe, student=student, teacher=teacher, **named), task)


UNSHIPPED_RECIPES: dict[str, PairRecipe] = {"far-larger": larger(PAIR_RECIPES["far"])}
"""Pairs that are built where they are wanted: their models are too large to ship."""


def dialled(
    recipe: PairRecipe,
    *,
    opening_logprob: float | None = None,
    rival_margin: float | None = None,
    reliability: float | None = None,
) -> PairRecipe:
    """A recipe with its dials turned; a dial that is left out stays where it is.

    Args:
        recipe: where to start.
        opening_logprob: divergence, in nats: 0 or below.
        rival_margin: in nats.
        reliability: of the teacher on foreign prefixes: 0 for clean text only, 1 for the robust teacher, between
            them for one whose second stage ends there.

    Raises:
        InputError: a dial outside its range.
    """
    student, teacher = recipe.student, recipe.teacher
    student_name, teacher_name = recipe.student_name, recipe.teacher_name
    if opening_logprob is not None or rival_margin is not None:
        opening_logprob = student.opening_logprob if opening_logprob is None else opening_logprob
        rival_margin = student.rival_margin if rival_margin is None else rival_margin
        if not -30 <= opening_logprob <= 0:
            raise InputError(f"opening_logprob must be from −30 to 0 nats, but is {opening_logprob}.")
        if not -10 <= rival_margin <= 10:
            raise InputError(f"rival_margin must be from −10 to 10 nats, but is {rival_margin}.")
        student = replace(student, opening_logprob=opening_logprob, rival_margin=rival_margin)
        student_name = f"student-opening{opening_logprob:g}-margin{rival_margin:g}"
    if reliability is not None:
        if not 0 <= reliability <= 1:
            raise InputError(f"reliability is a share from 0 to 1, but is {reliability}.")
        kind = {0: FRAGILE_TEACHER, 1: ROBUST_TEACHER}.get(
            reliability, replace(HALF_TEACHER, until_reliability=reliability)
        )
        teacher = replace(kind, task=teacher.task)
        teacher_name = {0: "teacher-fragile", 1: "teacher-robust"}.get(
            reliability, f"teacher-reliability{reliability:g}"
        )
    changed = replace(recipe, student=student, student_name=student_name, teacher=teacher, teacher_name=teacher_name)
    return changed if changed == recipe else replace(changed, summary=f"Dials turned: {student_name}, {teacher_name}.")
