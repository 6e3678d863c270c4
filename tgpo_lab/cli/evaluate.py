"""``tgpo-lab evaluate``: accuracy of a model on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro
from datasets import Dataset
from transformers import PreTrainedModel

from ..config import TrainConfig
from ..errors import InputError
from ..evaluation import evaluate, pair_prompts
from ..models.pairs import Pair, load_model, load_pair
from ..parallel.placement import require_device, usual_device
from ..precision import Precision, dtype_of
from ..runs import latest_checkpoint, read_config
from ..sampling.engine import OwnEngine
from ..tasks.prompt_format import PromptFormat
from ..tasks.prompts import load_prompts, training_and_held_out


@dataclass(frozen=True)
class EvaluateOptions:
    """Let a model answer held-out prompts and print its accuracy."""

    student: str = "far"
    """A shipped pair, or the student's folder or hub name."""
    teacher: str | None = None
    """The teacher's folder or hub name; left out for a shipped pair."""
    model: Literal["student", "teacher"] = "student"
    """Which of the two answers."""
    run: str | None = None
    """A training run's folder: its newest student answers instead, to the run's prompts, in its form, with responses of
    its length and judged by its reward, unless another dataset, length or reward is given here."""
    dataset: str | None = None
    """Folder or file with prompts, or a hub name; left out, the run's or the pair's own."""
    dataset_config: str | None = None
    """Which configuration of a dataset that has several."""
    split: Literal["train", "validation", "test"] | None = None
    """Which prompts: test, if left out. Of a run's own data without that split, those that the run held out; without a
    validation split, validation means these too, and train the others."""
    prompt_column: str = "prompt"
    """Column with the prompt text."""
    answer_column: str = "answer"
    """Column with the right answer."""
    answer_after: str | None = None
    """The right answer is what stands after the last such mark in its column."""
    prompt_template: str = "{prompt}"
    """Text around every prompt; {prompt} stands for it. A run has its own."""
    chat_template: tyro.conf.FlagCreatePairsOff[bool] = False
    """Put prompts into the chat template of the student's tokenizer. For a run that is decided."""
    system_prompt: str | None = None
    """System message of that chat."""
    chat_template_options: tuple[str, ...] = ()
    """What else the template is told: NAME=VALUE, with a value in JSON or as text; enable_thinking=false for Qwen3."""
    count: int | None = None
    """The first so many prompts; all if left out."""
    temperature: float = 0.0
    """0 is greedy."""
    samples_per_prompt: int = 1
    """Responses for each prompt; with more than one, pass@k is printed too."""
    max_new_tokens: int | None = None
    """Responses are cut after so many tokens: 80, or the run's, if left out."""
    sampling_rows: int | None = None
    """At most so many responses are written at once, by whole groups of a prompt: all, or as the run has it, if left
    out."""
    reward: str | None = None
    """How a response is judged: marked_answer (if left out and there is no run), exact_match, last_number, math_verify
    or package.module:function."""
    show: int = 0
    """Print so many responses."""
    seed: int = 0
    """Decides the samples."""
    device: str | None = None
    """Where the model computes, such as cuda:1 or cpu; left out, on a GPU if there is one."""
    precision: Precision | None = None
    """Of its weights: float32, or as the run has it, if left out."""


_OF_A_PAIR = (
    "model", "student", "teacher", "prompt_template", "chat_template", "system_prompt", "chat_template_options",
)  # fmt: skip
_OF_A_DATASET = ("dataset_config", "prompt_column", "answer_column", "answer_after")


