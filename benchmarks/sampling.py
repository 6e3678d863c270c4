"""Tokens per second of the ways to sample, beside the floor set by bytes over this machine's bandwidth.

    python benchmarks/sampling.py                                             # small, on a CPU
    python benchmarks/sampling.py --hidden-size 1536 --layers 28 --heads 12 --vocabulary 151936 --rows 64 \
        --response-tokens 512 --precision bfloat16 --paths growing fixed compiled vllm     # on a GPU

Weights are random and no response ends early, so every length is exact. A token of all rows has to read the weights of
the layers and of the output matrix once, and the keys and values of every row so far: those bytes over the bandwidth of
a large copy (read and written) are a floor that no program reaches.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import Qwen2Config, Qwen2ForCausalLM

from tgpo_lab.bandwidth import bandwidth
from tgpo_lab.provenance import provenance
from tgpo_lab.sampling.engine import Engine, OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.sampling.vllm_engine import VLLMEngine


@dataclass(frozen=True)
class Options:
    """Compare the ways to sample."""

    hidden_size: int = 128
    """Width of the model; the feed-forward part is three times as wide."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Heads, of keys and values too."""
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
    output: Path | None = None
    """A JSON file for the numbers."""


def timed(call, device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def bytes_to_read(model: Qwen2ForCausalLM, options: Options) -> int:
    """Of all tokens after the prompt: weights once a token, the cache of each row up to it."""
    size = model.dtype.itemsize
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name) * size
    cached = 2 * options.layers * options.hidden_size * size * options.rows
    steps = range(options.response_tokens)
    return sum(weights + cached * (options.prompt_tokens + step) for step in steps)


def engine_of(path: str, model: Qwen2ForCausalLM, options: Options) -> Engine:
    """The engine that a path names."""
    if path == "vllm":
        length = options.prompt_tokens + options.response_tokens
        return VLLMEngine(model, max_length=length, precision=options.precision)
    engine = OwnEngine(model, compile_decoding=path == "compiled")
    if path == "fixed":
        engine._decoder = FixedShapeDecoder(model, compiled=False)
    return engine


def main(options: Options) -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden_size, intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.prompt_tokens + options.response_tokens, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    prompts = torch.randint(options.vocabulary, (options.rows // 4, options.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).to(getattr(torch, options.precision)).save_pretrained(folder)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.precision)).to(device).eval()
        floor = bytes_to_read(model, options) / bandwidth(device)
        tokens = options.rows * options.response_tokens
        found = {}
        for path in options.paths:
            engine = engine_of(path, model, options)

            def sample(engine: Engine = engine) -> None:
                engine.sample(
                    prompts, options.response_tokens, [options.vocabulary], 0, samples_per_prompt=4,
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip

            with engine.load_weights(), torch.no_grad():
                sample()
                seconds = [timed(sample, device) for _ in range(options.rounds)]
            found[path] = {"seconds": seconds, "tokens_per_second": tokens / statistics.median(seconds),
                           "times_the_floor": statistics.median(seconds) / floor}  # fmt: skip
    print(f"{device.type}: {options.rows} rows × {options.response_tokens} tokens, {options.precision}. "
          f"Floor {tokens / floor:,.0f} tokens per second.")  # fmt: skip
    if device.type == "cpu":
        print("On a CPU: these numbers say nothing about a GPU.")
    for path, entry in found.items():
        print(f"{path:>10}  {entry['tokens_per_second']:>10,.0f} tokens per second  "
              f"{entry['times_the_floor']:>8.1f} × the floor")  # fmt: skip
    if options.output:
        settings = {name: value for name, value in asdict(options).items() if name != "output"}
        result = {"options": settings, "floor_seconds": floor, "paths": found, **provenance()}
        if "vllm" in options.paths:
            result["vllm"] = importlib.metadata.version("vllm")
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
