"""Configuration of a training run: one dataclass, with named presets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from .config_limits import require_possible_settings
from .errors import InputError
from .methods import Method, make_method
from .methods.base import method_class
from .precision import Precision
from .presets import PRESETS, preset_fields
from .schedules import Schedule, parse_schedule
from .tasks.prompt_format import PromptFormat


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are those of the preset ``tiny`` with TGPO on the far pair."""

    # Pair
    student: str = "far"
    """A shipped pair (near, mid, far, far-fragile), or the student's folder or hub name."""
    teacher: str | None = None
    """The teacher's folder or hub name; left out for a shipped pair."""
    precision: Precision = "float32"
    """bfloat16: the teacher's weights and the student's products; the student's weights stay float32."""
    gradient_checkpointing: bool = False
    """Compute the student's activations again in the backward pass instead of storing them."""
    fused_kernels: bool = False
    """Liger's kernels in the layers of the student, and of a teacher on a GPU that is not offloaded (needs the extra
    liger, and a GPU)."""

    student_positions: int | None = None
    """Tokens of the longest sequence that the student reads, prompt and response together, in place of those that it
    was published for; it needs rotary positions. Checkpoints keep it."""
    student_rope_theta: float | None = None
    """Base θ of the student's rotary frequencies in place of its own: a larger one goes with more positions."""

    lora_rank: int = 0
    """Train adapters of this rank (LoRA, needs the extra lora) and freeze the student's own weights, which are then
    kept in the chosen precision; 0 trains all weights."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_merged: bool = False
    """Checkpoints hold the whole model with the adapters merged into it, and the adapters beside it; otherwise the
    adapters alone, which load on top of the base."""

    # Where the teacher is
    teacher_device: str | None = None
    """Where the teacher computes: cuda:1, cpu; left out, where the student does."""
    teacher_offload: bool = False
    """Keep the teacher's weights on the CPU, and bring each layer's to its device while it computes."""
    teacher_server: str | None = None
    """Base address of a server that has the teacher, such as http://host:8000/v1, in place of its weights in this
    process. It must serve completions with prompt_logprobs, as vLLM does, and gives its most probable tokens: no whole
    distributions, no sampled tokens, no responses of its own."""
    teacher_server_model: str | None = None
    """Name under which the server has the teacher; left out, the only model that it serves."""
    teacher_server_requests: int = 16
    """At most so many requests are under way at once."""
    teacher_server_timeout: float = 120.0
    """Seconds in which the server must answer a request."""
    teacher_server_retries: int = 5
    """How often a request is sent again when the server stalls, breaks off or is overloaded."""
    teacher_cache: str | None = None
    """Folder that keeps the responses which the teacher writes for sft, luffy and tgpo-unconditioned: then it writes
    once for each prompt and seed, not anew in each step. Runs can share it."""

    # Prompts and reward
    dataset: str | None = None
    """Folder with train.jsonl or train.parquet, such a file, or a dataset on the hub; left out, the pair's own. The
    columns, splits and answer mark that a preset has for its own dataset do not apply to another; its prompt template
    and reward do."""
    dataset_config: str | None = None
    """Which configuration of a dataset that has several: main of openai/gsm8k."""
    train_split: str = "train"
    """Name of its split to train on."""
    validation_split: str = "validation"
    """Name of its split to hold out; without one, the last of the training prompts."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or the messages of a chat with one turn of the user. a.b is the field b of column
    a, here and for answers."""
    answer_column: str = "answer"
    """Column with the right answer."""
    answer_after: str | None = None
    """The right answer is what stands after the last such mark in its column: #### in openai/gsm8k."""
    prompt_template: str = "{prompt}"
    """Text around every prompt; {prompt} stands for it."""
    chat_template: bool = False
    """Put prompts as the user's turn into the chat template of the student's tokenizer."""
    system_prompt: str | None = None
    """System message of that chat; left out, what the template brings. Prompts that are messages may begin with it."""
    chat_template_options: tuple[str, ...] = ()
    """What else the template is told: NAME=VALUE, with a value in JSON or as text; enable_thinking=false for Qwen3."""
    reward: str = "marked_answer"
    """How a response is judged: marked_answer (the integer after the last #), exact_match, last_number, math_verify
    (needs the extra math), or a function of yours as package.module:function, which has no time limit but its own."""

    # Method
    method: Method = field(default_factory=lambda: make_method("tgpo", tiny=True))
    """The method with its options."""

    # Sampling
    steps: int = 120
    """Number of batches sampled and learned from."""
    prompts_per_step: int = 16
    """Prompts in a batch."""
    group_size: int = 8
    """Samples for each prompt (G)."""
    max_new_tokens: int = 80
    """Responses are cut after so many tokens."""
    temperature: float = 1.0
    """Divides the student's logits, in sampling and in the loss alike."""
    engine: Literal["own", "vllm"] = "own"
    """What samples the student's responses: own, the loop's own cached sampling, or vllm (needs the extra vllm, in
    an environment without the pins of constraints.txt), a second copy of the student in the same process."""
    sampling_rows: int = 0
    """Of the own engine, and of the teacher's own responses: at most so many are written at once, whole groups of a
    prompt, at least one; 0 for all. Each keeps its random numbers, so nothing changes but memory and rounding."""
    importance_cap: float | None = None
    """Largest importance weight π_old(y_t)/π_engine(y_t), 1 or more or inf, by which policy-gradient terms and
    KDRL's are multiplied where the engine drew under other log-probabilities than the update computes; left out, no
    weights."""
    compile_decoding: bool = False
    """Of the own engine: read tokens with tensors of fixed shape through torch.compile, on a GPU as a CUDA graph."""
    vllm_memory_share: float = 0.3
    """Of vllm: share of the GPU's memory that it takes, its copy of the weights included."""
    vllm_sleep: bool = False
    """Of vllm: give that memory back while the student learns, at the price of waking up each step."""

    # Update
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises in a straight line to its peak."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    mini_batches: int = 1
    """Updates for each pass over a batch; a mini-batch holds whole groups."""
    passes: int = 1
    """Passes over a batch. More than one update in all makes the clipped ratio matter."""
    micro_batch_tokens: int = 4096
    """At most so many tokens, padding included, go through a model at once. Changes nothing but memory and rounding."""

    # Measurement
    evaluate_every: int = 5
    """Steps between measurements of held-out accuracy; 0 for none but at the end."""
    evaluation_prompts: int = 128
    """Held-out prompts for that."""
    evaluation_temperature: float = 0.0
    """Of the responses to them: 0 is greedy, 1 the policy itself."""
    measured_positions: int = 1024
    """Positions, drawn anew each step, at which whole distributions are compared; 0 for all."""
    gradient_terms_every: int = 5
    """Steps between measurements of each kind of term's own gradient (one more pass for each); 0 for never."""
    rejection_threshold: float = 4.0
    """Nats by which log πθ(y_t) must exceed log πT(y_t) for a token to count as rejected by the teacher."""

    # Output
    output: str = "runs/train"
    """Folder of the run; on the command line, left out, runs/METHOD-STUDENT."""
    checkpoint_every: int = 20
    """Steps between checkpoints; one is always written at the start and at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay on disk; 0 keeps all."""
    trackers: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio."""
    seed: int = 0
    """Decides prompts, samples and every other random choice."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))  # paths are text here, so that JSON has them
        require_possible_settings(self)

    @property
    def prompt_format(self) -> PromptFormat:
        """How prompts are put before the models."""
        return PromptFormat(self.chat_template, self.system_prompt, self.prompt_template, self.chat_template_options)

    @property
    def teacher_weights_device(self) -> str | None:
        """Where the teacher's weights are to be loaded: None beside the student's, meta for not at all."""
        if self.teacher_server is not None:
            return "meta"
        return "cpu" if self.teacher_offload else self.teacher_device

    @property
    def position_options(self) -> dict[str, float | None]:
        """What :func:`tgpo_lab.models.pairs.load_pair` is to change of the student's positions."""
        return {name: getattr(self, name) for name in ("student_positions", "student_rope_theta")}

    @property
    def traces_per_prompt(self) -> int:
        """How many responses the teacher writes to each prompt of a step."""
        return {"none": 0, "one_per_prompt": 1, "one_per_sample": self.group_size}[self.method.teacher_traces]

    @property
    def prompt_options(self) -> dict[str, str | None]:
        """What :func:`tgpo_lab.tasks.prompts.load_prompts` is to be told beside the dataset."""
        return {
            name: getattr(self, name)
            for name in ("prompt_column", "answer_column", "answer_after", "system_prompt", "dataset_config",
                         "train_split", "validation_split")
        }  # fmt: skip

    @classmethod
    def preset(cls, name: str, method: str = "tgpo", **changes: object) -> TrainConfig:
        """A configuration by name, with a method by name.

        Args:
            name: ``tiny`` (a shipped pair on two CPU cores), ``paper`` (the paper's settings), ``gpu-24gb`` or
                ``gpu-80gb`` (one card; by the arithmetic of :mod:`tgpo_lab.doctor.memory_estimate`).
            method: name of the method, with the options that suit the preset.
            changes: fields to change. With another dataset the preset's columns, splits and answer mark do not apply,
                with another engine its options of vLLM.

        Raises:
            InputError: unknown preset, method or field, or impossible values.
        """
        if name not in PRESETS:
            raise InputError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(changes) - known):
            raise InputError(f"A configuration has no field {unknown[0]!r}: it has {', '.join(sorted(known))}.")
        made = make_method(method, tiny=name == "tiny")
        return cls(**{"method": made, **preset_fields(name, changes)})  # type: ignore[arg-type]

    def with_changes(self, **changes: object) -> TrainConfig:
        """The same with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def as_dict(self) -> dict:
        """Plain values, for JSON; :meth:`from_dict` takes them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        options = {
            f.name: str(v) if isinstance(v := getattr(self.method, f.name), Schedule) else v
            for f in fields(self.method)
        }
        values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}  # as JSON has it
        values["method"] = {"class": type(self.method).__name__, **options}
        return values

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        """Take back what :meth:`as_dict` gave.

        Raises:
            InputError: unknown fields or an unknown method class.
        """
        values = dict(values)
        options = dict(values.pop("method"))
        method = method_class(options.pop("class"))
        for item in fields(method):
            if isinstance(options.get(item.name), str) and "Schedule" in str(item.type):
                options[item.name] = parse_schedule(options[item.name])
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        try:
            return cls(**values, method=method(**options))
        except TypeError as error:
            raise InputError(f"This is not a configuration of tgpo_lab: {error}.") from error