def evaluate_command(arguments: list[str]) -> int:
    """Evaluate a model."""
    options = tyro.cli(EvaluateOptions, args=arguments, prog="tgpo-lab evaluate")
    for name in ("count", "samples_per_prompt", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be 1 or more, but is {value}.")
    if options.sampling_rows is not None and options.sampling_rows < 0:
        raise InputError(f"sampling_rows must be 0 (all at once) or more, but is {options.sampling_rows}.")
    if not 0 <= options.temperature < float("inf"):
        raise InputError(f"temperature must be 0 or more, but is {options.temperature}.")
    _refuse_idle_options(options)
    pair, model, config = _what_answers(options)
    prompts = _prompts(options, pair, config)
    rows = options.sampling_rows
    if rows is None:
        rows = config.sampling_rows if config else 0
    result = evaluate(
        pair,
        model,
        prompts=prompts,
        count=options.count,
        temperature=options.temperature,
        samples_per_prompt=options.samples_per_prompt,
        max_new_tokens=options.max_new_tokens or (config.max_new_tokens if config else 80),
        reward=options.reward or (config.reward if config else "marked_answer"),
        seed=options.seed,
        engine=OwnEngine(model, rows_at_once=rows),
    )
    print(f"accuracy {result.accuracy:.4f}  length {result.length:.1f}  truncated {result.truncated:.4f}")
    if options.samples_per_prompt > 1:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= options.samples_per_prompt]
        print("  ".join(f"pass@{k} {result.pass_at_k(options.samples_per_prompt, k):.4f}" for k in ks))
    texts = result.rollouts.texts(pair.tokenizer)
    for row in range(min(options.show, len(texts))):
        prompt = prompts[row // options.samples_per_prompt]
        verdict = "right" if result.rewards[row] > 0 else f"wrong, the answer is {prompt['answer']}"
        print(f"{prompt['prompt']}{texts[row]}   [{verdict}]")
    return 0


def _what_answers(options: EvaluateOptions) -> tuple[Pair, PreTrainedModel, TrainConfig | None]:
    """The pair, the model that answers, and the configuration of the run, if it is of one."""
    device = require_device(options.device or usual_device())
    config = None if options.run is None else read_config(Path(options.run))
    dtype = dtype_of(options.precision or (config.precision if config else "float32"))
    # The teacher's weights only where it answers itself.
    where = {"device": device, "dtype": dtype, "student_dtype": dtype,
             "teacher_device": None if options.model == "teacher" else "meta"}  # fmt: skip
    if config is None:
        form = PromptFormat(
            options.chat_template, options.system_prompt, options.prompt_template, options.chat_template_options
        )
        pair = load_pair(options.student, options.teacher, prompt_format=form, **where)
        return pair, pair.student if options.model == "student" else pair.teacher, None
    where["device"] = "cpu"  # the student before training, which the trained one replaces
    pair = load_pair(
        config.student, config.teacher, prompt_format=config.prompt_format, **where, **config.position_options
    )
    trained = load_model(latest_checkpoint(Path(options.run)), dtype, device)
    return replace(pair, student=trained), trained, config


def _refuse_idle_options(options: EvaluateOptions) -> None:
    """Refuse options that would change nothing.

    Raises:
        InputError: names the first of them.
    """
    idle = {}
    if options.run is not None:
        idle |= dict.fromkeys(_OF_A_PAIR, "--run evaluates the run's student, with prompts in the form that it has")
    if options.dataset is None:
        idle |= dict.fromkeys(_OF_A_DATASET, "Without --dataset the prompts are the run's or the pair's own")
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name in idle and value != item.default:
            said = "" if value is True else f" {' '.join(value) if isinstance(value, tuple) else value}"
            raise InputError(f"{idle[item.name]}; leave --{item.name.replace('_', '-')}{said} out.")


def _prompts(options: EvaluateOptions, pair: Pair, config: TrainConfig | None) -> Dataset:
    """The prompts of the split, of the data given, the run's or the pair's."""
    split = options.split or "test"
    if options.dataset is not None:
        source, splits = options.dataset, load_prompts(
            options.dataset,
            options.prompt_column,
            options.answer_column,
            answer_after=options.answer_after,
            system_prompt=options.system_prompt if config is None else config.system_prompt,
            dataset_config=options.dataset_config,
        )  # fmt: skip
    elif config is not None and config.dataset is not None:
        source, splits = config.dataset, load_prompts(config.dataset, **config.prompt_options)
        training, held_out = training_and_held_out(splits, config.evaluation_prompts, source)
        if split == "train":
            return training
        if split not in splits and options.split in (None, "validation"):
            print(f"{source} has no {split} split: these are the {len(held_out)} prompts that the run held out.")
            return held_out
    else:
        return pair_prompts(pair, split)
    if split not in splits:
        raise InputError(f"{source} has no split {split!r}: it has {', '.join(splits)}. Choose one with --split.")
    return splits[split]
