"""Building a pair from its recipe: prompts, tokenizer, student and teacher, as files.

python -m tgpo_lab pairs build far --output runs/pairs

On a GPU it has not been run yet; on a CPU it is tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..diagnostics.pair_card import PairCard, card_markdown, measure_pair
from ..errors import InputError
from ..files import require_writable_folder, write_json, write_text, written_folder
from ..models.pairs import DATA, Pair, load_model, load_pair
from ..progress_bars import hide_bars_of_weights
from ..provenance import provenance
from ..tasks.prompts import load_prompts
from .arithmetic import SPLIT_SHARES, AdditionTask, prompt_text, worked_text
from .pretraining import (
    acquaint_teacher,
    build_student_skill,
    build_teacher,
    set_student_opening,
    untrained_student,
    untrained_teacher,
)
from .recipes import PairRecipe, StudentRecipe, TeacherRecipe, on_task
from .tokenizer import build_tokenizer

PROMPT_COUNTS = {"train": 4096, "validation": 256, "test": 512}
SECOND_STAGE_FIELDS = {"opening_logprob", "rival_margin", "opening"}
RECIPE_FILE = "recipe.json"
FILLER_WORDS = DATA / "tokenizer" / "filler_words.txt"
CPU = torch.device("cpu")


def build_pair(name: str, recipe: PairRecipe, output: Path, device: torch.device = CPU) -> Path:
    """Build a pair under ``output`` (``models/``, ``prompts/`` and ``pairs/NAME/pair.json``) on a device.

    A model that ``output`` already holds is taken as it is: pairs share models, and models share their first stage.
    On a GPU the same recipe gives other weights than on a CPU, by rounding.

    Returns:
        The folder with ``pair.json``.

    Raises:
        InputError: a folder that cannot be written, or a recipe that does not reach its goal.
    """
    require_writable_folder(output)
    tokenizer = build_tokenizer(FILLER_WORDS)
    task = recipe.student.task
    prompts = output / "prompts" / f"addition-{task.name}"
    if not prompts.exists():
        write_prompts(task, prompts)
    student = _built(
        output, recipe.student_name, asdict(recipe.student), tokenizer,
        lambda: _student(recipe.student, tokenizer, output, device),
    )  # fmt: skip
    teacher = _built(
        output, recipe.teacher_name, asdict(recipe.teacher), tokenizer,
        lambda: _teacher(recipe.teacher, tokenizer, output, device),
    )  # fmt: skip
    pair = output / "pairs" / name
    pair.mkdir(parents=True, exist_ok=True)
    places = {"student": student, "teacher": teacher, "prompts": prompts}
    write_json(
        pair / "pair.json",
        {
            "summary": recipe.summary,
            **{key: str(path.relative_to(output)) for key, path in places.items()},
            "recipe": recipe.as_dict(),
            "made_by": provenance(device),
        },
    )
    return pair


def build_and_measure(name: str, recipe: PairRecipe, output: Path, device: torch.device = CPU) -> PairCard:
    """:func:`build_pair`, then the pair's card beside its ``pair.json``: ``card.json`` and ``README.md``."""
    folder = build_pair(name, recipe, output, device)
    entry = json.loads((folder / "pair.json").read_text())
    pair = load_pair(output / entry["student"], output / entry["teacher"], device=device)
    pair.name = name
    card = measure_pair(
        pair, load_prompts(output / entry["prompts"])["test"], max_new_tokens=response_limit(recipe.student.task, pair)
    )
    write_json(folder / "card.json", {**card.as_dict(), "seed": 0, "made_by": provenance(device)})
    write_text(folder / "README.md", card_markdown(card, recipe.summary))
    return card


def number_of_weights(recipe: StudentRecipe | TeacherRecipe) -> int:
    """How many weights a model of the recipe has, output embeddings counted once with the input's."""
    make = untrained_student if isinstance(recipe, StudentRecipe) else untrained_teacher
    with torch.device("meta"):
        return make(recipe, build_tokenizer(FILLER_WORDS)).num_parameters()


def response_limit(task: AdditionTask, pair: Pair) -> int:
    """Tokens for the longest worked response and a third more, so that none is cut; 80 at least, as in a run."""
    longest = worked_text((10**task.digits - 1,) * task.operands)
    return max(80, len(pair.tokenizer.encode(longest)) * 4 // 3)


def _student(
    recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase, output: Path, device: torch.device
) -> PreTrainedModel:
    # What the second stage wants is no part of the first one, which students share.
    first = {key: value for key, value in asdict(recipe).items() if key not in SECOND_STAGE_FIELDS}
    skill = _built(
        output, on_task("student-skill", recipe.task), first, tokenizer,
        lambda: build_student_skill(recipe, tokenizer, device),
    )  # fmt: skip
    return set_student_opening(load_model(skill, torch.float32, device), recipe, tokenizer)


def _teacher(
    recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerBase, output: Path, device: torch.device
) -> PreTrainedModel:
    if recipe.until_reliability is None:
        return build_teacher(recipe, tokenizer, device)
    clean = replace(recipe, foreign_share=0.0, until_reliability=None)
    start = _built(
        output,
        on_task("teacher-fragile", recipe.task),
        asdict(clean),
        tokenizer,
        lambda: build_teacher(clean, tokenizer, device),
    )
    return acquaint_teacher(load_model(start, torch.float32, device), recipe, tokenizer)


def _built(
    output: Path,
    name: str,
    recipe: dict,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[], PreTrainedModel],
) -> Path:
    """Folder of a model under ``output``, which is built first if it is not there.

    Raises:
        InputError: a model of that name is there, but was built from another recipe.
    """
    folder = output / "models" / name
    wanted = json.loads(json.dumps(recipe))
    if folder.exists():
        stored = folder / RECIPE_FILE
        if stored.exists() and json.loads(stored.read_text()) != wanted:
            raise InputError(
                f"{folder} was built from another recipe than this pair's {name}. Give another --output, or remove it."
            )
        return folder
    hide_bars_of_weights()
    model = build()
    with written_folder(folder) as writing:
        model.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
        write_json(writing / RECIPE_FILE, wanted)
    return folder


def write_prompts(task: AdditionTask, folder: Path, seed: int = 0) -> None:
    """Write train, validation and test prompts; no sum stands in two of them, in any order of operands."""
    distinct = math.comb(9 * 10 ** (task.digits - 1) + task.operands - 1, task.operands)
    if 0.8 * SPLIT_SHARES["train"] * distinct < PROMPT_COUNTS["train"]:
        raise InputError(
            f"A task of {task.operands} operands with {task.digits} digits has only {distinct} different sums, too few "
            f"for {sum(PROMPT_COUNTS.values())} prompts in three splits. Take more operands or digits."
        )
    with written_folder(folder) as writing:
        for number, (split, count) in enumerate(PROMPT_COUNTS.items()):
            stream = task.distinct(np.random.default_rng([seed, number]), split)
            rows = [
                {"prompt": prompt_text(p), "answer": str(sum(p))} for p, _ in zip(stream, range(count), strict=False)
            ]
            write_text(writing / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
