"""The training loop, for every method: sample → reward → teacher → update → measure → save.

One file, read top to bottom. It deviates from the paper's set-up in this: rollouts are sampled by
the model itself and not by a serving engine; responses cut at the token limit get no reward; by
default one update is made per batch, so π_old is πθ and nothing is clipped.

    python -m tgpo_lab train --method tgpo --student far --output runs/tgpo
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .allocator import keep_freed_memory
from .batch import Batch
from .checkpoints import CheckpointState, load_optimizer, read_state, save_checkpoint
from .clock import Clock
from .config import TrainConfig
from .errors import InputError
from .evaluation import evaluate
from .lora import add_adapters, load_adapters, require_peft, save_merged
from .measurement import ClippedTokens, StepMeasurement, choose_measured, gradients_by_kind
from .methods import method_name
from .metrics import MetricsLog, metrics_frame
from .micro_batches import split_rows
from .mini_batches import mini_batches, rows_of_groups
from .model_card import model_card
from .pairs import load_model, load_pair, require_room
from .progress import TrainingProgress
from .prompts import load_prompts, training_and_held_out
from .randomness import derived_seed, generator_for, rows_of_step
from .rewards import reward_function, score
from .rollouts import join_rollouts
from .runs import CHECKPOINTS, METRICS_FILE, RunResult, check_resumable, latest_checkpoint, start_run
from .sampling import sample_responses
from .stopping import NonFiniteError, StopRequest, save_failed_batch
from .student_pass import StudentPass, accumulate_gradients
from .teacher_sources import open_teacher
from .trackers import tracked, tracking_accelerator

_TEACHER_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(config: TrainConfig, *, resume: bool = False, show_progress: bool = True) -> RunResult:
    """Train the student of a pair.

    Ctrl-C ends the run after the step in hand, with a checkpoint. A run that was stopped or killed
    goes on with ``resume=True`` and ends with the same weights, bit for bit on a CPU, as one that
    was not.

    Args:
        config: everything that decides the run.
        resume: go on from the newest checkpoint in ``config.output``.
        show_progress: print a progress bar with the latest measurements.

    Raises:
        InputError: something in the configuration, the pair or the folder cannot work.
        NonFiniteError: a loss or gradient became infinite or NaN; the batch is saved, no update made.
    """
    if config.lora_rank:
        require_peft()
    accelerator = tracking_accelerator(Path(config.output), config.trackers)
    if accelerator.num_processes > 1:
        raise InputError("The loop runs in one process so far. Start it without accelerate launch.")
    keep_freed_memory()

    # ── Pair, prompts, optimiser ─────────────────────────────────────────────────────────────────
    pair = load_pair(
        config.student, config.teacher, dtype=_TEACHER_DTYPE[config.precision], device=accelerator.device,
        # Frozen weights need no room for small updates.
        student_dtype=_TEACHER_DTYPE[config.precision] if config.lora_rank else torch.float32,
        teacher_device=config.teacher_weights_device, prompt_format=config.prompt_format,
    )  # fmt: skip
    if config.method.top_k > pair.vocabulary_size:
        raise InputError(
            f"guidance_top_k ({config.method.top_k}) cannot exceed the tokens of the pair ({pair.vocabulary_size})."
        )
    source = config.dataset or pair.prompts
    if source is None:
        raise InputError(f"{pair.name} brings no prompts. Give a dataset: a folder with train.jsonl, or a hub name.")
    splits = load_prompts(source, **config.prompt_options)
    training_prompts, held_out = training_and_held_out(splits, config.evaluation_prompts, source)
    require_room(pair, [*training_prompts["prompt"], *held_out["prompt"]], config.max_new_tokens)
    teacher = open_teacher(config, pair, training_prompts["prompt"], accelerator.device)
    directory = Path(config.output)
    first_step = 0
    if resume:
        check_resumable(config, directory)
        checkpoint = latest_checkpoint(directory)
        first_step = read_state(checkpoint).step
        if config.lora_rank:
            load_adapters(pair.student, checkpoint)
        else:
            pair.student = load_model(checkpoint, torch.float32, accelerator.device)
    else:
        start_run(config)
        if config.lora_rank:
            add_adapters(pair.student, config.lora_rank, config.lora_alpha, config.seed)
    student = pair.student
    if config.gradient_checkpointing:
        # The old name warns from transformers 5.23 on, the new one is missing before.
        enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, (config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
    )
    method = copy.deepcopy(config.method)  # a schedule may keep state
    traces_per_prompt = {"none": 0, "one_per_prompt": 1, "one_per_sample": config.group_size}[method.teacher_traces]
    log = MetricsLog(directory / METRICS_FILE)
    if resume:
        load_optimizer(checkpoint, student, optimizer)
        if method.schedule is not None:
            method.schedule.load_state(read_state(checkpoint).schedule)
        log.rewind(first_step)

    def save(step: int) -> None:
        schedule = method.schedule.state() if method.schedule is not None else {}
        save_checkpoint(
            directory / CHECKPOINTS,
            CheckpointState(step, schedule),
            student,
            pair.tokenizer,
            optimizer,
            config.keep_checkpoints,
            card=model_card(config, log.rows, step),
            write_student=save_merged if config.lora_merged else PreTrainedModel.save_pretrained,
        )

    def autocast() -> torch.autocast:
        return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")

    def passes(batch: Batch, rows: Tensor) -> Iterator[StudentPass]:
        for part in split_rows(batch.rollouts.rows(rows), config.micro_batch_tokens):
            yield StudentPass(batch, rows.to(part.device)[part], pair, config.temperature, autocast)

    def held_out_accuracy() -> float:
        with autocast():
            return evaluate(pair, prompts=held_out, temperature=config.evaluation_temperature, seed=config.seed,
                            max_new_tokens=config.max_new_tokens, reward=config.reward).accuracy  # fmt: skip

    if not resume:
        save(0)  # from here on there is always a whole checkpoint to go back to
    clock = Clock(accelerator.device)
    judge = reward_function(config.reward)
    step, seconds_save = first_step, 0.0
    progress = TrainingProgress(method_name(method), first_step, config.steps, show_progress)
    with StopRequest() as stop, progress, tracked(accelerator, directory.name, config.as_dict()) as track:
        while step < config.steps and not stop.requested:
            torch.manual_seed(derived_seed(config.seed, "step", step))  # for dropout, where a model has any
            row: dict[str, float] = {"step": step}
            student.eval()
            clock.start()

            # ── Held-out accuracy, before the update of this step ────────────────────────────────
            if config.evaluate_every and step % config.evaluate_every == 0:
                row["accuracy"] = held_out_accuracy()
            seconds_measure = clock.lap()

            # ── Sample ───────────────────────────────────────────────────────────────────────────
            chosen = training_prompts[rows_of_step(config.seed, step, config.prompts_per_step, len(training_prompts))]
            prompts = pair.encode(chosen["prompt"])
            with autocast():
                sampled = sample_responses(
                    student, prompts, config.max_new_tokens, pair.end_tokens, pair.pad_token,
                    samples_per_prompt=config.group_size, temperature=config.temperature,
                    generator=generator_for(config.seed, "sampling", "student", step),
                    vocabulary_size=pair.vocabulary_size,
                )  # fmt: skip
                row["seconds_sample"] = clock.lap()
                traces = [teacher.write(prompts, traces_per_prompt, step)] if traces_per_prompt else []
                row["seconds_traces"] = clock.lap()
            row["seconds_sample"] += row["seconds_traces"]
            rollouts = join_rollouts([sampled, *traces])
            from_teacher = torch.arange(len(rollouts), device=accelerator.device) >= len(sampled)

            # ── Reward ───────────────────────────────────────────────────────────────────────────
            answers = [answer for answer in chosen["answer"] for _ in range(config.group_size)]
            answers += [answer for answer in chosen["answer"] for _ in range(traces_per_prompt)]
            rewards = score(rollouts, answers, judge, pair.tokenizer).to(accelerator.device)
            row["seconds_reward"] = clock.lap()

            # ── Teacher: its answers at every prefix of the student's rollouts ───────────────────
            student_rollouts = rollouts.rows((~from_teacher).nonzero().squeeze(-1))
            measured = choose_measured(
                student_rollouts, config.measured_positions, generator_for(config.seed, "measured", step)
            )
            keep = student_rollouts.mask if method.needs_distribution else measured
            asked = teacher.ask(
                student_rollouts,
                keep_distribution=keep if teacher.gives_distributions else None,
                top_k=method.top_k,
                sampling_generator=generator_for(config.seed, "teacher", step)
                if method.samples_teacher_tokens
                else None,
            )
            batch = Batch(
                rollouts=rollouts,
                from_teacher=from_teacher,
                rewards=rewards,
                teacher=asked.padded_to(rollouts.mask.shape),
                behaviour_logprobs=None,
                group_size=config.group_size,
                max_new_tokens=config.max_new_tokens,
                random=generator_for(config.seed, "method", step),
            )
            row["teacher_tokens"] = float(sum(map(len, student_rollouts.prompts)) + student_rollouts.lengths.sum())
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
                    for student_pass in passes(batch, torch.arange(len(rollouts))):
                        for positions in student_pass.positions():
                            positions.write_logprobs(behaviour)
                            measurement.add(positions)
                batch = batch.with_behaviour(behaviour)
            sums: dict[str, float] = {}
            gradient_norm = 0.0
            for number, groups in enumerate(updates):
                rows = rows_of_groups(groups, config.group_size, len(prompts), traces_per_prompt)
                mini_batch = batch.restricted_to(rows.to(accelerator.device))
                terms = method.terms(mini_batch, step)
                optimizer.zero_grad(set_to_none=True)
                if measure_terms and number == 0:
                    row |= gradients_by_kind(
                        lambda batch=mini_batch, rows=rows: passes(batch, rows),
                        terms, parameters, accelerator, autocast,
                    )  # fmt: skip
                clipped = ClippedTokens(method)
                look = measurement.add if len(updates) == 1 else clipped.add
                losses = accumulate_gradients(passes(mini_batch, rows), terms, accelerator, autocast, look)
                if number < config.mini_batches:  # the first pass over the batch
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0.0) + float(value) / config.mini_batches
                norm = float(accelerator.clip_grad_norm_(parameters, config.max_gradient_norm))
                if not math.isfinite(norm) or not all(math.isfinite(x) for x in sums.values()):
                    bad = next((name for name, x in sums.items() if not math.isfinite(x)), "the gradient")
                    kept = save_failed_batch(directory, step, bad, batch)
                    raise NonFiniteError(
                        f"Step {step}: {bad} is not finite (gradient norm {norm}). No update was made. The batch is in "
                        f"{kept}, the last good checkpoint in {latest_checkpoint(directory)}. A lower learning rate "
                        "or a smaller weight of the teacher term is the usual remedy."
                    )
                optimizer.step()
                gradient_norm = max(gradient_norm, norm)
            row["seconds_update"] = clock.lap()

            # ── Measure ──────────────────────────────────────────────────────────────────────────
            row |= measurement.summary() | sums
            if method.schedule is not None:
                row["weight"] = method.schedule(step)
                method.schedule.observe(step, row["agreement"])
            row["gradient_norm"] = gradient_norm
            row["clip_fraction"] = clipped.count / max(1.0, row["tokens"] / config.mini_batches)
            row["learning_rate"] = learning_rate
            row["seconds_measure"] = seconds_measure + clock.lap()
            row["seconds_save"] = seconds_save
            log.append(row)
            track(row)
            step += 1
            progress.update(step, row)

            # ── Save ─────────────────────────────────────────────────────────────────────────────
            seconds_save = 0.0
            if step % config.checkpoint_every == 0 or step == config.steps or stop.requested:
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
