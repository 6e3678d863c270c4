"""Building a pair from its recipe: prompts, tokenizer, student and teacher, as files.

python -m tgpo_lab pairs build far --output runs/pairs
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..files import require_writable_folder, write_json, write_text, written_folder
from ..pairs import DATA
from ..provenance import provenance
from .arithmetic import SPLIT_SHARES, AdditionTask, prompt_text
from .pretraining import build_student_skill, build_teacher, set_student_opening
from .recipes import PAIR_RECIPES, PairRecipe
from .tokenizer import build_tokenizer

PROMPT_COUNTS = {"train": 4096, "validation": 256, "test": 512}
FILLER_WORDS = DATA / "tokenizer" / "filler_words.txt"


def build_pair(name: str, output: Path) -> Path:
    """Build a named pair under ``output`` (``models/``, ``prompts/`` and ``pairs/NAME/pair.json``).

    A model that ``output`` already holds is taken as it is: pairs share models.

    Raises:
        InputError: unknown name, or a folder that cannot be written.
    """
    if name not in PAIR_RECIPES:
        raise InputError(f"There is no recipe for {name!r}: choose one of {', '.join(PAIR_RECIPES)}.")
    require_writable_folder(output)
    return build_from_recipe(name, PAIR_RECIPES[name], output)


def build_from_recipe(name: str, recipe: PairRecipe, output: Path) -> Path:
    """Build a pair from any recipe; returns the folder with ``pair.json``."""
    tokenizer = build_tokenizer(FILLER_WORDS)
    prompts = output / "prompts" / f"addition-{recipe.student.task.operands}x{recipe.student.task.digits}"
    if not prompts.exists():
        write_prompts(recipe.student.task, prompts)
    student, teacher = output / "models" / recipe.student_name, output / "models" / recipe.teacher_name
    if not student.exists():
        skilled = build_student_skill(recipe.student, tokenizer)
        _save(set_student_opening(skilled, recipe.student, tokenizer), tokenizer, student)
    if not teacher.exists():
        _save(build_teacher(recipe.teacher, tokenizer), tokenizer, teacher)
    pair = output / "pairs" / name
    pair.mkdir(parents=True, exist_ok=True)
    places = {"student": student, "teacher": teacher, "prompts": prompts}
    write_json(
        pair / "pair.json",
        {
            "summary": recipe.summary,
            **{key: str(path.relative_to(output)) for key, path in places.items()},
            "recipe": recipe.as_dict(),
            "made_by": provenance(),
        },
    )
    return pair


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


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    with written_folder(folder) as writing:
        model.save_pretrained(writing)
        tokenizer.save_pretrained(writing)
