"""The options of TGPO beside those of TRL's GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from ...errors import InputError
from ...methods.tgpo import TGPO
from ...schedules import UntilAgreement, parse_schedule

GUIDANCE = ("argmax", "sampled", "top_k")


@dataclass
class TGPOConfig(GRPOConfig):
    """GRPOConfig and the guidance of :class:`tgpo_lab.methods.tgpo.TGPO`, whose names and defaults these are.

    Raises:
        InputError: an option that cannot work.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    weight: str = field(
        default=str(TGPO().weight),
        metadata={
            "help": "w as a schedule over optimizer steps, such as 'LinearDecay(0.002, 1e-05)', or a number. "
            "Where it is 0 the teacher is not asked."
        },
    )
    guidance: str = field(
        default=TGPO.guidance,
        metadata={
            "help": "The teacher's token: its best one, one drawn from it, or its top-k. Each token costs one "
            "projection to the student's vocabulary.",
            "choices": GUIDANCE,
        },
    )
    guidance_top_k: int = field(default=TGPO.guidance_top_k, metadata={"help": "K of top_k."})
    gate: str = field(
        default=TGPO.gate,
        metadata={"help": "Where guidance counts: none, confidence, first_departure or trust_horizon."},
    )
    gate_threshold: float = field(
        default=TGPO.gate_threshold,
        metadata={"help": "Trust horizon: the nats of doubt at which it ends. Confidence: the probability to exceed."},
    )
    doubt: str = field(
        default=TGPO.doubt,
        metadata={"help": "Of the trust horizon: worst_token or sum, of the teacher's surprises at a prefix."},
    )
    doubt_memory: float = field(
        default=TGPO.doubt_memory,
        metadata={"help": "Of the trust horizon: from 0 (the last token alone) to 1 (doubt never fades)."},
    )
    soft_horizon: bool = field(
        default=TGPO.soft_horizon,
        metadata={"help": "Of the trust horizon: weigh guidance by exp(-doubt/threshold), in place of 1 or 0."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained for a teacher given by name; its dtype is the checkpoint's."},
    )
    per_device_teacher_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows that go through the teacher at once; by default per_device_train_batch_size."},
    )

    def __post_init__(self) -> None:
        self.weight = str(self.weight)  # a Schedule or a number will do
        super().__post_init__()
        method = self.method()
        if self.guidance not in GUIDANCE:
            raise InputError(f"guidance of TGPOTrainer is {', '.join(GUIDANCE)}, but is {self.guidance!r}.")
        if isinstance(method.weight, UntilAgreement) and self.guidance == "sampled":
            raise InputError(
                "UntilAgreement needs the agreement of the most probable tokens, which guidance='sampled' does not "
                "measure here. Use guidance='argmax' or another schedule."
            )
        if self.per_device_teacher_batch_size is not None and self.per_device_teacher_batch_size < 1:
            raise InputError(
                f"per_device_teacher_batch_size must be 1 or more, but is {self.per_device_teacher_batch_size}."
            )
        if (self.teacher_model_init_kwargs or {}).get("trust_remote_code"):
            raise InputError("teacher_model_init_kwargs holds trust_remote_code: a teacher's own code is not run.")

    def method(self) -> TGPO:
        """The guidance as a method of this package; only its guidance is used, the reward term is TRL's."""
        names = {item.name for item in fields(TGPO)} & {item.name for item in fields(TGPOConfig)} - {"weight"}
        return TGPO(weight=parse_schedule(self.weight), **{name: getattr(self, name) for name in sorted(names)})
