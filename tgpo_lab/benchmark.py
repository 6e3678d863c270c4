"""How fast the training loop is, phase by phase, beside the floor of :mod:`tgpo_lab.operations`.

What is timed is :func:`tgpo_lab.training.train` itself, by the clock that it writes to its metrics. Each
case is trained twice: with almost no positions measured, for the step alone, and with as many as by
default, for the step as a user has it. The first steps are dropped, the others give medians.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from .config import TrainConfig
from .files import write_text
from .models.pairs import Pair, load_pair
from .operations import PHASES, MatrixRates, work_of_step
from .tasks.prompts import load_prompts
from .training import train


@dataclass(frozen=True)
class Shape:
    """Size of a model made of random weights."""

    hidden_size: int
    layers: int
    heads: int

    def options(self) -> dict[str, object]:
        """For a configuration of transformers; the feed-forward part is three times as wide as the model."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.hidden_size // self.heads,
        }


@dataclass(frozen=True)
class RandomPair:
    """A pair of random weights in which no response ends before the token limit, so every length is exact."""

    student: Shape
    teacher: Shape
    vocabulary_size: int
    prompt_tokens: int


@dataclass(frozen=True)
class Case:
    """What is timed."""

    name: str
    pair: str | RandomPair
    """A shipped pair's name, or random weights."""
    settings: dict[str, object] = field(default_factory=dict)
    """Fields of :class:`TrainConfig` that differ from the preset ``tiny``."""


CASES = {
    case.name: case
    for case in (
        Case("tiny", "far"),
        Case(
            "small",
            RandomPair(Shape(64, 2, 4), Shape(128, 3, 4), vocabulary_size=2048, prompt_tokens=9),
            {"prompts_per_step": 16, "group_size": 8, "max_new_tokens": 64},
        ),
        Case(
            "larger",
            RandomPair(Shape(256, 4, 4), Shape(512, 6, 8), vocabulary_size=8192, prompt_tokens=9),
            {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 96},
        ),
    )
}


# ── Random weights ───────────────────────────────────────────────────────────────────────────────


def write_random_pair(pair: RandomPair, folder: Path, prompts: int = 64) -> dict[str, str]:
    """Write a Llama student, a Qwen3 teacher and random prompts under ``folder``.

    The only end token is an id one past the vocabulary. No model can write it, so no response ends
    before the limit, and nothing in the loop has to know of it.

    Returns:
        The fields ``student``, ``teacher`` and ``dataset`` of a :class:`TrainConfig`.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, pair.vocabulary_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    common = {"vocab_size": pair.vocabulary_size, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None,
              "eos_token_id": None}  # fmt: skip
    for name, model in (
        ("student", LlamaForCausalLM(LlamaConfig(**common, **pair.student.options()))),
        ("teacher", Qwen3ForCausalLM(Qwen3Config(**common, **pair.teacher.options()))),
    ):
        model.generation_config.eos_token_id = pair.vocabulary_size
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = torch.randint(2, pair.vocabulary_size, (2 * prompts, pair.prompt_tokens)).tolist()
    lines = [f'{{"prompt": "{" ".join(f"w{i}" for i in row)}", "answer": "0"}}\n' for row in words]
    (folder / "prompts").mkdir()
    write_text(folder / "prompts" / "train.jsonl", "".join(lines[:prompts]))
    write_text(folder / "prompts" / "validation.jsonl", "".join(lines[prompts:]))
    return {name: str(folder / part) for name, part in
            (("student", "student"), ("teacher", "teacher"), ("dataset", "prompts"))}  # fmt: skip


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────


def measure_case(case: Case, *, steps: int, warmup_steps: int, **changes: object) -> dict[str, object]:
    """Train a case and measure its steps.

    Args:
        case: what is timed.
        steps: steps that count.
        warmup_steps: steps before them that do not.
        changes: further fields of :class:`TrainConfig`.

    Returns:
        Plain values: seconds (median, smallest and largest), tokens per second of the student's response
        tokens, operations, both floors in seconds, and peak memory in bytes.

    Raises:
        InputError: an unknown shipped pair.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {"student": case.pair}
        if isinstance(case.pair, RandomPair):
            paths = write_random_pair(case.pair, Path(folder) / "pair")
        config = TrainConfig.preset("tiny", "tgpo", **paths, **case.settings).with_changes(
            steps=warmup_steps + steps,
            evaluate_every=0,
            evaluation_prompts=1,
            gradient_terms_every=0,
            checkpoint_every=warmup_steps + steps,
            **changes,
        )
        bare_config = config.with_changes(measured_positions=1, output=f"{folder}/bare")
        bare = train(bare_config, show_progress=False).metrics.iloc[warmup_steps:-1]  # the last row is no step
        whole = train(config.with_changes(output=f"{folder}/whole"), show_progress=False).metrics.iloc[warmup_steps:-1]
        memory = peak_memory()
        pair = load_pair(config.student, config.teacher, device="cuda" if torch.cuda.is_available() else "cpu")
        prompt = _mean_prompt_length(config, pair)

    tokens, response = float(bare["tokens"].median()), round(bare["length"].median())
    work = work_of_step(pair.student, pair.teacher, config.prompts_per_step, config.group_size, prompt, response)
    rates = MatrixRates(pair.student.device)
    own_shapes = {phase: rates.floor_of_own_shapes(work[phase]) for phase in PHASES}
    timed = {phase: bare[f"seconds_{phase}"] for phase in PHASES}
    timed["step"] = bare[[f"seconds_{phase}" for phase in (*PHASES, "reward")]].sum(axis=1)
    timed["measured step"] = whole[[f"seconds_{phase}" for phase in (*PHASES, "reward", "measure")]].sum(axis=1)
    rows = {}
    for name, seconds in timed.items():
        counted = [name] if name in PHASES else list(PHASES)
        floor = sum(rates.floor(work[phase]) for phase in counted)
        floor_own = sum(own_shapes[phase] for phase in counted)
        median = float(seconds.median())
        rows[name] = {
            "seconds": median,
            "seconds_min": float(seconds.min()),
            "seconds_max": float(seconds.max()),
            "tokens_per_second": tokens / median,
            "operations": sum(work[phase].operations for phase in counted),
            "floor_seconds": floor,
            "ratio_to_floor": median / floor,
            "floor_of_own_shapes_seconds": floor_own,
            "ratio_to_floor_of_own_shapes": median / floor_own,
        }
    return {
        "case": case.name,
        "config": config.as_dict(),
        "prompt_tokens": prompt,
        "response_tokens": response,
        "steps": steps,
        "rows": rows,
        "rates": {"square": rates.square, "best": rates.best},
        **memory,
    }


def measure_in_own_process(case: Case, **options: object) -> dict[str, object]:
    """:func:`measure_case` in a fresh process, so that peak memory is the case's own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measure_case, case, **options).result()


def peak_memory() -> dict[str, int | None]:
    """Most memory that this process has held, in bytes: resident, and on the GPU if there is one."""
    if sys.platform == "win32":
        resident = psutil.Process().memory_info().peak_wset
    else:
        import resource  # does not exist on Windows

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_resident_bytes": resident, "peak_gpu_bytes": gpu}


def _mean_prompt_length(config: TrainConfig, pair: Pair) -> int:
    prompts = load_prompts(config.dataset or pair.prompts, **config.prompt_options)["train"]["prompt"]
    return round(sum(map(len, pair.encode(list(prompts)))) / len(prompts))
