"""Methods of training the student, each chosen by name; its options are a dataclass.

To add one: subclass :class:`Method` in a module here, call :func:`tgpo_lab.methods.base.register` below it, and import
that module in this file.
"""

from .base import Entry, Method, Term, make_method, method_entries, method_name
from .distillation import (
    KDRL,
    ExactReverseKL,
    GeneralizedKnowledgeDistillation,
    ReverseKLPolicyGradient,
    SupervisedFineTuning,
)
from .grpo import GRPO, LUFFY
from .tgpo import TGPO

__all__ = [
    "GRPO",
    "KDRL",
    "LUFFY",
    "TGPO",
    "Entry",
    "ExactReverseKL",
    "GeneralizedKnowledgeDistillation",
    "Method",
    "ReverseKLPolicyGradient",
    "SupervisedFineTuning",
    "Term",
    "make_method",
    "method_entries",
    "method_name",
]
