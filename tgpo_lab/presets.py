"""Named presets: fields of :class:`tgpo_lab.config.TrainConfig` that differ from its defaults."""

from __future__ import annotations

from collections.abc import Mapping

_BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
_GSM8K: dict[str, object] = {
    "dataset": "openai/gsm8k",
    "dataset_config": "main",
    "prompt_column": "question",
    "answer_after": "####",
    "prompt_template": _BOXED,
    "reward": "last_number",
}

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {},
    # arXiv 2605.13230 and public code of the method: 128 prompts × 8 samples, two updates a batch,
    # up to 8,192 new tokens, 300 steps.
    #
    # For eight cards of 80 GB in one machine with about 700 GB of its own: each process keeps the teacher there, 61 GB,
    # which are 488, and for a checkpoint the first gathers the student's weights and moments, 91.4 more. To start:
    # accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8. By the arithmetic below each card then holds an
    # eighth of the student with gradients and moments 15.2, of the teacher the output layer and one layer's experts
    # 1.8, the context 1.1, and in the update activations and logits 16.6, converted weights 15.2, gathered ones 11.5;
    # with fragments 67.6 in all. While vLLM samples, 66.3. A teacher behind a server is faster: --no-teacher-offload
    # --teacher-server … in place of the offloaded one.
    "paper": {
        "student": "Qwen/Qwen2.5-Math-7B",
        "teacher": "Qwen/Qwen3-30B-A3B",
        # Published for 4,096 positions. What others do who train it on long responses: LUFFY, arXiv 2504.14945,
        # appendix C.1.
        "student_positions": 16384,
        "student_rope_theta": 40000.0,
        # What the paper trained on is not known here. These are problems for people, each with an integer for an answer
        # (DAPO, arXiv 2503.14476; the English ones without duplicates): 14,116, of which the last are held out.
        "dataset": "open-r1/DAPO-Math-17k-Processed",
        "dataset_config": "en",
        "answer_column": "solution",
        "prompt_template": _BOXED,
        "reward": "last_number",
        "teacher_offload": True,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        # 128 responses of 8,192 tokens a card are 99 GB of keys and values: vLLM takes turns with them.
        "engine": "vllm",
        "vllm_memory_share": 0.55,
        "vllm_sleep": True,
        # For --engine own, and for methods that learn from the teacher's responses.
        "sampling_rows": 8,
        "steps": 300,
        "prompts_per_step": 128,
        "group_size": 8,
        "max_new_tokens": 8192,
        "learning_rate": 1e-6,
        "mini_batches": 2,
        "micro_batch_tokens": 16384,
        "evaluate_every": 20,
        "gradient_terms_every": 20,
        "checkpoint_every": 20,
    },
    # What fits is the sum that tgpo_lab.doctor.memory_estimate makes, which `tgpo-lab doctor` prints by part; for
    # prompts of up to 512 tokens, in 10⁹ bytes. None has been run on its cards yet, so room is left.
    # 24 GB: student 3.1, teacher 8.0, adapters with gradients and moments 0.6, update 3.4, context and fragments 2.7:
    # 17.8 in all. Half of the 128 rows × 1,536 tokens are sampled at once, 3.0; all would need 6.1.
    "gpu-24gb": {
        "student": "Qwen/Qwen2.5-Math-1.5B",
        "teacher": "Qwen/Qwen3-4B",
        **_GSM8K,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "lora_rank": 32,
        "lora_alpha": 64.0,
        "steps": 300,
        "prompts_per_step": 16,
        "group_size": 8,
        "sampling_rows": 64,
        "max_new_tokens": 1024,
        "learning_rate": 1e-5,
        "micro_batch_tokens": 4096,
        "evaluate_every": 20,
        "gradient_terms_every": 20,
    },
    # 80 GB: student 15.2, teacher 16.4, adapters with gradients and moments 2.6, sampling 128 of the 256 rows ×
    # 2,048 tokens 15.8, context and fragments 6.2: 56.2 in all.
    "gpu-80gb": {
        "student": "Qwen/Qwen2.5-Math-7B",
        "teacher": "Qwen/Qwen3-8B",
        **_GSM8K,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "lora_rank": 64,
        "lora_alpha": 128.0,
        "steps": 300,
        "prompts_per_step": 32,
        "group_size": 8,
        "sampling_rows": 128,
        "max_new_tokens": 1536,
        "learning_rate": 1e-5,
        "micro_batch_tokens": 8192,
        "evaluate_every": 20,
        "gradient_terms_every": 20,
    },
}

BELONGING: dict[str, tuple[str, ...]] = {
    "dataset": (
        "dataset_config", "prompt_column", "answer_column", "answer_after", "train_split", "validation_split",
    ),
    "engine": ("vllm_memory_share", "vllm_sleep"),
}  # fmt: skip
"""Fields whose value another field brings: a preset's answers stand after ``####`` in ITS dataset alone."""


def preset_fields(name: str, changes: Mapping[str, object]) -> dict[str, object]:
    """Fields of a preset with changes; where these name another dataset or engine, without what belongs to its own.

    Args:
        name: of a preset.
        changes: fields to change.
    """
    values = PRESETS[name]
    left_out = {
        field
        for decides, fields in BELONGING.items()
        if decides in values and changes.get(decides, values[decides]) != values[decides]
        for field in fields
    }
    return {**{field: value for field, value in values.items() if field not in left_out}, **changes}
