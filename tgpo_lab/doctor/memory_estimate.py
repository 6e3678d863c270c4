"""How much memory a run needs, by part, before any weight is loaded.

With P weights, T of them trained, b bytes in a product (2 in bfloat16, 4 in float32) and s bytes in the student's
stored weights (4, or b where adapters are trained on a frozen base):

    student     P·s           adapters  T·4            gradients  T·4        AdamW  T·8
    teacher     P·b; only its output layer twice if it is offloaded, nothing if it is on another device or a server
    sampling    rows × (prompt + response) × Σ layers 2·(key-value heads × head width)·b, and one layer's once more
                while rows are moved; logits of all rows, three times (logits, probabilities, padding); the same of the
                teacher for methods that learn from its own responses, if that is more
    update      tokens of a micro-batch × what the layers keep for the backward pass (see Shape); logits of the
                positions that are projected at once, five times (logits, log-softmax, their gradients, one spare)
    teacher pass   as the update, without a backward pass: one layer
    copy        P·2 while the float32 student computes in bfloat16: autocast keeps its converted weights

Sampling, update and teacher pass come one after the other, so only the largest of them counts. Added are the
device's own context (1 GiB on a GPU) and a tenth for fragments that the allocator cannot use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..config import TrainConfig
from ..models.policy import positions_at_once

USUAL_PROMPT = 512
"""Tokens of a prompt where none is known."""
CONTEXT = 2**30
SPARE = 0.1


@dataclass(frozen=True)
class Shape:
    """What counts of a model: numbers of values, not bytes."""

    weights: int
    layers: int
    hidden: int
    """Width of the residual stream."""
    kept: int
    """Values that one layer keeps of one token for the backward pass, without the residual stream."""
    keys_and_values: int
    """Values in the cache for one token in one layer."""
    vocabulary: int
    """Rows of the output layer."""
    linear: int
    """Σ (inputs + outputs) over the linear layers: an adapter of rank r has r times as many weights."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    parts: dict[str, int]
    """Name → bytes; they add up to the total."""

    @property
    def total(self) -> int:
        """Of all parts, in bytes."""
        return sum(self.parts.values())


def shape_of(config: PretrainedConfig) -> Shape:
    """Shape of a causal language model with this configuration; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value = (getattr(text, "num_key_value_heads", None) or heads) * width
    # Of experts, only the chosen ones compute on a token.
    experts = getattr(text, "num_experts_per_tok", None)
    inner = getattr(text, "moe_intermediate_size", None) if experts else None
    inner = inner * experts if inner else getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    output = model.get_output_embeddings()
    return Shape(
        weights=sum(p.numel() for p in model.parameters()),  # shared ones once
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        # Two norms' outputs; queries, keys and values before and after rotation; attention's output; of the gated
        # feed-forward the gate, its activation, the other half and their product.
        kept=2 * text.hidden_size + 3 * heads * width + 3 * key_value + 4 * inner,
        keys_and_values=2 * key_value,
        vocabulary=output.weight.shape[0],
        linear=sum(
            m.in_features + m.out_features
            for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not output
        ),
    )  # fmt: skip


def estimate_memory(
    config: TrainConfig,
    student: Shape,
    teacher: Shape,
    *,
    prompt_tokens: int = USUAL_PROMPT,
    device: str | torch.device = "cuda",
) -> MemoryEstimate:
    """Memory of a run on one device.

    Args:
        config: the run.
        student: its shape.
        teacher: its shape.
        prompt_tokens: tokens of the longest prompt.
        device: decides how many positions are projected at once, and whether there is a context.
    """
    device = torch.device(device)
    half = config.precision == "bfloat16"
    product = 2 if half else 4
    stored = product if config.lora_rank else 4
    trained = student.linear * config.lora_rank if config.lora_rank else student.weights
    rows = config.prompts_per_step * config.group_size
    chunk = positions_at_once(min(student.vocabulary, teacher.vocabulary), device)

    length = prompt_tokens + config.max_new_tokens

    def sampling_of(model: Shape, rows: int) -> int:
        return rows * (length * model.keys_and_values * product * (model.layers + 1) + 3 * model.vocabulary * 4)

    sampling = max(sampling_of(student, rows), sampling_of(teacher, config.prompts_per_step * config.traces_per_prompt))
    tokens = max(config.micro_batch_tokens, length)
    stream, kept = student.hidden * 2 * stored, student.kept * product
    layers = student.hidden * stored * student.layers + stream + kept if config.gradient_checkpointing else (
        (stream + kept) * student.layers
    )  # fmt: skip
    update = tokens * layers + 5 * chunk * student.vocabulary * 4
    teacher_pass = tokens * (teacher.hidden * 2 + teacher.kept) * product + 3 * chunk * teacher.vocabulary * 4
    teacher_weights = teacher.weights
    if config.teacher_offload:  # the output layer stays, and the largest other part, the embeddings, comes and goes
        teacher_weights = 2 * teacher.vocabulary * teacher.hidden
    if config.teacher_server is not None or not _same_device(config.teacher_device, device):
        teacher_weights = teacher_pass = 0
        sampling = sampling_of(student, rows)
    working = {"sampling": sampling, "update": update, "teacher pass": teacher_pass}
    largest = max(working, key=working.__getitem__)
    parts = {
        "student": student.weights * stored,
        "adapters": trained * 4 if config.lora_rank else 0,
        "gradients": trained * 4,
        "AdamW": trained * 8,
        "teacher": teacher_weights * product,
        "copy in bfloat16": student.weights * 2 if half and stored == 4 else 0,
        largest: working[largest],
    }
    if device.type == "cuda":
        parts["context"] = CONTEXT
    parts["fragments"] = int(SPARE * sum(parts.values()))
    return MemoryEstimate({name: size for name, size in parts.items() if size})


def _same_device(name: str | None, device: torch.device) -> bool:
    """Whether a teacher's device is the student's; cuda is cuda:0."""
    other = device if name is None else torch.device(name)
    return (other.type, other.index or 0) == (device.type, device.index or 0)


def checkpoint_bytes(config: TrainConfig, student: Shape) -> int:
    """Bytes on disk of one checkpoint: weights or adapters, and two moments in float32."""
    trained = student.linear * config.lora_rank if config.lora_rank else student.weights
    stored = 2 if config.lora_rank and config.precision == "bfloat16" else 4
    whole = student.weights * stored if config.lora_merged or not config.lora_rank else 0
    return whole + trained * (12 if config.lora_rank else 8)
