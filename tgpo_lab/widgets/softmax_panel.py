"""One softmax position: what one step of each method would do to its logits."""

from __future__ import annotations

import math

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..errors import InputError
from ..explorer.logit_updates import UPDATE_METHODS, logit_updates
from .panel import Panel, slider
from .scene import METHOD_LABELS

TOKENS = ("teacher’s token", "student’s habit", "third", "fourth", "fifth")
SHARES = (0.9, 0.06, 0.03, 0.01)  # how the student divides what the teacher's token leaves, at temperature 1
TEACHER_SURE = 0.97
COLORS = ("#4c72b0", "#55a868", "#8c8c8c", "#dd8452")
HATCHES = ("", "..", "xx", "//")


def softmax_updates(
    teacher_token_probability: float,
    *,
    temperature: float = 1.0,
    guidance_weight: float = 0.02,
    advantage: float = 0.0,
    written: int = 1,
) -> pd.DataFrame:
    """Updates of the logits at a position with five tokens, of which the teacher is sure of the first.

    Args:
        teacher_token_probability: what the student gives the teacher's token at temperature 1.
        temperature: divides the student's logits.
        guidance_weight: w of TGPO.
        advantage: A of GRPO and TGPO.
        written: index of the token that the student wrote.

    Returns:
        For each token ``student`` and ``teacher`` (probabilities, the student's at the temperature) and one column for
        each of :data:`tgpo_lab.explorer.logit_updates.UPDATE_METHODS`, from
        :func:`tgpo_lab.explorer.logit_updates.logit_updates`.

    Raises:
        InputError: a probability outside (0, 1), a temperature or weight that cannot be, or no such token.
    """
    if not 0 < teacher_token_probability < 1:
        raise InputError(f"A probability must be between 0 and 1, but is {teacher_token_probability}.")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a finite number above 0, but is {temperature}.")
    if not 0 <= guidance_weight < math.inf or not math.isfinite(advantage):
        raise InputError(
            f"guidance_weight must be 0 or more and advantage finite, but they are {guidance_weight} and {advantage}."
        )
    if not 0 <= written < len(TOKENS):
        raise InputError(f"There is no token {written}: there are {len(TOKENS)}, counted from 0.")
    left = 1 - teacher_token_probability
    student = torch.tensor([teacher_token_probability, *(left * share for share in SHARES)], dtype=torch.float64)
    rest = (1 - TEACHER_SURE) / (len(TOKENS) - 1)
    teacher = torch.tensor([TEACHER_SURE, *[rest] * (len(TOKENS) - 1)], dtype=torch.float64)
    logits = student.log().unsqueeze(0) / temperature
    one = torch.ones(1, dtype=torch.float64)
    moves = logit_updates(
        logits, teacher.log().unsqueeze(0), torch.tensor([written]), advantage * one, guidance_weight * one
    )
    return pd.DataFrame(
        {
            "student": logits.softmax(-1)[0].tolist(),
            "teacher": teacher.tolist(),
            **{name: moves[name][0].tolist() for name in UPDATE_METHODS},
        },
        index=pd.Index(TOKENS, name="token"),
    )


def softmax_figure(table: pd.DataFrame) -> Figure:
    """Probabilities and updates; ``table`` as :func:`softmax_updates` gives it."""
    figure, axes = plt.subplots(
        1,
        1 + len(UPDATE_METHODS),
        figsize=(9.6, 2.5),
        layout="constrained",
        sharey=True,
        width_ratios=[1.4, 1, 1, 1, 1],
    )
    places = range(len(table))
    axes[0].barh([p - 0.19 for p in places], table["student"], 0.36, color="#4c72b0", label="student")
    axes[0].barh([p + 0.19 for p in places], table["teacher"], 0.36, color="#dd8452", hatch="//", label="teacher")
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("probability")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[0].set_yticks(list(places), table.index)
    axes[0].invert_yaxis()
    axes[0].set_axisbelow(True)
    largest = max(1e-9, float(table[list(UPDATE_METHODS)].abs().to_numpy().max()))
    for panel, name, color, hatch in zip(axes[1:], UPDATE_METHODS, COLORS, HATCHES, strict=True):
        panel.barh(list(places), table[name], 0.7, color=color, hatch=hatch)
        panel.axvline(0, color="gray", linewidth=0.8)
        panel.set_xlim(-1.1 * largest, 1.1 * largest)
        panel.set_title(METHOD_LABELS[name])
        panel.locator_params(axis="x", nbins=3)
        panel.set_xlabel("added to the logit")
        panel.grid(axis="y", visible=False)
        panel.set_axisbelow(True)
    return figure


def softmax_panel() -> Panel:
    """Move the student's probability of the teacher's token, the temperature, w and the advantage.

    All updates have one scale. Look for what RKL and exact RKL do as that probability goes to 0, and what TGPO does.
    """
    probability = slider("probability of the teacher’s token", 1e-3, -6, math.log10(0.9), 0.05, decades=True, width=460)
    temperature = slider("temperature", 1.0, 0.25, 4, 0.05)
    weight = slider("w", 0.02, 0, 1, 0.01)
    advantage = slider("advantage", 0.0, -2.5, 2.5, 0.1)
    written = ipywidgets.Dropdown(
        options=[(name, index) for index, name in enumerate(TOKENS)],
        value=1,
        description="written",
        style={"description_width": "initial"},
    )

    def compute() -> tuple[pd.DataFrame, str]:
        table = softmax_updates(
            probability.value,
            temperature=temperature.value,
            guidance_weight=weight.value,
            advantage=advantage.value,
            written=written.value,
        )
        return table, ""

    controls = [probability, temperature, weight, advantage, written]
    return Panel(controls, compute, softmax_figure, "One softmax position")
