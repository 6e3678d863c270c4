"""What the browser shows, as plain values: the responses of one step with every number, legend and colour.

A number is rounded to four significant digits. Infinite ones are the texts "Infinity" and "-Infinity", which JSON
lacks and JavaScript's Number() takes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..explorer.explored_response import ExploredResponse
from ..explorer.logit_updates import UPDATE_METHODS
from ..explorer.token_colors import palette
from ..explorer.token_text import printable_text, visible_text
from .quantities import Quantity, as_plain

COMPARED_TOKENS = 8
METHOD_LABELS = {"rkl": "RKL", "exact-rkl": "exact RKL", "grpo": "GRPO", "tgpo": "TGPO"}


def build_scene(
    responses: Sequence[ExploredResponse],
    quantities: Sequence[Quantity],
    run_labels: Sequence[str],
    *,
    step: int,
    steps: Sequence[int],
    fresh: bool,
    can_sample: bool,
    can_undo: bool,
) -> dict[str, object]:
    """The scene of one step.

    Args:
        responses: what to show, branches after the samples.
        quantities: with their scales.
        run_labels: one for each run.
        step: that is shown.
        steps: of the slider.
        fresh: whether each step's student wrote its own responses.
        can_sample: whether it could.
        can_undo: whether there is a branch to undo.
    """
    texts: dict[str, str] = {}
    entries = [_entry(response, quantities, texts) for response in responses]
    return {
        "step": step,
        "steps": list(steps),
        "fresh": fresh,
        "can_sample": can_sample,
        "can_undo": can_undo,
        "runs": [printable_text(label) for label in run_labels],
        "quantities": [as_plain(quantity) for quantity in quantities],
        "methods": [[name, METHOD_LABELS[name]] for name in UPDATE_METHODS],
        "palettes": {"light": palette(), "dark": palette(dark=True)},
        "texts": texts,
        "responses": entries,
    }


def name_label(name: str) -> str:
    """What a response is called on the page: ``0:0`` is sample 1, ``0:b1`` is branch 1."""
    place = name.partition(":")[2]
    return f"branch {place[1:]}" if place.startswith("b") else f"sample {int(place) + 1}"


def rounded(values: Tensor) -> list:
    """Nested lists of numbers with four significant digits, infinite ones as text."""
    array = values.detach().double().cpu().numpy()
    finite = np.where(np.isfinite(array), array, 0.0)
    with np.errstate(divide="ignore"):
        digits = np.where(finite == 0, 0.0, 3 - np.floor(np.log10(np.abs(finite))))
    scale = 10.0 ** np.clip(digits, 0, 22)  # exact up to 10²², so the quotient has a short decimal form
    short = np.round(finite * scale) / scale
    if np.isfinite(array).all():
        return short.tolist()
    return _spelled((np.where(np.isfinite(array), short, array)).tolist())


def _spelled(values: list | float) -> list | float | str:
    if isinstance(values, list):
        return [_spelled(value) for value in values]
    if math.isnan(values):
        return "NaN"
    return values if math.isfinite(values) else ("Infinity" if values > 0 else "-Infinity")


def _entry(response: ExploredResponse, quantities: Sequence[Quantity], texts: dict[str, str]) -> dict[str, object]:
    view, row, length = response.view, response.row, response.length
    written, best = (v[row, :length].tolist() for v in (view.rollouts.responses, view.teacher_best))
    student_top, teacher_top = (v[row, :length].tolist() for v in (view.student_top_tokens, view.teacher_top_tokens))
    columns = view.quantities()
    compared, updates = _compared(response, written, student_top, teacher_top)
    for tokens in (written, best, *student_top, *teacher_top):
        for token in tokens:
            if str(token) not in texts:
                texts[str(token)] = visible_text(response.pair.tokenizer, token)
    branch = response.branch
    return {
        "name": response.name,
        "run": response.run,
        "step": response.step,
        "label": name_label(response.name),
        "prompt": printable_text(response.prompt),
        "answer": None if response.answer is None else printable_text(response.answer),
        "reward": response.reward,
        "finished": response.finished,
        "temperature": view.temperature,
        "advantage": rounded(view.advantages[row]),
        "guidance_weight": view.guidance_weight,
        "branch": None
        if branch is None
        else {
            "parent": branch.parent,
            "parent_label": name_label(branch.parent),
            "position": branch.position,
            "token": branch.token,
            "right": branch.right_continuations,
            "continuations": branch.continuations,
        },
        "tokens": written,
        "best": best,
        "columns": {q.name: rounded(columns[q.name][row, :length]) for q in quantities},
        "logprobs": [rounded(v[row, :length]) for v in (view.student_logprobs, view.teacher_logprobs)],
        "ranks": [v[row, :length].tolist() for v in (view.student_ranks, view.teacher_ranks)],
        "proposal_logprobs": rounded(view.student_proposal_logprobs[row, :length]),
        "proposal_ranks": view.student_proposal_ranks[row, :length].tolist(),
        "top": [student_top, teacher_top],
        "top_logprobs": [rounded(v[row, :length]) for v in (view.student_top_logprobs, view.teacher_top_logprobs)],
        "compared": compared,
        "updates": updates,
    }


def _compared(
    response: ExploredResponse, written: list[int], student_top: list[list[int]], teacher_top: list[list[int]]
) -> tuple[list[list[int]], list[list[list]]]:
    """For each position the tokens of the bars, most telling first, and each method's updates of them."""
    view, row, length = response.view, response.row, response.length
    width = view.student_top_tokens.shape[-1]
    # Columns of listed_tokens: the written token, then both lists by turns, the teacher's first.
    order = [0, *(c for rank in range(width) for c in (1 + width + rank, 1 + rank))]
    methods = [rounded(view.updates[name][row, :length]) for name in UPDATE_METHODS]
    compared, updates = [], []
    for position in range(length):
        listed = [written[position], *student_top[position], *teacher_top[position]]
        columns: dict[int, int] = {}
        for column in order:
            if len(columns) < COMPARED_TOKENS:
                columns.setdefault(listed[column], column)
        compared.append(list(columns))
        updates.append([[method[position][column] for column in columns.values()] for method in methods])
    return compared, updates
