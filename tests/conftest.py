"""What several test files share: one thread, no network, a random pair of models and a tiny configuration.

The random pair is the cheapest one that the whole package accepts: two architectures, the
project's own tokenizer (2,048 tokens), 36 prompts. Its weights are random but for 30 steps of
training in which both models learn to end in "#7" or "#8", one second in all. So its samples are
not dull: nine in ten responses end within 12 tokens, rewards differ within almost every group, and
the teacher is right more often than the student.
"""

import os

# Before torch, tokenizers and huggingface_hub are imported: they read these once.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from tgpo_lab.cli import main
from tgpo_lab.config import TrainConfig
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import DATA
from tgpo_lab.tiny_world.tokenizer import build_tokenizer

torch.set_num_threads(1)
# No deadline: the machine may be busy. The same examples every time: a failure can be repeated anywhere.
hypothesis.settings.register_profile("tgpo_lab", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tgpo_lab")

FILLER_WORDS = DATA / "tokenizer" / "filler_words.txt"
ANSWER = 7  # every sum of the random pair's prompts


@dataclass(frozen=True)
class RandomPair:
    """Folders of a pair with random weights. Read only: tests that damage a model copy it first."""

    student: Path
    """LlamaForCausalLM, 2 layers of width 32, with its tokenizer. Right in about a third of its samples."""
    teacher: Path
    """Qwen3ForCausalLM, 2 layers of width 32, with the same tokenizer. Right in about two thirds of its samples."""
    prompts: Path
    """Folder with train.jsonl (24 prompts), validation.jsonl (6) and test.jsonl (6)."""


@pytest.fixture(scope="session")
def tokenizer():
    """The project's own tokenizer, freshly built: 2,048 tokens."""
    return build_tokenizer(FILLER_WORDS)


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> RandomPair:
    """A pair of small random models, made once for all tests."""
    transformers_logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("random-pair")
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = LlamaForCausalLM(LlamaConfig(**shape))
        teacher = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))
    for model, name, right in ((student, "student", 0.5), (teacher, "teacher", 0.9)):
        _learn_to_end(model, tokenizer, right)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write_prompts(folder / "prompts")
    return RandomPair(folder / "student", folder / "teacher", folder / "prompts")


@pytest.fixture(scope="session")
def tiny_config(random_pair: RandomPair) -> Callable[..., TrainConfig]:
    """A function ``tiny_config(tmp_path, **changes)``: a run of 3 steps on the random pair, well under a second.

    Each step samples 2 prompts × 4 responses of at most 12 tokens; the run goes to ``tmp_path/run``.
    ``changes`` are fields of TrainConfig; ``method`` may also be a name, with the options of the tiny preset.
    """

    def make(tmp_path: Path, **changes) -> TrainConfig:
        method = changes.pop("method", "tgpo")
        values = {
            "student": str(random_pair.student),
            "teacher": str(random_pair.teacher),
            "dataset": str(random_pair.prompts),
            "method": make_method(method, tiny=True) if isinstance(method, str) else method,
            "steps": 3,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_new_tokens": 12,
            "evaluate_every": 2,
            "evaluation_prompts": 4,
            "gradient_terms_every": 2,
            "checkpoint_every": 2,
            "output": str(tmp_path / "run"),
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in of tests/stand_in_vllm, importable as vllm."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_in_vllm")))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    yield importlib.import_module("vllm")
    sys.modules.pop("vllm", None)


@pytest.fixture(scope="session")
def untied(random_pair, tmp_path_factory) -> Path:
    """The random student with an output matrix of its own, as vLLM wants it on a CPU."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(random_pair.student)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_pair.student).save_pretrained(folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a tgpo-lab command in this process: ``command("evaluate", "--count", 2)``.

    Gives the exit status, what it printed and what it wrote to the error stream. An exception that a
    user would see as a traceback is not caught.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # from the parser
            status = stop.code
        return status, *capsys.readouterr()

    return run


def _learn_to_end(model: PreTrainedModel, tokenizer, right: float) -> None:
    """Train on random tokens with "#7" or "#8" and the end of text among them; ``right`` is the share of "#7"."""
    mark, digit, end = tokenizer.convert_tokens_to_ids(["#", str(ANSWER), tokenizer.eos_token])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    row = torch.arange(32)
    for _ in range(30):
        tokens = torch.randint(40, len(tokenizer), (len(row), 8), generator=generator)
        at = torch.randint(1, 6, (len(row),), generator=generator)
        wrong = (torch.rand(len(row), generator=generator) >= right).long()
        tokens[row, at], tokens[row, at + 1], tokens[row, at + 2] = mark, digit + wrong, end
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()


def _write_prompts(folder: Path) -> None:
    """The 36 ordered sums a+b+c = 7, shared out among three splits."""
    folder.mkdir()
    sums = [f"{a}+{b}+{ANSWER - a - b}=" for a in range(ANSWER + 1) for b in range(ANSWER + 1 - a)]
    rows = [json.dumps({"prompt": text, "answer": str(ANSWER)}) + "\n" for text in sums]
    rows = [row for start in range(5) for row in rows[start::5]]  # mixed, but not by chance
    for split, part in (("train", rows[:24]), ("validation", rows[24:30]), ("test", rows[30:])):
        (folder / f"{split}.jsonl").write_text("".join(part))
