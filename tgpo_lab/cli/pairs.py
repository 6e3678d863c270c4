"""``tgpo-lab pairs``: list, measure and rebuild pairs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import tyro

from ..diagnostics.pair_card import card_markdown, measure_pair, require_room_to_measure
from ..errors import InputError
from ..evaluation import pair_prompts
from ..files import require_writable_folder, write_json, write_text
from ..models.pairs import DATA, load_pair, shipped_pairs
from ..parallel.placement import require_device, usual_device
from ..precision import Precision, dtype_of
from ..provenance import provenance
from ..tasks.prompt_format import PromptFormat
from ..tasks.prompts import load_prompts
from ..tasks.rewards import reward_function


def pairs_command(arguments: list[str]) -> int:
    """List, measure or rebuild pairs."""
    commands = {"list": list_pairs, "measure": measure, "build": build}
    return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="tgpo-lab pairs")


def list_pairs() -> int:
    """List the shipped pairs."""
    for name in shipped_pairs():
        print(f"{name:12} {json.loads((DATA / 'pairs' / name / 'pair.json').read_text())['summary']}")
    return 0


def measure(
    student: tyro.conf.Positional[str],
    teacher: tyro.conf.Positional[str | None] = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    answer_after: str | None = None,
    prompt_template: str = "{prompt}",
    chat_template: tyro.conf.FlagCreatePairsOff[bool] = False,
    system_prompt: str | None = None,
    chat_template_options: tuple[str, ...] = (),
    count: int = 128,
    max_new_tokens: int = 80,
    reward: str = "marked_answer",
    seed: int = 0,
    device: str | None = None,
    precision: Precision = "float32",
    output: Path | None = None,
) -> int:
    """Measure a pair before training: divergence, and how reliable the teacher is on the student's prefixes.

    Args:
        student: A shipped pair's name, or the student's folder or hub name.
        teacher: The teacher's folder or hub name; left out for a shipped pair.
        dataset: Folder or file with prompts, or a hub name; left out, the pair's own.
        dataset_config: Which configuration of a dataset that has several.
        prompt_column: Column with the prompt text.
        answer_column: Column with the right answer.
        answer_after: The right answer is what stands after the last such mark in its column.
        prompt_template: Text around every prompt; {prompt} stands for it.
        chat_template: Put prompts into the chat template of the student's tokenizer.
        system_prompt: System message of that chat.
        chat_template_options: What else the template is told, as NAME=VALUE: enable_thinking=false for Qwen3.
        count: Number of prompts.
        max_new_tokens: Responses are cut after so many tokens.
        reward: How a response is judged, as in training: marked_answer, last_number, package.module:function, …
        seed: Decides the samples.
        device: Where both models compute, such as cuda:1 or cpu; left out, on a GPU if there is one.
        precision: Of their weights.
        output: Folder to write card.json and README.md to.
    """
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, but is {value}.")
    reward_function(reward)
    where, dtype = require_device(device or usual_device()), dtype_of(precision)
    form = PromptFormat(chat_template, system_prompt, prompt_template, chat_template_options)
    pair = load_pair(student, teacher, device=where, dtype=dtype, student_dtype=dtype, prompt_format=form)
    splits = None
    if dataset is not None:
        splits = load_prompts(
            dataset, prompt_column, answer_column, answer_after=answer_after, system_prompt=system_prompt,
            dataset_config=dataset_config,
        )  # fmt: skip
    prompts = splits["test" if "test" in splits else "train"] if splits is not None else pair_prompts(pair, "test")
    prompts = prompts.select(range(min(count, len(prompts))))
    require_room_to_measure(pair, prompts, max_new_tokens)  # before a folder is made
    if output is not None:
        require_writable_folder(output)
    card = measure_pair(pair, prompts, count=len(prompts), max_new_tokens=max_new_tokens, reward=reward, seed=seed)
    summary = ""
    if teacher is None:
        summary = json.loads((DATA / "pairs" / student / "pair.json").read_text())["summary"]
    text = card_markdown(card, summary)
    print(text)
    if output is not None:
        write_json(output / "card.json", {**card.as_dict(), "seed": seed, "made_by": provenance()})
        write_text(output / "README.md", text)
    return 0


def build(
    name: tyro.conf.Positional[str],
    output: Path = Path("runs/pairs"),
    opening_logprob: float | None = None,
    rival_margin: float | None = None,
    reliability: float | None = None,
    rename: str | None = None,
    threads: int = 1,
    device: str | None = None,
) -> int:
    """Rebuild a shipped pair from its seed, or one with its dials turned, then measure it (half an hour for a robust
    teacher on one core).

    Args:
        name: near, mid, far, far-fragile, or one that is not shipped: far-larger.
        output: Folder for models, prompts and the pair's card. Models that are there already are kept.
        opening_logprob: Divergence: nats that the student gives the teacher's opening, for instance -11.
        rival_margin: Nats by which all unused tokens together stay below that opening.
        reliability: Of the teacher on foreign prefixes: 0 clean text only, 1 the robust teacher, or between.
        rename: Name of the pair that is built; needed where a dial is turned.
        threads: Processor threads. Another number, or another processor, rounds differently, so weights can differ.
        device: Where the pair is built and measured, such as cuda:1 or cpu; left out, on a GPU if there is one.
    """
    from ..tiny_world.building import build_and_measure
    from ..tiny_world.recipes import PAIR_RECIPES, UNSHIPPED_RECIPES, dialled

    if threads < 1:
        raise InputError(f"threads must be 1 or more, but is {threads}.")
    where = require_device(device or usual_device())
    known = {**PAIR_RECIPES, **UNSHIPPED_RECIPES}
    if name not in known:
        raise InputError(f"There is no recipe for {name!r}: choose one of {', '.join(known)}.")
    recipe = dialled(known[name], opening_logprob=opening_logprob, rival_margin=rival_margin, reliability=reliability)
    if name in UNSHIPPED_RECIPES and recipe != known[name]:
        raise InputError(f"Dials are for the shipped pairs {', '.join(PAIR_RECIPES)}, but the pair is {name!r}.")
    if rename is None and recipe != known[name]:
        raise InputError(f"With a dial turned this is no longer the pair {name!r}. Give it another name with --rename.")
    if rename is not None and (rename in known or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", rename)):
        raise InputError(
            "rename must be a new name of letters, digits, dots and dashes, not a shipped pair's or "
            f"{', '.join(UNSHIPPED_RECIPES)}, but is {rename!r}."
        )
    name = rename or name
    torch.set_num_threads(threads)
    print(card_markdown(build_and_measure(name, recipe, output, where), recipe.summary))
    return 0
