"""A small vLLM: names, signatures and data of ``vllm`` 0.31.0 as far as tgpo_lab uses them, sampling with transformers.

Tests put the folder above on ``sys.path``, so that the code of ``tgpo_lab.sampling.vllm_engine`` runs on machines
without vLLM. It has its own copy of the weights and fails where vLLM would: it answers with older weights after
``reload_weights`` without ``reset_prefix_cache`` (their keys and values are cached), and refuses to answer or to take
weights after ``sleep``. In a group of processes it starts under ``external_launcher`` alone, and meets the engines of
the others while it starts, as vLLM does; afterwards each is by itself.
Behaviour follows vllm/entrypoints/llm.py, sampling_params.py, outputs.py, logprobs.py, v1/engine/parallel_sampling.py
(seed plus index), v1/core/sched/utils.py (stop before length), v1/executor/uniproc_executor.py and
distributed/parallel_state.py (external_launcher), v1/worker/utils.py (free memory),
model_executor/model_loader/weight_utils.py (shapes), transformers_utils/config.py (hf_overrides update the
configuration) and v1/sample/sampler.py (processed log-probabilities).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

__version__ = "0.31.0"
RELOADS: list[dict[str, torch.Tensor]] = []
"""What each ``reload_weights`` in this process was given, for tests to look at."""
FREE_MEMORY = 1.0
"""Share of the device's memory that is free in this process, for tests to lower."""


@dataclass
class SamplingParams:
    """Those of vLLM that the engine sets."""

    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            self.temperature = 0.01
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    """One model in this process; arguments as vLLM's."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs: Any,
    ):
        options = {"load_format", "max_model_len", "logprobs_mode", "enable_prefix_caching", "enable_sleep_mode",
                   "distributed_executor_backend", "hf_overrides"}  # fmt: skip
        if unknown := set(kwargs) - options:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {unknown.pop()!r}")
        config = AutoConfig.from_pretrained(model)
        config.update(kwargs.get("hf_overrides") or {})
        if kwargs["max_model_len"] > config.max_position_embeddings:
            raise ValueError(
                f"User-specified max_model_len ({kwargs['max_model_len']}) is greater than the derived max_model_len "
                f"(max_position_embeddings={config.max_position_embeddings})."
            )
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("vLLM chooses its own precision.")
        if kwargs.get("load_format") != "dummy":
            raise NotImplementedError("The stand-in loads no weights from disk.")
        _start_worker(kwargs.get("distributed_executor_backend"), gpu_memory_utilization)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self._options = kwargs
        self._read = self._model  # what the prefix cache was filled with
        self._awake = {"weights", "kv_cache"}

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if method != "reload_weights":
            raise NotImplementedError(method)
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0":
            raise TypeError("cannot pickle 'generator' object")  # the worker would be in another process
        if "weights" not in self._awake:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        stale = AutoModelForCausalLM.from_config(self._model.config, dtype=self._model.dtype).eval()
        stale.load_state_dict(self._model.state_dict())
        self._read = stale
        known = dict(self._model.named_parameters())
        given: dict[str, torch.Tensor] = {}
        RELOADS.append(given)
        with torch.no_grad():
            for name, weight in kwargs["weights_iterator"]:
                if weight.shape != known[name].shape:  # a KeyError as in vLLM's own models
                    raise AssertionError(
                        f"Attempted to load weight ({weight.shape}) into parameter ({known[name].shape})"
                    )
                if name in given:
                    raise AssertionError(f"{name} came twice")
                given[name] = weight.clone()
                known[name].copy_(weight)
        return [None]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self._read = self._model
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        if not self._options.get("enable_sleep_mode"):
            raise ValueError("Sleep mode is not enabled.")
        self._awake = set()
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._awake |= set(tags or ["weights", "kv_cache"])

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        if self._awake != {"weights", "kv_cache"}:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("vLLM chooses its own precision.")
        if len(prompts) != len(sampling_params):
            raise ValueError("The lengths of prompts and params must be the same.")
        results = []
        for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            ids = prompt["prompt_token_ids"]
            outputs = [self._complete(ids, params, index) for index in range(params.n)]
            results.append(RequestOutput(str(number), None, ids, None, outputs[::-1]))  # in no order, as they finish
        return results

    @torch.no_grad()
    def _complete(self, prompt: list[int], params: SamplingParams, index: int) -> CompletionOutput:
        generator = torch.Generator().manual_seed((params.seed or 0) + index)
        eos = None if params.ignore_eos else self._model.config.eos_token_id
        written: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        reason = stop = None
        while reason is None:
            logits = self._read(torch.tensor([prompt + written])).logits[0, -1].float()
            raw = logits.log_softmax(-1)
            if params.allowed_token_ids is not None:
                barred = torch.ones_like(logits, dtype=torch.bool)
                barred[params.allowed_token_ids] = False
                logits = logits.masked_fill(barred, -torch.inf)
            processed = (logits / (params.temperature or 1.0)).log_softmax(-1)
            token = int(processed.argmax())
            if params.temperature > 0:
                token = int(processed.exp().multinomial(1, generator=generator))
            written.append(token)
            values = processed if self._options.get("logprobs_mode") == "processed_logprobs" else raw
            rank = int((values > values[token]).sum()) + 1
            logprobs.append({token: Logprob(float(values[token]), rank)})
            if token == eos:
                reason = "stop"
            elif token in (params.stop_token_ids or ()):
                reason, stop = "stop", token
            elif len(written) >= params.max_tokens or len(prompt) + len(written) >= self._options["max_model_len"]:
                reason = "length"
        total = sum(next(iter(at.values())).logprob for at in logprobs)
        kept = logprobs if params.logprobs is not None else None
        return CompletionOutput(index, "", tuple(written), total, kept, reason, stop)


def _start_worker(launcher: str | None, memory_share: float) -> None:
    """What the processes of a group go through together, and the memory that each of them needs."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if launcher is None and several:
        raise AssertionError("Every engine would take the first GPU: there is no external launcher.")
    group = None
    if launcher is not None:
        if launcher != "external_launcher":
            raise NotImplementedError(launcher)
        rank, _ = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])  # the GPU is cuda:LOCAL_RANK
        if not dist.is_initialized():
            dist.init_process_group("gloo", world_size=1, rank=rank)  # one engine has one worker
        group = dist.new_group(backend="gloo")
    if memory_share > FREE_MEMORY:
        raise ValueError(
            f"Free memory on device cpu ({FREE_MEMORY}/1.0 GiB) on startup is less than desired GPU memory "
            f"utilization ({memory_share}, {memory_share} GiB). Decrease GPU memory utilization or reduce GPU memory "
            "used by other processes."
        )
    if group is not None:
        dist.all_reduce(torch.tensor([int(FREE_MEMORY * 2**30)]), dist.ReduceOp.MIN, group=group)
