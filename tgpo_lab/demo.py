"""The demo: the same student trained by several methods, one table, one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from transformers import PreTrainedModel

from .config import TrainConfig
from .errors import InputError
from .evaluation import evaluate, pair_prompts
from .models.pairs import Pair, load_pair
from .reports.comparison import format_table, percent, summary_table
from .reports.report import write_report
from .reports.sample_rollouts import AnnotatedRollout, annotate
from .runs import CONFIG_FILE, RunResult, load_run, read_config, resume_checkpoint
from .training import train

SAMPLE_ROLLOUTS = 3
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class DemoResult:
    """What a finished demo made."""

    runs: dict[str, RunResult]
    """Method name → its run."""
    table: pd.DataFrame
    """See :func:`tgpo_lab.reports.comparison.summary_table`; accuracies are on the test prompts."""
    report: Path


def run_demo(
    output: Path, steps: int, seed: int, pair: str, methods: Sequence[str] = ("rkl", "grpo", "tgpo")
) -> DemoResult | None:
    """Train a student by each method from the same start, with the same prompts, samples a step and updates.

    Finished runs in ``output`` are taken as they are and unfinished ones go on, so a demo that was
    stopped is continued by the same call.

    Args:
        output: folder; each method's run goes to ``output/method``, the report to ``output/report.html``.
        steps: batches for each method.
        seed: decides prompts and random numbers, the same for every method.
        pair: name of a shipped pair.
        methods: names of methods.

    Returns:
        The runs, the table and the report; None if Ctrl-C stopped the demo.

    Raises:
        InputError: no or repeated methods, an unknown method or pair, or a run of another configuration in ``output``.
        NonFiniteError: see :func:`tgpo_lab.training.train`.
    """
    if not methods or len(set(methods)) != len(methods):
        raise InputError(f"methods must be names without repeats, at least one, but are {list(methods)}.")
    console = Console(highlight=False, markup=False)
    output = Path(output)
    configs = {
        method: TrainConfig.preset(
            "tiny", method=method, student=pair, steps=steps, seed=seed, output=str(output / method)
        )
        for method in methods
    }
    for config in configs.values():  # before the first hour of training, not after it
        _refuse_other_run(config)
    loaded = load_pair(pair)
    test_prompts = pair_prompts(loaded, "test")

    console.print(f"Before training: accuracy on {len(test_prompts)} test prompts …")
    some_config = configs[methods[0]]
    start_accuracy = _accuracy(loaded, loaded.student, some_config)
    start_rollouts = _rollouts(loaded, loaded.student, some_config)
    console.print(f"Before training: {percent(start_accuracy)} of the test prompts answered rightly.")

    runs: dict[str, RunResult] = {}
    accuracies: dict[str, float] = {}
    rollouts: dict[str, dict[str, list[AnnotatedRollout]]] = {}
    for number, (method, config) in enumerate(configs.items(), start=1):
        console.print(f"[{number}/{len(configs)}] {method}: {steps} steps in {config.output}", soft_wrap=True)
        run = _train_or_load(config)
        if not run.completed:
            console.print(
                f"The demo was stopped in {method}; what is finished is kept. To go on: the same command again.",
                soft_wrap=True,
            )
            return None
        runs[method] = run
        accuracies[method] = _accuracy(loaded, run.student, config)
        rollouts[method] = {"before": start_rollouts, "after": _rollouts(loaded, run.student, config)}
        console.print(f"After training: {percent(accuracies[method])} of the test prompts answered rightly.")

    before = dict.fromkeys(runs, start_accuracy)
    table = summary_table(runs, before, accuracies)
    report = write_report(
        output / REPORT_FILE,
        f"{', '.join(methods)} on the pair {pair}",
        runs,
        rollouts,
        before=before,
        after=accuracies,
    )
    print(format_table(table, max(80, console.width)))
    console.print(f"Report with figures and sample rollouts: {report}", soft_wrap=True)
    return DemoResult(runs, table, report)


def _refuse_other_run(config: TrainConfig) -> None:
    """Refuse a folder that holds a run of another configuration (the folder may have been moved)."""
    directory = Path(config.output)
    if not (directory / CONFIG_FILE).exists():
        return
    stored, wanted = read_config(directory).as_dict(), config.as_dict()
    for name, value in wanted.items():
        if name != "output" and stored[name] != value:
            raise InputError(
                f"{directory} holds a run with {name}={stored[name]!r}, but this demo has {value!r}. "
                "Give another output folder, remove that one, or run the demo with the earlier settings."
            )


def _train_or_load(config: TrainConfig) -> RunResult:
    """Train, go on with an unfinished run, or read a finished one."""
    directory = Path(config.output)
    if not (directory / CONFIG_FILE).exists():
        return train(config)
    if resume_checkpoint(directory, config.steps) is None:  # killed before its first
        return train(config, resume=True)
    run = load_run(directory)
    # A run that was killed at the very end has its last checkpoint, but not yet its last accuracy.
    if run.completed and bool((run.metrics["step"] == config.steps).any()):
        return run
    return train(config, resume=True)


def _accuracy(pair: Pair, student: PreTrainedModel, config: TrainConfig) -> float:
    """Share of all test prompts answered rightly by greedy decoding."""
    return evaluate(
        pair, student, split="test", max_new_tokens=config.max_new_tokens, reward=config.reward, seed=config.seed
    ).accuracy


def _rollouts(pair: Pair, student: PreTrainedModel, config: TrainConfig) -> list[AnnotatedRollout]:
    """Responses to the first test prompts, sampled as in training."""
    prompts = pair_prompts(pair, "test")
    prompts = prompts.select(range(min(SAMPLE_ROLLOUTS, len(prompts))))
    return annotate(
        pair,
        student,
        list(prompts["prompt"]),
        list(prompts["answer"]),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        reward=config.reward,
    )
