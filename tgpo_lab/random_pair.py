"""Pairs of random weights in any size, whose responses all have the length that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from .files import write_text
from .parallel.placement import usual_device
from .precision import Precision, dtype_of
from .progress_bars import hide_bars_of_weights


@dataclass(frozen=True)
class Dimensions:
    """Size of a model made of random weights."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int | None = None
    """Width of the feed-forward part; left out, three times that of the model."""
    key_value_heads: int | None = None
    """Heads of keys and values; left out, as many as of queries."""
    tied: bool = True
    """Whether the output layer is the embeddings."""

    def options(self) -> dict[str, object]:
        """For a configuration of transformers."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size or 3 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads or self.heads,
            "head_dim": self.hidden_size // self.heads,
            "tie_word_embeddings": self.tied,
        }


@dataclass(frozen=True)
class RandomPair:
    """A pair of random weights in which no response ends before the token limit, so every length is exact."""

    student: Dimensions
    teacher: Dimensions
    vocabulary_size: int
    prompt_tokens: int

    def configurations(self) -> dict[str, PretrainedConfig]:
        """Of ``student``, a Llama, and ``teacher``, a Qwen3."""
        common = {"vocab_size": self.vocabulary_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        return {
            "student": LlamaConfig(**common, **self.student.options()),
            "teacher": Qwen3Config(**common, **self.teacher.options()),
        }


def write_random_pair(
    pair: RandomPair, folder: Path, prompts: int = 64, precision: Precision = "float32"
) -> dict[str, str]:
    """Write student, teacher and random prompts under ``folder``; the models are made on the GPU if there is one.

    The only end token is an id one past the vocabulary. No model can write it, so no response ends
    before the limit, and nothing in the loop has to know of it.

    Args:
        pair: sizes and architectures.
        folder: where they go.
        prompts: for training, and as many held-out ones.
        precision: of all weights as they are made and written. A loop that trains in float32 widens them.

    Returns:
        The fields ``student``, ``teacher`` and ``dataset`` of a :class:`tgpo_lab.config.TrainConfig`.
    """
    hide_bars_of_weights()
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, pair.vocabulary_size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    paths = paths_of(folder)
    for name, config in pair.configurations().items():
        with torch.device(usual_device()):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(precision))
        model.generation_config.eos_token_id = pair.vocabulary_size
        model.save_pretrained(paths[name], max_shard_size="2GB")  # from a GPU a whole file goes through memory
        tokenizer.save_pretrained(paths[name])
        del model
        torch.cuda.empty_cache()  # nothing where there is no GPU
    words = torch.randint(2, pair.vocabulary_size, (2 * prompts, pair.prompt_tokens)).tolist()
    lines = [f'{{"prompt": "{" ".join(f"w{i}" for i in row)}", "answer": "0"}}\n' for row in words]
    texts = Path(paths["dataset"])
    texts.mkdir()
    write_text(texts / "train.jsonl", "".join(lines[:prompts]))
    write_text(texts / "validation.jsonl", "".join(lines[prompts:]))
    return paths


def paths_of(folder: Path) -> dict[str, str]:
    """Where :func:`write_random_pair` puts things."""
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "dataset": str(folder / "prompts")}
