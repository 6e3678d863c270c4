"""The programs that against_trl.py compares, each taking a step when told to.

    python benchmarks/programs.py NAME CASE ENGINE FOLDER MICRO_BATCH_ROWS

Reads lines "step" from its input and answers each with one line "RESULT {…}". Precision and gradient checkpointing are
the case's, for all alike. In bfloat16 the student's weights stay float32 and its products are made in bfloat16 by
autocast, here as with TRL's bf16=True; the teacher's weights are bfloat16.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from tgpo_lab.benchmark import peak_memory
from tgpo_lab.benchmark_cases import CASES, ENGINES, Case
from tgpo_lab.precision import dtype_of
from tgpo_lab.random_pair import paths_of

LOOP, LOOP_MEASURING = "tgpo_lab", "tgpo_lab, measuring"
GRPO, DISTILLATION = "TRL GRPOTrainer", "TRL DistillationTrainer"


class Pacer:
    """Waits for the word before each step, and says how long the step took and what the process held at most."""

    def wait(self) -> None:
        """Block until the next step is wanted; end the process if none is."""
        if sys.stdin.readline().strip() != "step":
            raise SystemExit
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def report(self) -> None:
        """Send seconds by the clock and of processor time, and peak memory until now in bytes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step = {
            "seconds": time.perf_counter() - self._wall,
            "processor_seconds": time.process_time() - self._processor,
            **peak_memory(),
        }
        print(f"RESULT {json.dumps(step)}", flush=True)


def run_loop(case_name: str, engine: str, folder: Path, measured_positions: int) -> None:
    """This loop as it is; its progress display is where it pauses."""
    from tgpo_lab import training
    from tgpo_lab.loop.progress import TrainingProgress

    class PacedProgress(TrainingProgress):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._pacer = Pacer()

        def __enter__(self):
            self._pacer.wait()
            return super().__enter__()

        def update(self, step, row):
            super().update(step, row)
            self._pacer.report()
            self._pacer.wait()

    config = CASES[case_name].config(
        **paths_of(folder),
        **ENGINES[engine],
        steps=10**6,
        checkpoint_every=10**6,
        measured_positions=measured_positions,
        output=str(folder / f"run-{os.getpid()}"),
    )
    with mock.patch.object(training, "TrainingProgress", PacedProgress):
        training.train(config, show_progress=False)


def run_trl(name: str, case_name: str, engine: str, folder: Path, micro_batch_rows: int) -> None:
    """A trainer of TRL, paused by a callback."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from tgpo_lab.tasks.prompts import load_prompts

    pacer = Pacer()

    class Pace(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            pacer.wait()

        def on_step_end(self, *arguments, **options):
            pacer.report()
            pacer.wait()

    case, paths = CASES[case_name], paths_of(folder)
    config, half = case.config(), case.config().precision == "bfloat16"
    rows = config.prompts_per_step * config.group_size
    tokenizer = AutoTokenizer.from_pretrained(paths["student"])
    # The id that the pair's checkpoints name as their end token: one past the vocabulary, never written.
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    prompts = load_prompts(paths["dataset"])["train"]["prompt"]
    common = dict(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        per_device_train_batch_size=micro_batch_rows,
        gradient_accumulation_steps=rows // micro_batch_rows,
        max_steps=10**6,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_gradient_norm,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        bf16=half,
        gradient_checkpointing=config.gradient_checkpointing,
        **sampling_of(engine, case),
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    student = AutoModelForCausalLM.from_pretrained(paths["student"], dtype=torch.float32)
    if name == GRPO:
        trainer = GRPOTrainer(
            student,
            reward_funcs=lambda completion_ids, **_: [len(set(ids)) / len(ids) for ids in completion_ids],
            args=GRPOConfig(num_generations=config.group_size, **common),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Pace()],
        )
    else:
        trainer = DistillationTrainer(
            student,
            teacher_model=AutoModelForCausalLM.from_pretrained(paths["teacher"], dtype=dtype_of(config.precision)),
            args=DistillationConfig(shuffle_dataset=False, **common),
            # It samples once for each row, so a prompt stands there as often as it is sampled.
            train_dataset=Dataset.from_dict({"prompt": [p for p in prompts for _ in range(config.group_size)]}),
            processing_class=tokenizer,
            callbacks=[Pace()],
        )
    trainer.train()


def sampling_of(engine: str, case: Case) -> dict[str, object]:
    """How TRL samples: by transformers' generate, or by vLLM with as much memory and room as this loop gives it."""
    if engine != "vllm":
        return {}
    config = case.config(**ENGINES[engine])
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": config.vllm_memory_share,
        "vllm_enable_sleep_mode": config.vllm_sleep,
        "vllm_max_model_length": case.pair.prompt_tokens + config.max_new_tokens,
    }


def main(name: str, case: str, engine: str, folder: str, micro_batch_rows: str) -> None:
    """Run a program until its input ends."""
    if name == LOOP:
        run_loop(case, engine, Path(folder), measured_positions=1)
    elif name == LOOP_MEASURING:
        run_loop(case, engine, Path(folder), measured_positions=1024)
    else:
        run_trl(name, case, engine, Path(folder), int(micro_batch_rows))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        print("usage: python benchmarks/programs.py NAME CASE ENGINE FOLDER MICRO_BATCH_ROWS", file=sys.stderr)
        sys.exit(2)
    main(*sys.argv[1:])
