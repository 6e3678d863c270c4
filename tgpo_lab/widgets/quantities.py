"""What tokens can be coloured by: names, units and where a value stands on the colour scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from ..explorer.guidance_view import GuidanceView

NATS_AT_FULL_COLOR = 4.0  # as in the report: the default threshold above which a token counts as rejected


@dataclass(frozen=True)
class Quantity:
    """One quantity. Its place on the scale, from −1 (purple) to 1 (orange), is ``offset + direction·value/full``."""

    name: str
    """Key in :meth:`tgpo_lab.explorer.guidance_view.GuidanceView.quantities`."""
    label: str
    unit: str
    low: str
    """What the smallest values mean."""
    high: str
    """What the largest values mean."""
    direction: int
    """1 where large values are orange, −1 where they are purple."""
    full: float
    """Size at which the colour is full."""
    signed: bool = False
    """Whether values below 0 occur."""
    offset: float = 0.0


def _weight(method: str, label: str) -> Quantity:
    return Quantity(
        f"weight_{method}",
        f"Weight in the {label} gradient",
        "",
        "lowers the written token",
        "raises it",
        -1,
        4.0,
        True,
    )


QUANTITIES = (
    Quantity(
        "token_reward", "Reverse-KL reward log πT − log πθ", "nats", "the teacher finds it less probable",
        "more probable", -1, NATS_AT_FULL_COLOR, True,
    ),
    Quantity("student_surprise", "Surprise of the student −log πθ", "nats", "expected", "improbable", 1, 4.0),
    Quantity("teacher_surprise", "Surprise of the teacher −log πT", "nats", "expected", "improbable", 1, 4.0),
    Quantity("student_entropy", "Entropy of the student", "nats", "sure of the token", "undecided", -1, 2.0),
    Quantity("teacher_entropy", "Entropy of the teacher", "nats", "sure of the token", "undecided", -1, 2.0),
    Quantity("agreement", "Agreement on the most probable token", "", "they differ", "they agree", -1, 1.0, False, 1.0),
    _weight("rkl", "RKL"),
    _weight("exact_rkl", "exact RKL"),
    _weight("grpo", "GRPO"),
    _weight("tgpo", "TGPO"),
)  # fmt: skip
BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}


def scaled_quantities(views: Iterable[GuidanceView]) -> list[Quantity]:
    """The quantities, with the scales of the gradient weights fitted to some views: 1, 2 or 5 times a power of ten."""
    largest = dict.fromkeys(BY_NAME, 0.0)
    for view in views:
        for name, values in view.quantities().items():
            largest[name] = max(largest[name], float(values.abs().max()))
    return [
        replace(quantity, full=_round_up(largest[quantity.name]))
        if quantity.name.startswith("weight_") and 0 < largest[quantity.name] < float("inf")
        else quantity
        for quantity in QUANTITIES
    ]


def place_on_scale(quantity: Quantity, value: float) -> float:
    """From −1 (purple) over 0 (the page's tone) to 1 (orange)."""
    return max(-1.0, min(1.0, quantity.offset + quantity.direction * value / quantity.full))


def as_plain(quantity: Quantity) -> dict[str, object]:
    """Plain values for the browser."""
    return asdict(quantity)


def _round_up(value: float) -> float:
    power = 10.0 ** (len(str(int(value))) - 1) if value >= 1 else 1.0
    while value <= power / 10:
        power /= 10
    return next(round(digit * power, 12) for digit in (0.1, 0.2, 0.5, 1, 2, 5, 10) if digit * power >= value)
