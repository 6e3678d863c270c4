"""The two Kullback–Leibler divergences on distributions that one drags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..errors import InputError
from ..losses import forward_kl_per_token, reverse_kl_per_token
from .panel import STUDENT, TEACHER, Panel, slider

START_STUDENT, START_TEACHER = (0.90, 0.07, 0.02, 0.01), (0.02, 0.08, 0.10, 0.80)


def two_kls(student: Sequence[float], teacher: Sequence[float]) -> tuple[float, float, pd.DataFrame]:
    """Reverse and forward KL of two distributions, in nats, and what each outcome adds to them.

    Args:
        student: πθ, weights above 0; they are divided by their sum.
        teacher: πT, as many.

    Returns:
        KL(πθ‖πT) and KL(πT‖πθ) as :mod:`tgpo_lab.losses` has them, and a table with ``student``, ``teacher``,
        ``reverse_kl`` = πθ·log(πθ/πT) and ``forward_kl`` = πT·log(πT/πθ) for each outcome.

    Raises:
        InputError: fewer than two outcomes, unequal numbers, or a weight that is not finite and above 0.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise InputError(
            f"Two distributions over the same two or more outcomes are needed, but they have {len(student)} and "
            f"{len(teacher)}."
        )
    if wrong := [weight for weight in (*student, *teacher) if not 0 < weight < math.inf]:
        raise InputError(
            f"Weights must be finite and above 0, but one is {wrong[0]}: where one distribution has 0 and the other "
            "has not, a divergence is infinite."
        )
    ours, theirs = (torch.tensor(w, dtype=torch.float64) for w in (list(student), list(teacher)))
    ours, theirs = ours / ours.sum(), theirs / theirs.sum()
    logits = [p.log().view(1, 1, -1) for p in (ours, theirs)]
    ratio = ours.log() - theirs.log()
    table = pd.DataFrame(
        {
            "student": ours.tolist(),
            "teacher": theirs.tolist(),
            "reverse_kl": (ours * ratio).tolist(),
            "forward_kl": (-theirs * ratio).tolist(),
        },
        index=pd.Index([f"token {number}" for number in range(1, len(ours) + 1)], name="outcome"),
    )
    return float(reverse_kl_per_token(*logits)), float(forward_kl_per_token(*logits)), table


def kl_figure(table: pd.DataFrame) -> Figure:
    """Both distributions, and what each outcome adds to the two divergences; ``table`` as :func:`two_kls` gives it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.9), layout="constrained")
    places = range(len(table))
    for offset, column, color in ((-0.2, "student", STUDENT), (0.2, "teacher", TEACHER)):
        left.bar([p + offset for p in places], table[column], 0.38, color=color, label=column)
    left.set_ylim(0, 1)
    left.set_ylabel("probability")
    for offset, column, color, hatch in (
        (-0.2, "reverse_kl", STUDENT, ""),
        (0.2, "forward_kl", TEACHER, "//"),
    ):
        total = table[column].sum()
        label = f"{'reverse KL(πθ‖πT)' if column == 'reverse_kl' else 'forward KL(πT‖πθ)'} = {total:.2f}"
        right.bar([p + offset for p in places], table[column], 0.38, color=color, hatch=hatch, label=label)
    right.axhline(0, color="gray", linewidth=0.8)
    right.set_ylabel("nats added")
    for axes in (left, right):
        axes.set_xticks(list(places), table.index)
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9)
    return figure


def kl_panel(student: Sequence[float] = START_STUDENT, teacher: Sequence[float] = START_TEACHER) -> Panel:
    """Drag the weights of student and teacher and watch the two divergences.

    Args:
        student: weights to begin with, one slider each.
        teacher: as many.

    Raises:
        InputError: as :func:`two_kls`.
    """
    two_kls(student, teacher)

    def sliders(who: str, weights: Sequence[float]) -> list[ipywidgets.Widget]:
        return [
            slider(f"{who} {n}", weight, -4, 0, 0.02, decades=True, width=220) for n, weight in enumerate(weights, 1)
        ]

    ours, theirs = sliders("student", student), sliders("teacher", teacher)

    def compute() -> tuple[pd.DataFrame, str]:
        reverse, forward, table = two_kls([s.value for s in ours], [s.value for s in theirs])
        return table, f"reverse KL(πθ‖πT) {reverse:.3f} nats, forward KL(πT‖πθ) {forward:.3f} nats"

    return Panel([*ours, *theirs], compute, kl_figure, "Two divergences")
