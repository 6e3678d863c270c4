"""How much memory a run needs on each of its devices, by part, before any weight is loaded.

With P weights, T of them trained, b bytes in a product (2 in bfloat16, 4 in float32), s bytes in the student's stored
weights (4, or b where adapters are trained on a frozen base), N processes, and F = N where FSDP shares the student out,
else 1. What is there all the time:

    student     P·s/F         adapters  T·4            gradients  T·4/F      AdamW  T·8/F
    teacher     P·b on every process; of one that is offloaded from a GPU the output layer and the largest module
                besides; nothing if it is on another device or behind a server
    vLLM        vllm_memory_share of the card, where it does not sleep
    decoding buffers   with compile_decoding: rows × capacity × layers × one token's keys and values; of a float32
                student that computes in bfloat16 also the weights of its products, ·2

Of one token in one layer, keys take (key-value heads × head width)·b and values as many. Then one phase after the
other, and only the largest counts:

    sampling           rows × (prompt + response) × (layers + 1, for the one whose rows are moved) × keys and values;
                       with compile_decoding of the prompts alone; logits of all rows, three times (logits,
                       probabilities, padding). vLLM that sleeps: its share of the card, and nothing of this.
                       Under FSDP all weights are gathered for it, P·4; for vLLM one at a time.
    teacher's responses   the same of the teacher, for methods that learn from them
    update             tokens of a micro-batch × what the layers keep for the backward pass (see Shape); scores of the
                       layers, of one with gradient_checkpointing, and twice more of the one at work (their gradients);
                       logits of the positions that are projected at once, as often as the method's loss holds them
                       (Method.logit_tensors), or once and five times more of those of them that are measured: the
                       share of measured_positions in a step whose responses are as long as they may be; what such
                       positions add to the gradient of a trained output layer, vocabulary × width × 4, and ·2 before it
                       is converted from bfloat16. Under FSDP what
                       is outside the decoder layers stays gathered from the forward to the end of the backward pass,
                       weights and gradients: ·8; of the layers the one at work, ·8, and the next one's weights, ·4.
    teacher pass       as the update, without a backward pass: one layer, its scores three times
    optimizer step     on a GPU, where AdamW takes all weights at once: T·4/F for the root of the second moments
    loading            under FSDP, where every process loads the whole student before it is shared out: P·s − P·s/F.
                       The teacher is there already, but neither gradients nor moments nor vLLM

Scores are attention's weights, 4 bytes each, where it holds them all at once:

    plain attention    on a CPU, in float32, of a known decoder with a key-value head for each head, unless its
                       activations are computed again or its weights offloaded (:mod:`tgpo_lab.models.attention`). It
                       holds heads × R × S of a response, R queries and S keys, while R·S ≤ 2¹⁴; longer ones never. So
                       of a micro-batch at most heads × tokens × R with R ≤ 128, and heads × P'² of each of its distinct
                       prompts, P' ≤ 128
    eager attention    of architectures that know no other: heads × tokens × (prompt + response); in bfloat16 a copy of
                       2 bytes besides

In the first three phases, P·2 is added for a float32 student that computes in bfloat16 in this process: autocast keeps
its converted weights; for sampling with compile_decoding the copies above serve. Rows are those that are written at
once, of a step or of the held-out prompts, by one process: its share of the prompts, and of them what sampling_rows
lets through. The teacher's responses are divided alike, but not where they are kept on disk: there every process writes
what is missing.

Added are the device's own context (1 GiB on a GPU) and a tenth for fragments that the allocator cannot use, of all but
vLLM, which has an allocator of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..evaluation import PROMPTS_AT_ONCE
from ..models.attention import MOST_SCORES
from ..models.policy import positions_at_once
from ..sampling.cached_sampling import prompts_at_once
from ..sampling.fixed_shape_decoding import CAPACITY_STEP
from .model_shape import Shape

USUAL_PROMPT = 512
"""Tokens of a prompt where none is known."""
USUAL_CARD = 80 * 10**9
"""Bytes of a card where none is known."""
CONTEXT = 2**30
SPARE = 0.1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part."""

    parts: dict[str, int]
    """Name → bytes; they add up to the total."""

    @property
    def total(self) -> int:
        """Of all parts, in bytes."""
        return sum(self.parts.values())


