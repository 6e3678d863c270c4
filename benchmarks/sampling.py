"""Tokens per second of the ways to sample, beside the floor set by bytes over this machine's bandwidth.

    python benchmarks/sampling.py                                             # small, on a CPU
    python benchmarks/sampling.py --hidden-size 1536 --layers 28 --heads 12 --key-value-heads 2 \
        --intermediate-size 8960 --vocabulary 151936 --rows 64 --response-tokens 512 --precision bfloat16 \
        --paths growing fixed compiled vllm     # the shapes of Qwen2.5-1.5B, on a GPU

Weights are random and no response ends early, so every length is exact. The floor is that of
:mod:`tgpo_lab.bandwidth`: bytes that sampling has to read, over the bandwidth of a large copy. What fits into a
processor's cache can be read faster than that: with small models on a CPU it is a measure and no bound.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from bad_input import require_at_least, run_script
from kept_results import RESULTS, keep_results
from transformers import Qwen2Config, Qwen2ForCausalLM

from tgpo_lab.bandwidth import bandwidth, bytes_of_sampling
from tgpo_lab.errors import InputError
from tgpo_lab.operations import seconds_of
from tgpo_lab.provenance import provenance
from tgpo_lab.sampling.engine import Engine, OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.sampling.vllm_engine import VLLMEngine, require_vllm

OWN_FILE = RESULTS / "sampling.json"
SAMPLES_PER_PROMPT = 4


@dataclass(frozen=True)
class Options:
    """Compare the ways to sample."""

    hidden_size: int = 128
    """Width of the model."""
    intermediate_size: int = 384
    """Width inside its feed-forward part."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Heads of queries."""
    key_value_heads: int = 2
    """Heads of keys and values; each serves as many heads of queries."""
    vocabulary: int = 8192
    """Tokens."""
    rows: int = 16
    """Responses sampled at once, four of each prompt."""
    prompt_tokens: int = 16
    """Length of each prompt."""
    response_tokens: int = 64
    """Length of each response."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and products."""
    paths: tuple[Literal["growing", "fixed", "compiled", "vllm"], ...] = ("growing", "fixed")
    """growing: as by default. fixed: tensors of fixed shape. compiled: those through torch.compile. vllm: the extra."""
    rounds: int = 3
    """Samplings that count; one before them does not."""
    note: str = ""
    """A remark on the machine that is kept with the numbers, for example that it was shared."""
    output: Path = OWN_FILE
    """Where the numbers go. At the default place the table goes into README.md as well."""

    def __post_init__(self) -> None:
        require_at_least(
            1, self, "intermediate_size", "layers", "vocabulary", "prompt_tokens", "response_tokens", "rounds"
        )
        for name, value, parts, what in (
            ("rows", self.rows, SAMPLES_PER_PROMPT, "the samples of a prompt"),
            ("hidden_size", self.hidden_size, self.heads, "heads"),
            ("heads", self.heads, self.key_value_heads, "key_value_heads"),
        ):
            if value < 1 or parts < 1 or value % parts:
                raise InputError(f"{name} must be a multiple of {what} ({parts}), but is {value}.")


def engine_of(path: str, model: Qwen2ForCausalLM, options: Options) -> Engine:
    """The engine that a path names."""
    if path == "vllm":
        length = options.prompt_tokens + options.response_tokens
        return VLLMEngine(model, max_length=length, precision=options.precision)
    engine = OwnEngine(model, compile_decoding=path == "compiled")
    if path == "fixed":
        engine._decoder = FixedShapeDecoder(model, compiled=False)
    return engine


def table(result: dict[str, object]) -> str:
    """Seconds, tokens per second and the distance to the floor, as Markdown."""
    lines = ["| path | seconds | tokens per second | times the floor |", "| --- | ---: | ---: | ---: |"]
    for path, entry in result["paths"].items():
        seconds = entry["seconds"]
        lines.append(
            f"| {path} | {statistics.median(seconds):.3f} ({min(seconds):.3f}–{max(seconds):.3f}) | "
            f"{entry['tokens_per_second']:,.0f} | {entry['times_the_floor']:.1f} |"
        )
    options, torch_version = result["options"], result["versions"]["torch"]
    caption = (
        f"{options['rows']} rows × {options['response_tokens']} tokens after a prompt of {options['prompt_tokens']}; "
        f"{options['hidden_size']} wide, feed-forward {options['intermediate_size']:,}, {options['layers']} layers, "
        f"{options['heads']} heads, {options['key_value_heads']} of keys and values, V = {options['vocabulary']:,}; "
        f"{options['precision']}, {result['device']}, {result['threads']} threads, torch {torch_version}; "
        f"median of {options['rounds']} (smallest–largest). Floor: {result['bytes'] / 1e9:.3g} GB at "
        f"{result['bytes_per_second'] / 1e9:.3g} GB/s, {result['floor_seconds']:.3g} s or "
        f"{result['tokens'] / result['floor_seconds']:,.0f} tokens per second."
    )
    if result["device"] == "CPU":
        caption += " These are numbers of a CPU; they say nothing about a GPU."
    return "\n".join(lines) + "\n\n" + " ".join(filter(None, [caption, options["note"]]))


def main(options: Options) -> None:
    """Measure, and write the results."""
    if "vllm" in options.paths:
        require_vllm()  # before anything is measured in vain
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden_size, intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers, num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        max_position_embeddings=options.prompt_tokens + options.response_tokens, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    shape = options.rows // SAMPLES_PER_PROMPT, options.prompt_tokens
    prompts = torch.randint(options.vocabulary, shape).tolist()
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).to(getattr(torch, options.precision)).save_pretrained(folder)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.precision)).to(device).eval()
        read = bytes_of_sampling(
            model, len(prompts), SAMPLES_PER_PROMPT, options.prompt_tokens, options.response_tokens, model.dtype
        )
        rate = bandwidth(device)
        tokens = options.rows * options.response_tokens
        found = {}
        for path in options.paths:
            engine = engine_of(path, model, options)

            def sample(engine: Engine = engine) -> None:
                engine.sample(
                    prompts, options.response_tokens, [options.vocabulary], 0, samples_per_prompt=SAMPLES_PER_PROMPT,
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip

            with engine.load_weights(), torch.no_grad():
                sample()
                seconds = [seconds_of(sample, device) for _ in range(options.rounds)]
            median = statistics.median(seconds)
            found[path] = {"seconds": seconds, "tokens_per_second": tokens / median,
                           "times_the_floor": median / (read / rate)}  # fmt: skip
    result = {
        "paths": found,
        "tokens": tokens,
        "bytes": read,
        "bytes_per_second": rate,
        "floor_seconds": read / rate,
        "options": {name: value for name, value in asdict(options).items() if name != "output"},
        **provenance(),
    }
    if "vllm" in options.paths:
        result["vllm"] = importlib.metadata.version("vllm")
    keep_results(result, table(result), options.output, OWN_FILE, "sampling table")


if __name__ == "__main__":
    run_script(main, Options)
