"""The programs that against_trl.py compares, each taking a step when told to.

    python benchmarks/programs.py NAME CASE FOLDER MICRO_BATCH_ROWS

Reads lines "step" from its input and answers each with one line "RESULT {…}".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LOOP, LOOP_MEASURING = "tgpo_lab", "tgpo_lab, measuring"
GRPO, DISTILLATION = "TRL GRPOTrainer", "TRL DistillationTrainer"


class Pacer:
    """Waits for the word before each step, and says how long the step took."""

    def wait(self) -> None:
        """Block until the next step is wanted; end the process if none is."""
        if sys.stdin.readline().strip() != "step":
            raise SystemExit
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def report(self) -> None:
        """Send seconds by the clock and of processor time."""
        seconds = {
            "seconds": time.perf_counter() - self._wall,
            "processor_seconds": time.process_time() - self._processor,
        }
        print(f"RESULT {json.dumps(seconds)}", flush=True)


def run_loop(case_name: str, folder: Path, measured_positions: int) -> None:
    """This loop as it is; its progress display is where it pauses."""
    from tgpo_lab import training
    from tgpo_lab.benchmark import CASES
    from tgpo_lab.config import TrainConfig
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

    config = TrainConfig.preset(
        "tiny",
        "tgpo",
        **paths_of(folder),
        **CASES[case_name].settings,
        steps=10**6,
        evaluate_every=0,
        gradient_terms_every=0,
        checkpoint_every=10**6,
        measured_positions=measured_positions,
        evaluation_prompts=1,
        output=str(folder / f"run-{os.getpid()}"),
    )
    with mock.patch.object(training, "TrainingProgress", PacedProgress):
        training.train(config, show_progress=False)


def run_trl(name: str, case_name: str, folder: Path, micro_batch_rows: int) -> None:
    """A trainer of TRL, paused by a callback."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from tgpo_lab.benchmark import CASES
    from tgpo_lab.tasks.prompts import load_prompts

    pacer = Pacer()

    class Pace(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            pacer.wait()

        def on_step_end(self, *arguments, **options):
            pacer.report()
            pacer.wait()

    settings, paths = CASES[case_name].settings, paths_of(folder)
    rows = settings["prompts_per_step"] * settings["group_size"]
    tokenizer = AutoTokenizer.from_pretrained(paths["student"])
    # The id that the pair's checkpoints name as their end token: one past the vocabulary, never written.
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    prompts = load_prompts(paths["dataset"])["train"]["prompt"]
    common = dict(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        per_device_train_batch_size=micro_batch_rows,
        gradient_accumulation_steps=rows // micro_batch_rows,
        max_steps=10**6,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
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
            args=GRPOConfig(num_generations=settings["group_size"], **common),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[Pace()],
        )
    else:
        trainer = DistillationTrainer(
            student,
            teacher_model=AutoModelForCausalLM.from_pretrained(paths["teacher"], dtype=torch.float32),
            args=DistillationConfig(shuffle_dataset=False, **common),
            # It samples once for each row, so a prompt stands there as often as it is sampled.
            train_dataset=Dataset.from_dict({"prompt": [p for p in prompts for _ in range(settings["group_size"])]}),
            processing_class=tokenizer,
            callbacks=[Pace()],
        )
    trainer.train()


def paths_of(folder: Path) -> dict[str, str]:
    """Where :func:`tgpo_lab.benchmark.write_random_pair` put things."""
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "dataset": str(folder / "prompts")}


def main(name: str, case: str, folder: str, micro_batch_rows: str) -> None:
    """Run a program until its input ends."""
    if name == LOOP:
        run_loop(case, Path(folder), measured_positions=1)
    elif name == LOOP_MEASURING:
        run_loop(case, Path(folder), measured_positions=1024)
    else:
        run_trl(name, case, Path(folder), int(micro_batch_rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
