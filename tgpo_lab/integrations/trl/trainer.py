"""A GRPOTrainer with teacher guidance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from ...errors import InputError
from ...files import write_json
from ...loop.clock import Clock
from ...losses import negative_log_likelihood
from ...models.shared_vocabulary import named_end_tokens, shared_end_tokens
from ...randomness import derived_seed
from ...schedules import UntilAgreement
from .batch_teacher import answer_in_forward, ask_about_batch, load_teacher, shared_tokens
from .config import TGPOConfig
from .guided_forward import GuidedForward

logger = get_logger(__name__)

SCHEDULE_FILE = "guidance_schedule.json"
"""In a checkpoint: the state of a schedule that has one."""


class TGPOTrainer(GRPOTrainer):
    """Teacher-guided policy optimisation (arXiv 2605.13230) on TRL's engine: L = L_GRPO + w_k·L_G.

    L_GRPO is TRL's own loss, whatever ``args`` makes of it. L_G = −1/Z Σ_t g_t log πθ(y_t^T | x, y_<t) with y_t^T the
    teacher's token at the student's own prefix and g_t the weight of the gate. Z is the number of completion tokens of
    the batch over all processes and accumulated steps, for every ``loss_type``. k counts optimizer steps from 0.

    The teacher is asked once about every batch of completions, and not at all where w is 0. Its answers stay with the
    batch, so that accumulated steps and ``num_iterations`` use them again.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "tgpo"]
    _name = "TGPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Teacher-Guided Policy Optimization for On-Policy Reasoning Distillation under Large Policy "
        "Divergence",
        "id": "2605.13230",
        "citation": "@misc{tgpo2026,\n"
        "    title         = {Teacher-Guided Policy Optimization for On-Policy Reasoning Distillation under Large "
        "Policy Divergence},\n"
        "    year          = {2026},\n"
        "    eprint        = {2605.13230},\n"
        "    archivePrefix = {arXiv}\n"
        "}",
    }

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: TGPOConfig | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        """Make a trainer.

        Args:
            model: the student, as GRPOTrainer takes it.
            teacher_model: the teacher, or its folder or hub name. It is frozen, and prepared as TRL prepares a
                reference model.
            reward_funcs: as GRPOTrainer takes them.
            args: a TGPOConfig.
            teacher_processing_class: the teacher's tokenizer, where it does not stand beside the model.
            options: further arguments of GRPOTrainer, by name: ``train_dataset``, ``peft_config`` and so on.

        Raises:
            InputError: the tokenizers differ, or the teacher cannot be loaded or used.
        """
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = TGPOConfig(f"{Path(name).name}-TGPO")
        if not isinstance(args, TGPOConfig):
            raise InputError(f"args must be a TGPOConfig, but is a {type(args).__name__}: it lacks the guidance.")
        super().__init__(model, reward_funcs, args, **options)
        if self._is_vlm:
            raise InputError("TGPOTrainer guides text alone, but the student's processor takes images.")
        self._method = args.method()
        self._schedule = self._method.weight
        self._sums_of_step: Tensor | None = None  # of the micro-batches of a step so far

        student = self._plain_model(self.model)
        teacher, teacher_tokenizer = load_teacher(
            teacher_model, teacher_processing_class, args.teacher_model_init_kwargs or {}
        )
        self._vocabulary_size = shared_tokens(student, self._tokenizer, teacher, teacher_tokenizer)
        if self._method.top_k > self._vocabulary_size:
            raise InputError(
                f"guidance_top_k ({self._method.top_k}) cannot exceed the tokens of the pair ({self._vocabulary_size})."
            )
        self._end_as_either(student, teacher, teacher_tokenizer)
        # TRL's own head does not say which token is the most probable; agreement needs it.
        add_fused_lm_head(
            student, self.temperature, args.cast_lm_head_to_fp32, outputs=("log_probs", "entropy", "is_top1")
        )
        answer_in_forward(teacher)
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        elif self.is_fsdp_enabled:
            self.teacher_model = prepare_fsdp(teacher, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _end_as_either(
        self, student: PreTrainedModel, teacher: PreTrainedModel, teacher_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """End completions where the teacher would as well: guidance teaches the student to end as the teacher does."""
        ends = shared_end_tokens(
            self._vocabulary_size,
            sorted(self.eos_token_ids),
            named_end_tokens(teacher, teacher_tokenizer),
            (self._tokenizer, teacher_tokenizer),
        )
        if ends == sorted(self.eos_token_ids):
            return
        self.eos_token_ids = ends
        student.generation_config.eos_token_id = ends  # whoever generates with the trained student has to stop there
        if self.use_vllm:
            logger.warning(
                f"Student and teacher end differently, and vLLM knows the student's ends alone: "
                f"set generation_kwargs={{'stop_token_ids': {ends}}}."
            )
        else:
            self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = ends

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not any(map(self._schedule, self._steps_of_batch())):
            return batch
        clock = Clock(self.accelerator.device)
        clock.start()
        step, process = self.state.global_step, self.accelerator.process_index
        rows = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            batch |= ask_about_batch(
                self.teacher_model,
                batch,
                self._method,
                vocabulary_size=self._vocabulary_size,
                rows_at_once=self.args.per_device_teacher_batch_size or rows,
                sampling_seed=derived_seed(self.args.seed, "teacher", step, process)
                if self._method.samples_teacher_tokens
                else None,
            )
        self._record("seconds_teacher", clock.lap())
        return batch

    def _steps_of_batch(self) -> range:
        """The optimizer steps in which a batch sampled now may be used."""
        first = self.state.global_step
        if not self.model.training:
            return range(first, first + 1)
        micro_batches = self.args.steps_per_generation * self.num_iterations
        return range(first, first + math.ceil(micro_batches / self.args.gradient_accumulation_steps) + 1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        weight = self._schedule(self.state.global_step)
        self._record("weight", weight)
        if not weight or "teacher_tokens" not in inputs:
            return super()._compute_loss(model, inputs)
        backbone = self._plain_model(model).base_model
        guided = GuidedForward(model, backbone, inputs["teacher_tokens"])
        loss = super()._compute_loss(guided, inputs)

        mask = inputs["completion_mask"]
        mask = (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()
        guidance = negative_log_likelihood(
            guided.logprobs, mask, self._tokens_of_step(inputs), inputs["guidance_weights"], inputs["teacher_logprobs"]
        )
        self._record_guidance(guidance.detach() * self._tokens_of_step(inputs), mask, inputs, guided)
        return loss + weight * guidance

    def _tokens_of_step(self, inputs: dict[str, Any]) -> Tensor:
        """Z over the number of processes, whose gradients are averaged.

        As TRL has it for "dapo": the tokens are known of the generation batch, which may be shared out to several
        optimizer steps.
        """
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if not self.model.training:
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _record_guidance(self, guidance: Tensor, mask: Tensor, inputs: dict[str, Any], guided: GuidedForward) -> None:
        """Log means over the tokens of an optimizer step, all processes together, and tell them to the schedule."""
        agreeing = guided.most_probable[..., 0] & mask  # the first of a top-k list is the best
        sums = torch.stack([guidance, inputs["guidance_weights"][mask].sum(), agreeing.sum(), mask.sum()])
        if self.model.training:
            sums = sums if self._sums_of_step is None else self._sums_of_step + sums
            self._sums_of_step = None if self.accelerator.sync_gradients else sums
            if not self.accelerator.sync_gradients:
                return
        *sums, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss, weights, agreeing = (value / max(1, tokens) for value in sums)
        self._record("loss_teacher", loss)
        self._record("guided", weights)
        if not self._method.samples_teacher_tokens:  # those are drawn tokens, not the teacher's best
            self._record("agreement", agreeing)
            if self.model.training:
                self._schedule.observe(self.state.global_step, agreeing)

    def _record(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _plain_model(self, model: Any) -> PreTrainedModel:
        """The causal language model inside what the launcher and peft put around it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._schedule.state() and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            write_json(folder / SCHEDULE_FILE, self._schedule.state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self._schedule, UntilAgreement):
            return
        file = Path(checkpoint, SCHEDULE_FILE)
        if not file.exists():
            raise InputError(
                f"{checkpoint} holds no {SCHEDULE_FILE}, without which {self._schedule} cannot go on. "
                "Give a checkpoint that was written with this schedule."
            )
        self._schedule.load_state(json.loads(file.read_text()))
