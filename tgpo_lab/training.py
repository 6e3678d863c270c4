"""The training loop, for every method: sample → reward → teacher → update → measure → save.

One file, read top to bottom. It deviates from the paper's set-up in this: by default rollouts are
sampled by the model itself and not by a serving engine; responses cut at the token limit get no reward; by
default one update is made per batch, so π_old is πθ and nothing is clipped.

    python -m tgpo_lab train --method tgpo --student far --output runs/tgpo
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .allocator import keep_freed_memory
from .batch import Batch
from .checkpoints import CheckpointState, optimizer_tensors, save_checkpoint
from .clock import Clock
from .config import TrainConfig
from .divided_sampling import sample_step
from .evaluation import evaluate
from .lora import require_peft, save_merged
from .measurement import ClippedTokens, StepMeasurement, choose_measured, gradients_by_kind
from .methods import method_name
from .metrics import metrics_frame
from .mini_batches import mini_batches, rows_of_groups
from .model_card import model_card
from .preparation import prepare
from .processes import Processes
from .progress import TrainingProgress
from .randomness import derived_seed, generator_for, rows_of_step
from .rewards import reward_function, score
from .runs import CHECKPOINTS, RunResult
from .sharding import gathered, whole
from .stopping import StopRequest, refuse_non_finite
from .student_pass import StudentPass, accumulate_gradients, student_passes
from .teacher import ask_teacher
from .trackers import tracked, tracking_accelerator
from .vllm_engine import require_vllm


def train(config: TrainConfig, *, resume: bool = False, show_progress: bool = True) -> RunResult:
    """Train the student of a pair.

    Ctrl-C ends the run after the step in hand, with a checkpoint. A run that was stopped or killed
    goes on with ``resume=True`` and ends with the same weights, bit for bit on a CPU, as one that
    was not.

    Started by ``accelerate launch`` or ``torchrun``, several processes divide each step's prompts, the held-out ones
    too. Their number, which a resume may change, makes no difference but rounding: see :mod:`tgpo_lab.processes`.

    Args:
        config: everything that decides the run.
        resume: go on from the newest checkpoint in ``config.output``.
        show_progress: print a progress bar with the latest measurements.

    Raises:
        InputError: something in the configuration, the pair or the folder cannot work.
        NonFiniteError: a loss or gradient became infinite or NaN; the batch is saved, no update made.
        OtherProcessError: another process of the run failed, ended or does not answer.
    """
    if config.lora_rank:
        require_peft()
    if config.engine == "vllm":
        require_vllm()
    directory = Path(config.output)
    accelerator = tracking_accelerator(directory, config.trackers)
    processes = Processes(accelerator, f"To go on: tgpo-lab train --resume {directory}, with all processes.")
    keep_freed_memory()

    run = prepare(config, processes, accelerator.device, resume=resume)
    pair, method, optimizer, parameters, log = run.pair, run.method, run.optimizer, run.parameters, run.log
    student, teacher = pair.student, pair.teacher

    def save(step: int) -> None:
        write = save_merged if config.lora_merged else PreTrainedModel.save_pretrained
        moments = optimizer_tensors(student, optimizer)
        if processes.sharded:
            weights = gathered(student.state_dict(keep_vars=True), keep=processes.is_first)
            write = functools.partial(write, state_dict=weights)
            moments = gathered(moments, keep=processes.is_first)
        processes.first_alone(
            save_checkpoint,
            directory / CHECKPOINTS,
            CheckpointState(step, method.schedule.state() if method.schedule is not None else {}),
            student,
            pair.tokenizer,
            moments,
            config.keep_checkpoints,
            card=model_card(config, log.rows, step),
            write_student=write,
        )

    def autocast() -> torch.autocast:
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    def passes(batch: Batch, rows: Tensor) -> Iterator[StudentPass]:
        return student_passes(batch, rows, pair, config.temperature, autocast, config.micro_batch_tokens, processes)

    def held_out_accuracy() -> float:
        with autocast():
            return evaluate(pair, prompts=run.held_out, temperature=config.evaluation_temperature, seed=config.seed,
                            max_new_tokens=config.max_new_tokens, reward=config.reward,
                            processes=processes, engine=run.engine).accuracy  # fmt: skip

    if not resume:
        save(0)  # from here on there is always a whole checkpoint to go back to
    clock = Clock(accelerator.device)
    judge = reward_function(config.reward)
    step, stopping, seconds_save = run.first_step, False, 0.0
    show_progress = show_progress and processes.is_first
    progress = TrainingProgress(method_name(method), step, config.steps, show_progress)
    with StopRequest() as stop, progress, tracked(accelerator, directory.name, config.as_dict()) as track:
        while step < config.steps and not stopping:
            # For dropout, where a model has any: the one random choice that depends on the number of processes.
            torch.manual_seed(derived_seed(config.seed, "step", step) + processes.index)
            row: dict[str, float] = {"step": step}
            student.eval()
            clock.start()

            # ── Held-out accuracy, before the update of this step ────────────────────────────────
            if config.evaluate_every and step % config.evaluate_every == 0:
                row["accuracy"] = held_out_accuracy()
            seconds_measure = clock.lap()

            # ── Sample ───────────────────────────────────────────────────────────────────────────
            rows = rows_of_step(config.seed, step, config.prompts_per_step, len(run.training_prompts))
            chosen = run.training_prompts[rows]
            prompts = pair.encode(chosen["prompt"])
            with autocast():
                rollouts, from_teacher = sample_step(config, pair, run.engine, prompts, step, processes)
            row["seconds_sample"] = clock.lap()

            # ── Reward ───────────────────────────────────────────────────────────────────────────
            answers = [answer for answer in chosen["answer"] for _ in range(config.group_size)]
            traces_per_prompt = (len(rollouts) - len(answers)) // len(prompts)
            answers += [answer for answer in chosen["answer"] for _ in range(traces_per_prompt)]
            rewards = score(rollouts, answers, judge, pair.tokenizer, processes=processes).to(accelerator.device)
            row["seconds_reward"] = clock.lap()

            # ── Teacher: one forward pass over the student's rollouts ────────────────────────────
            groups = torch.tensor(processes.share(len(prompts)), dtype=torch.long)
            own = rows_of_groups(groups, config.group_size, len(prompts), traces_per_prompt)
            student_rollouts = rollouts.rows((~from_teacher).nonzero().squeeze(-1))
            measured = choose_measured(
                student_rollouts, config.measured_positions, generator_for(config.seed, "measured", step)
            )
            asked = ask_teacher(
                teacher,
                student_rollouts,
                vocabulary_size=pair.vocabulary_size,
                micro_batch_tokens=config.micro_batch_tokens,
                keep_distribution=student_rollouts.mask if method.needs_distribution else measured,
                top_k=method.top_k,
                sampling_generator=generator_for(config.seed, "teacher", step)
                if method.samples_teacher_tokens
                else None,
                rows=own[own < len(student_rollouts)],
            ).of_all(processes)
            batch = Batch(
                rollouts=rollouts,
                from_teacher=from_teacher,
                rewards=rewards,
                teacher=asked.padded_to(rollouts.mask.shape),
                behaviour_logprobs=None,
                group_size=config.group_size,
                max_new_tokens=config.max_new_tokens,
                random=generator_for(config.seed, "method", step),
                importance_cap=config.importance_cap,
            )
            row["seconds_teacher"] = clock.lap()

            # ── Update ───────────────────────────────────────────────────────────────────────────
            student.train(config.gradient_checkpointing)  # recomputation needs training mode
            measurement = StepMeasurement(batch, _pad_like(measured, rollouts.mask), config.rejection_threshold)
            measure_terms = config.gradient_terms_every and step % config.gradient_terms_every == 0
            learning_rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            updates = mini_batches(config, len(prompts), step)
            if len(updates) > 1:
                # log π_old is computed the way the update computes log πθ, so that the first ratio is exactly 1.
                # This pass is also the one to measure on: the later ones see a student that has moved.
                behaviour = torch.zeros(rollouts.mask.shape, device=accelerator.device)
                with torch.no_grad():
                    for student_pass in passes(batch, own):
                        for positions in student_pass.positions():
                            positions.write_logprobs(behaviour)
                            measurement.add(positions)
                batch = batch.with_behaviour(behaviour)
            sums: dict[str, float] = {}
            gradient_norm = 0.0
            for number, groups in enumerate(updates):
                rows = rows_of_groups(groups, config.group_size, len(prompts), traces_per_prompt)
                mini_batch = batch.restricted_to(rows.to(accelerator.device))
                rows = rows[torch.isin(rows, own)]
                terms = method.terms(mini_batch, step)
                optimizer.zero_grad(set_to_none=True)
                if measure_terms and number == 0:
                    row |= gradients_by_kind(
                        lambda batch=mini_batch, rows=rows: passes(batch, rows),
                        terms, parameters, accelerator, processes, autocast,
                    )  # fmt: skip
                clipped = ClippedTokens(method)
                look = measurement.add if len(updates) == 1 else clipped.add
                losses = accumulate_gradients(passes(mini_batch, rows), terms, accelerator, autocast, look)
                processes.add_gradients(parameters)
                # What a gate lets through is known of the whole batch; losses are of this process's rows.
                losses |= processes.totals({name: x for name, x in losses.items() if name != "guided"})
                if number < config.mini_batches:  # the first pass over the batch
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + float(value) / config.mini_batches
                norm = float(whole(accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)))
                refuse_non_finite(norm, sums, directory, step, batch, processes)
                optimizer.step()
                gradient_norm = max(gradient_norm, norm)
            row["seconds_update"] = clock.lap()

            # ── Measure ──────────────────────────────────────────────────────────────────────────
            row |= measurement.summary(processes) | sums
            if method.schedule is not None:
                row["weight"] = method.schedule(step)
                method.schedule.observe(step, row["agreement"])
            row["gradient_norm"] = gradient_norm
            clipped_tokens = processes.totals({"clipped": clipped.count})["clipped"]
            row["clip_fraction"] = clipped_tokens / max(1.0, row["tokens"] / config.mini_batches)
            row["learning_rate"] = learning_rate
            row["seconds_measure"] = seconds_measure + clock.lap()
            row["seconds_save"] = seconds_save
            log.append(row)
            track(row)
            step += 1
            progress.update(step, row)

            # ── Save ─────────────────────────────────────────────────────────────────────────────
            seconds_save = 0.0
            stopping = processes.any(stop.requested)
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                save(step)
                seconds_save = clock.lap()

        # ── End ──────────────────────────────────────────────────────────────────────────────────
        student.eval()
        completed = step >= config.steps
        if completed and not any(row["step"] == config.steps for row in log.rows):
            log.append({"step": config.steps, "accuracy": held_out_accuracy()})
            track(log.rows[-1])
    if not completed:
        progress.say(f"Stopped after step {step} of {config.steps}. To go on: tgpo-lab train --resume {directory}")
    return RunResult(directory, config, metrics_frame(log.rows), student, completed)


def _pad_like(values: Tensor, mask: Tensor) -> Tensor:
    """(rows, steps) bool widened with False to the shape of ``mask``."""
    wide = torch.zeros_like(mask)
    wide[: values.shape[0], : values.shape[1]] = values
    return wide