def estimate_memory(
    config: TrainConfig,
    student: Shape,
    teacher: Shape,
    *,
    prompt_tokens: int = USUAL_PROMPT,
    device: str | torch.device = "cuda",
    processes: int = 1,
    sharded: bool = False,
    card: int = USUAL_CARD,
) -> MemoryEstimate:
    """Memory of a run on one device.

    Args:
        config: the run.
        student: its shape.
        teacher: its shape.
        prompt_tokens: tokens of the longest prompt.
        device: decides how many positions are projected at once, and whether there is a context.
        processes: number of processes, each with a device of its own.
        sharded: whether FSDP shares the student out among them.
        card: bytes of the device, of which vLLM takes its share.
    """
    device = torch.device(device)
    half = config.precision == "bfloat16"
    product = 2 if half else 4
    stored = product if config.lora_rank else 4
    trained = student.linear * config.lora_rank if config.lora_rank else student.weights
    parts_of_student = processes if sharded else 1
    length = prompt_tokens + config.max_new_tokens
    own = config.engine == "own"

    def rows(prompts: int, samples: int) -> int:
        return samples * prompts_at_once(prompts, samples, config.sampling_rows)

    def sampling_of(model: Shape, rows: int, key_and_value: int, tokens: int = length) -> int:
        return rows * (tokens * key_and_value * (model.layers + 1) + 3 * model.vocabulary * 4)

    groups = -(-config.prompts_per_step // processes)
    held_out = -(-min(config.evaluation_prompts, PROMPTS_AT_ONCE) // processes)
    at_once = max(rows(groups, config.group_size), rows(held_out, 1))
    key_and_value = student.keys_and_values * product
    vllm = 0 if own else int(config.vllm_memory_share * card)
    buffers = 0
    if not own:
        sampling = {"vLLM": vllm if config.vllm_sleep else 0}
        gathered = student.vocabulary * student.hidden * 4
    elif config.compile_decoding:
        capacity = -(-length // CAPACITY_STEP) * CAPACITY_STEP
        buffers = at_once * capacity * student.layers * key_and_value
        sampling = {"sampling": sampling_of(student, at_once, key_and_value, prompt_tokens)}
        gathered = student.weights * 4
    else:
        sampling = {"sampling": sampling_of(student, at_once, key_and_value)}
        gathered = student.weights * 4
    copy = student.weights * 2 if half and stored == 4 else 0
    copied = copy if own and not config.compile_decoding else 0
    if copy and config.compile_decoding:
        buffers += 2 * (student.weights - student.outside + student.vocabulary * student.hidden)
    sampling |= {"copy in bfloat16": copied, "gathered weights": gathered if sharded else 0}

    writers = config.prompts_per_step if config.teacher_cache is not None else groups
    written = rows(writers, config.traces_per_prompt) if config.traces_per_prompt else 0
    traces = {
        "teacher's responses": sampling_of(teacher, written, teacher.keys_and_values * product),
        "copy in bfloat16": copied,
    }

    chunk = positions_at_once(min(student.vocabulary, teacher.vocabulary), device)
    tokens = max(config.micro_batch_tokens, length)
    stream, kept = student.hidden * 2 * stored, student.kept * product + (student.normed * 4 if half else 0)
    layers = student.hidden * stored * student.layers + stream + kept if config.gradient_checkpointing else (
        (stream + kept) * student.layers
    )  # fmt: skip

    def scores_of(model: Shape, *, at_once: int, plain: bool) -> int:
        side = math.isqrt(MOST_SCORES)
        within_prompt = min(prompt_tokens, side)
        held = tokens * min(config.max_new_tokens, side) + min(groups, tokens // within_prompt) * within_prompt**2
        of_plain = model.plain_heads * held * 4 if plain and device.type == "cpu" and not half else 0
        return at_once * (of_plain + model.eager_heads * tokens * length * (6 if half else 4))

    positions = config.prompts_per_step * config.group_size * config.max_new_tokens
    measured = min(1.0, config.measured_positions / positions) if config.measured_positions else 1.0
    logits = int(max(config.method.logit_tensors, 1 + 5 * measured) * chunk * student.vocabulary * 4)
    scores = scores_of(
        student, at_once=2 + (1 if config.gradient_checkpointing else student.layers),
        plain=not config.gradient_checkpointing,
    )  # fmt: skip
    added = 0 if config.lora_rank else student.vocabulary * student.hidden * (6 if half else 4)
    update = {
        "update": tokens * layers + scores + logits + added,
        "copy in bfloat16": copy,
        "gathered weights": 8 * student.outside + 12 * student.layer if sharded else 0,
    }
    teacher_pass = {
        "teacher pass": tokens * (teacher.hidden * 2 + teacher.kept) * product
        + scores_of(teacher, at_once=3, plain=not config.teacher_offload)
        + 3 * chunk * teacher.vocabulary * 4
    }
    teacher_weights = teacher.weights
    if config.teacher_offload and device.type != "cpu":
        teacher_weights = teacher.vocabulary * teacher.hidden + teacher.largest
    phases = [sampling, update, {"optimizer step": trained * 4 // parts_of_student if device.type == "cuda" else 0}]
    if config.teacher_server is not None or not _same_device(config.teacher_device, device):
        teacher_weights = 0
    else:
        phases += [traces, teacher_pass] if written else [teacher_pass]
    parts = {
        "student": student.weights * stored // parts_of_student,
        "adapters": trained * 4 if config.lora_rank else 0,
        "gradients": trained * 4 // parts_of_student,
        "AdamW": trained * 8 // parts_of_student,
        "teacher": teacher_weights * product,
        "vLLM": 0 if config.vllm_sleep else vllm,
        "decoding buffers": buffers,
    }
    largest = max(phases, key=lambda phase: sum(phase.values()) + _fragments(phase))
    for name, size in largest.items():
        parts[name] = parts.get(name, 0) + size
    whole = student.weights * stored
    loading = {"student": parts["student"], "teacher": parts["teacher"], "loading": whole - parts["student"]}
    parts = max(parts, loading, key=lambda moment: sum(moment.values()) + _fragments(moment))
    if device.type == "cuda":
        parts["context"] = CONTEXT
    parts["fragments"] = _fragments(parts)
    return MemoryEstimate({name: size for name, size in parts.items() if size})


def _fragments(parts: dict[str, int]) -> int:
    return int(SPARE * sum(size for name, size in parts.items() if name != "vLLM"))


def _same_device(name: str | None, device: torch.device) -> bool:
    """Whether a teacher's device is the student's; cuda is cuda:0."""
    other = device if name is None else torch.device(name)
    return (other.type, other.index or 0) == (device.type, device.index or 0)


def machine_bytes(
    config: TrainConfig, student: Shape, teacher: Shape, *, processes: int = 1, sharded: bool = False
) -> dict[str, int]:
    """Bytes by part in the memory of a machine, beside that of its GPUs: N·P·b of an offloaded teacher, which each
    process keeps there; under FSDP P·12 of the student, whose weights and moments the first gathers for a checkpoint.

    Args:
        config: the run.
        student: its shape.
        teacher: its shape.
        processes: N, those on this machine.
        sharded: whether FSDP shares the student out.
    """
    product = 2 if config.precision == "bfloat16" else 4
    parts = {
        "offloaded teacher": processes * teacher.weights * product if config.teacher_offload else 0,
        "gathered for a checkpoint": student.weights * 12 if sharded else 0,
    }
    return {name: size for name, size in parts.items() if size}


def checkpoint_bytes(config: TrainConfig, student: Shape) -> int:
    """Bytes on disk of one checkpoint: weights or adapters, and two moments in float32."""
    trained = student.linear * config.lora_rank if config.lora_rank else student.weights
    stored = 2 if config.lora_rank and config.precision == "bfloat16" else 4
    whole = student.weights * stored if config.lora_merged or not config.lora_rank else 0
    return whole + trained * (12 if config.lora_rank else 8)
