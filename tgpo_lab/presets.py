"""Named presets: fields of :class:`tgpo_lab.config.TrainConfig` that differ from its defaults."""

from __future__ import annotations

_GSM8K: dict[str, object] = {
    "dataset": "openai/gsm8k",
    "dataset_config": "main",
    "prompt_column": "question",
    "answer_after": "####",
    "prompt_template": "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "reward": "last_number",
}

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {},
    # arXiv 2605.13230 and public code of the method: 128 prompts × 8 samples, two updates a batch,
    # up to 8,192 new tokens, 300 steps.
    "paper": {
        "student": "Qwen/Qwen2.5-Math-7B",
        "teacher": "Qwen/Qwen3-30B-A3B",
        "precision": "bfloat16",
        "gradient_checkpointing": True,
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
    # prompts of up to 512 tokens, in 10⁹ bytes. Neither has been run on its card yet.
    # 24 GB: student 3.1, teacher 8.0, adapters with gradients and moments 0.6, sampling 128 rows × 1,536 tokens 6.1,
    # context and fragments 3.0: 20.8 in all.
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
        "max_new_tokens": 1024,
        "learning_rate": 1e-5,
        "micro_batch_tokens": 4096,
        "evaluate_every": 20,
        "gradient_terms_every": 20,
    },
    # 80 GB: student 15.2, teacher 16.4, adapters with gradients and moments 2.6, sampling 256 rows × 2,048 tokens 31.6,
    # context and fragments 7.8: 73.6 in all.
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
        "max_new_tokens": 1536,
        "learning_rate": 1e-5,
        "micro_batch_tokens": 8192,
        "evaluate_every": 20,
        "gradient_terms_every": 20,
    },
}
