"""The training loop, for every method: sample → reward → teacher → update → measure → save.

One file, read top to bottom; what a phase does in detail stands in :mod:`tgpo_lab.loop`. It deviates from the paper's
set-up in this: by default rollouts are sampled by the model itself and not by a serving engine; responses cut at the
token limit get no reward; by default one update is made per batch, so π_old is πθ and nothing is clipped.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .batch import Batch
from .checkpoints import CheckpointState, optimizer_tensors, save_checkpoint
from .config import TrainConfig
from .evaluation import evaluate
from .loop.allocator import keep_freed_memory, use_large_pages
from .loop.clock import Clock
from .loop.measurement import ClippedTokens, StepMeasurement, choose_measured, gradients_by_kind
from .loop.mini_batches import mini_batches, rows_of_groups
from .loop.model_card import model_card
from .loop.out_of_memory import MicroBatchTokens, told_while_loading
from .loop.preparation import Prepared, prepare
from .loop.progress import TrainingProgress
from .loop.requirements import require_packages
from .loop.stopping import StopRequest, failures_told, refuse_non_finite
from .loop.student_pass import StudentPasses
from .methods import method_name
from .metrics import metrics_frame
from .models.lora import save_adapters, save_merged
from .models.recomputation import recompute
from .parallel.processes import Processes
from .parallel.sharding import gathered, whole
from .precision import products_in
from .randomness import derived_seed, generator_for, rows_of_step
from .rollouts import join_rollouts
from .runs import CHECKPOINTS, RunResult, read_id
from .sampling.divided_sampling import sample_divided
from .tasks.rewards import reward_function, score
from .trackers import tracked, tracking_accelerator


def train(config: TrainConfig, *, resume: bool = False, show_progress: bool = True) -> RunResult:
    """Train the student of a pair.

    Ctrl-C ends the run after the step in hand, with a checkpoint. A run that was stopped or killed
    goes on with ``resume=True`` and ends with the same weights, bit for bit on a CPU, as one that
    was not.

    Started by ``accelerate launch`` or ``torchrun``, several processes divide each step's prompts, the held-out ones
    too. Their number, which a resume may change, makes no difference but rounding:
    see :mod:`tgpo_lab.parallel.processes`.

    Args:
        config: everything that decides the run.
        resume: go on from the newest checkpoint in ``config.output``, or begin again where there is none yet.
        show_progress: print a progress bar with the latest measurements.

    Raises:
        InputError: something in the configuration, the pair or the folder cannot work.
        NonFiniteError: a loss or gradient became infinite or NaN; the batch is saved, no update made.
        OtherProcessError: another process of the run failed, ended or does not answer.
        OutOfMemoryError: one row alone does not fit into memory.
        DiskFullError: there is no room for what the run writes; the last checkpoint is whole.
        TeacherServerError: the teacher's server failed.
    """
    use_large_pages()
    keep_freed_memory()
    directory = Path(config.output)
    accelerator = tracking_accelerator(directory, config.trackers)
    processes = Processes(accelerator, f"To go on: tgpo-lab train --resume {directory}, with all processes.")
    require_packages(config, accelerator.device)

    with ExitStack() as held:
        with processes.loss_told(), told_while_loading():
            run = prepare(config, processes, accelerator.device, held, resume=resume)
        return _make_steps(config, run, accelerator, processes, show_progress=show_progress)


def _make_steps(
    config: TrainConfig,
    run: Prepared,
    accelerator: Accelerator,
    processes: Processes,
    *,
    show_progress: bool,
) -> RunResult:
    """The loop itself, from the first step that is left to the last."""
    directory = Path(config.output)
    pair, method, optimizer, parameters, log = run.pair, run.method, run.optimizer, run.parameters, run.log
    student, teacher = pair.student, run.teacher
    traces_per_prompt = config.traces_per_prompt

    def save(step: int) -> None:
        write = PreTrainedModel.save_pretrained
        if config.lora_rank:
            write = save_merged if config.lora_merged else save_adapters
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
        return products_in(config.precision, accelerator.device)

    def held_out_accuracy() -> float:
        with autocast():
            return evaluate(pair, prompts=run.held_out, temperature=config.evaluation_temperature, seed=config.seed,
                            max_new_tokens=config.max_new_tokens, reward=config.reward,
                            processes=processes, engine=run.engine).accuracy  # fmt: skip

    micro_batches = MicroBatchTokens(config.micro_batch_tokens, processes)
    passes = StudentPasses(pair, config.temperature, autocast, accelerator, processes, micro_batches)
    clock = Clock(accelerator.device)
    judge = reward_function(config.reward)
    step, stopping, seconds_save = run.first_step, False, 0.0
    show_progress = show_progress and processes.is_first
    progress = TrainingProgress(method_name(method), step, config.steps, show_progress)
    with (
        processes.loss_told(),
        failures_told(config),
        StopRequest() as stop,
        progress,
        ExitStack() as trackers,
    ):
        if not run.has_checkpoint:
            save(0)  # from here on there is always a whole checkpoint to go back to
        if step == config.steps:
            progress.say(f"All {step} steps are made. To go on, give steps above {step}.")
        track = trackers.enter_context(tracked(accelerator, directory, config.as_dict(), read_id(directory)))
        while step < config.steps and not stopping:
            # For a reward or a model that draws from PyTorch's own generator: nothing in the loop does.
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
                sampled = sample_divided(
                    processes, run.engine, prompts, config.max_new_tokens, pair.end_tokens, pair.pad_token,
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
            rewards = score(rollouts, answers, judge, pair.tokenizer, processes=processes).to(accelerator.device)
            row["seconds_reward"] = clock.lap()

            # ── Teacher: its answers at every prefix of the student's rollouts ───────────────────
            groups = torch.tensor(processes.share(len(prompts)), dtype=torch.long)
            own = rows_of_groups(groups, config.group_size, len(prompts), traces_per_prompt)
            student_rollouts = rollouts.rows((~from_teacher).nonzero().squeeze(-1))
            measured = choose_measured(
                student_rollouts, config.measured_positions, generator_for(config.seed, "measured", step)
            )
            keep = student_rollouts.mask if method.needs_distribution else measured
            # With one update, its loss can have the teacher's output layer compute in place of this phase.
            states_only = method.asks_for_logits_alone and config.mini_batches * config.passes == 1
            ask = functools.partial(
                teacher.ask,
                student_rollouts,
                keep_distribution=keep if teacher.gives_distributions else None,
                top_k=method.top_k,
                sampling_seed=derived_seed(config.seed, "teacher", step) if method.samples_teacher_tokens else None,
                rows=own[own < len(student_rollouts)],
                states_only=states_only,
            )
            asked = micro_batches.fit(student_rollouts, lambda tokens, ask=ask: ask(micro_batch_tokens=tokens))
            batch = Batch(
                rollouts=rollouts,
                from_teacher=from_teacher,
                rewards=rewards,
                teacher=asked.of_all(processes).padded_to(rollouts.mask.shape),
                behaviour_logprobs=None,
                group_size=config.group_size,
                max_new_tokens=config.max_new_tokens,
                random=generator_for(config.seed, "method", step),
                importance_cap=config.importance_cap,
                teacher_states_only=states_only,
            )
            row["teacher_tokens"] = float(sum(map(len, student_rollouts.prompts)) + student_rollouts.lengths.sum())
            row["seconds_teacher"] = clock.lap()

            # ── Update ───────────────────────────────────────────────────────────────────────────
            if config.gradient_checkpointing:
                recompute(student)
            measurement = StepMeasurement(batch, own, _pad_like(measured, rollouts.mask), config.rejection_threshold)
            measure_terms = config.gradient_terms_every and step % config.gradient_terms_every == 0
            learning_rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            updates = mini_batches(config, len(prompts), step)
            if len(updates) > 1:
                # log π_old is computed the way the update computes log πθ, so that the first ratio is exactly 1.
                # This pass is also the one to measure on: the later ones see a student that has moved.
                batch = batch.with_behaviour(passes.logprobs(batch, own, measurement))
            sums: dict[str, float] = {}
            gradient_norm = 0.0
            for number, groups in enumerate(updates):
                rows = rows_of_groups(groups, config.group_size, len(prompts), traces_per_prompt)
                mini_batch = batch.restricted_to(rows.to(accelerator.device))
                rows = rows[torch.isin(rows, own)]
                terms = method.terms(mini_batch, step)
                if measure_terms and number == 0:
                    gradients = functools.partial(passes.gradients, mini_batch, rows)
                    row |= gradients_by_kind(gradients, terms, parameters, processes)
                clipped = ClippedTokens(method)
                losses = passes.gradients(mini_batch, rows, terms, measurement if len(updates) == 1 else clipped)
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
    result = RunResult(directory, config, metrics_frame(log.rows), student, completed)
    if not completed:
        progress.say(result.how_to_go_on)
    return result


def _pad_like(values: Tensor, mask: Tensor) -> Tensor:
    """(rows, steps) bool widened with False to the shape of ``mask``."""
    wide = torch.zeros_like(mask)
    wide[: values.shape[0], : values.shape[1]] = values
    return wide
