"""What runs of all studies have in common."""

from __future__ import annotations

from ..schedules import LinearDecay, Schedule
from .plan import Variant

STEPS = 45
ZERO_AT = 30  # the paper anneals to zero at step 200 of 300
SETTINGS: dict[str, object] = {
    "steps": STEPS,
    "prompts_per_step": 8,  # half of the default: a run takes half the time, and there are many
    "evaluate_every": 5,
    "evaluation_prompts": 256,
    # The policy itself is judged: greedily, the near pair's student is right from the start.
    "evaluation_temperature": 1.0,
    "measured_positions": 256,
    "gradient_terms_every": 0,
    "checkpoint_every": STEPS,
}
MAIN_METHODS = ("tgpo", "rkl", "grpo", "sft", "tgpo-trust-horizon", "kdrl", "luffy")
"""Those that figures show where there is no room for all; in all figures in this order, and so in the same colours."""
TUNING_SEEDS, SEEDS, FEW_SEEDS = (1000, 1001), tuple(range(10)), tuple(range(5))


def annealed(weight: float, zero_at: int = ZERO_AT) -> LinearDecay:
    """A weight that falls in a straight line to zero."""
    return LinearDecay(weight, weight / zero_at)


def variant_of(method: str, weight: Schedule | None = None, rate: float | None = None, label: str = "") -> Variant:
    """A method by name, perhaps with another weight of its teacher term or another learning rate."""
    options = {} if weight is None else {"weight": weight}
    return Variant(label or method, method, options, {} if rate is None else {"learning_rate": rate})
