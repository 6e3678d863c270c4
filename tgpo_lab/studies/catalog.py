"""The named studies: which runs answer which question. What they share stands in settings.py and headline.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..schedules import Constant, Trapezoid, UntilAgreement
from ..tiny_world.recipes import PAIR_RECIPES, UNSHIPPED_RECIPES, PairRecipe, dialled, longer_task
from .headline import (
    chosen_configurations,
    headline,
    headline_larger,
    headline_larger_longer,
    tuning,
    tuning_larger,
    tuning_larger_longer,
)
from .plan import Study, Variant
from .results import RESULTS
from .settings import FEW_SEEDS, SEEDS, SETTINGS, STEPS, ZERO_AT, annealed, variant_of

# Divergence and reliability of the map, as its pairs are asked to be; what they are is measured.
OPENINGS = (-1.4, -5.0, -9.0, -13.0, -17.0)
RELIABILITIES = (0.0, 0.5, 1.0)


def _tuned(folder: Path, *methods: str) -> tuple[Variant, ...]:
    """Methods in the configurations that the tuning chose on *far*, so that no method is favoured by its defaults."""
    chosen = chosen_configurations(folder)["far"]
    return tuple(chosen[method] for method in methods)


# ── Map ──────────────────────────────────────────────────────────────────────────────────────────


def map_pair(opening: float, reliability: float) -> str:
    """Name of a pair of the map."""
    return f"map{opening:g}-r{reliability:g}"


def map_recipes() -> dict[str, PairRecipe]:
    """Pairs of the map: every divergence with every reliability."""
    return {
        map_pair(opening, reliability): dialled(PAIR_RECIPES["far"], opening_logprob=opening, reliability=reliability)
        for opening in OPENINGS
        for reliability in RELIABILITIES
    }


def divergence_map(folder: Path) -> Study:
    """Divergence × reliability."""
    recipes = map_recipes()
    return Study(
        "map",
        "Which method wins at which divergence and which reliability of the teacher?",
        tuple(recipes),
        _tuned(folder, "rkl", "grpo", "tgpo", "tgpo-trust-horizon", "tgpo-recovering-horizon"),
        SEEDS,
        SETTINGS,
        recipes,
        references=("tgpo", "tgpo-trust-horizon"),
    )


def rival_recipes() -> dict[str, PairRecipe]:
    """Students that differ in how probable the unused tokens are beside the teacher's opening; the robust teacher."""
    return {
        f"rivals{opening:g}-margin{margin:g}": dialled(
            PAIR_RECIPES["far"], opening_logprob=opening, rival_margin=margin
        )
        for opening in (-9.0, -13.0)
        for margin in (-10.0, 0.0, 3.0)  # −10: as probable as they come
    }


def rivals(folder: Path) -> Study:
    """The far pairs were built with few rivals to the teacher's opening: what if there are many?"""
    recipes = rival_recipes()
    return Study(
        "rivals",
        "How much hangs on the 2,000 unused tokens being less probable than the teacher's opening?",
        tuple(recipes),
        _tuned(folder, "rkl", "grpo", "tgpo", "tgpo-trust-horizon"),
        SEEDS,
        SETTINGS,
        recipes,
        references=("tgpo", "tgpo-trust-horizon"),
    )


def longer(folder: Path) -> Study:
    """Four times the steps and twice the prompts: what never came in the other studies may only come late."""
    return Study(
        "longer",
        "Do reverse KL and GRPO find the teacher's way if they get eight times the samples?",
        ("mid", "far"),
        _tuned(folder, "rkl", "grpo", "tgpo"),
        SEEDS,
        {**SETTINGS, "steps": 4 * STEPS, "prompts_per_step": 16, "evaluate_every": 20, "checkpoint_every": 4 * STEPS},
    )


# ── Conditioning, schedule, horizon ──────────────────────────────────────────────────────────────


def conditioning(folder: Path) -> Study:
    """Teacher tokens at the student's prefixes against teacher tokens from its own responses."""
    return Study(
        "conditioning",
        "Does it matter that the teacher is asked at the student's own prefixes?",
        ("mid", "far"),
        _tuned(folder, "tgpo", "tgpo-unconditioned", "sft", "luffy"),
        SEEDS,
        SETTINGS,
    )


def schedule(folder: Path) -> Study:
    """How the weight of guidance is annealed, and how large it is."""
    shapes = {
        "constant 0.02": Constant(0.02),
        "to the end 0.02": annealed(0.02, STEPS),
        "early to zero 0.02": annealed(0.02),
        "hold, then zero 0.02": Trapezoid(0.02, ZERO_AT // 2, ZERO_AT),
        "until agreement 0.02": UntilAgreement(0.02),
        **{f"early to zero {weight:g}": annealed(weight) for weight in (0.002, 0.0063, 0.063, 0.2)},
    }
    return Study(
        "schedule",
        "How large should guidance be, and when should it end?",
        ("mid", "far"),
        tuple(variant_of("tgpo", weight, label=label) for label, weight in shapes.items()),
        SEEDS,
        SETTINGS,
        references=("early to zero 0.02",),
    )


def horizon(folder: Path) -> Study:
    """Guidance only while the student's prefix is believable to the teacher, in several definitions."""
    guided = {"weight": annealed(0.02)}
    summed, worst = {"doubt": "sum"}, {"doubt": "worst_token"}
    horizons: dict[str, dict[str, object]] = {
        **{f"worst token > {t:g}": {**worst, "gate_threshold": t} for t in (2.0, 4.0, 8.0)},
        "worst token > 8, fading 0.9": {**worst, "gate_threshold": 8.0, "doubt_memory": 0.9},
        "sum > 8": {**summed, "gate_threshold": 8.0, "doubt_memory": 1.0},
        "sum > 8, fading 0.9": {**summed, "gate_threshold": 8.0, "doubt_memory": 0.9},
        "soft sum 8": {**summed, "gate_threshold": 8.0, "doubt_memory": 1.0, "soft_horizon": True},
        "soft sum 8, fading 0.9": {**summed, "gate_threshold": 8.0, "doubt_memory": 0.9, "soft_horizon": True},
    }
    return Study(
        "horizon",
        "Does guidance within a trust horizon repair a teacher that is lost on the student's prefixes?",
        ("far", "far-fragile"),
        (
            Variant("no gate", "tgpo", guided),
            Variant("confidence > 0.9", "tgpo-confidence", guided),
            Variant("first departure", "tgpo-first-departure", guided),
            *(Variant(label, "tgpo-trust-horizon", {**guided, **options}) for label, options in horizons.items()),
        ),
        SEEDS,
        SETTINGS,
        references=("no gate",),
    )


def long_recipes() -> dict[str, PairRecipe]:
    """The far pairs on sums whose worked responses take about 180 tokens."""
    return {f"{name}-long": longer_task(PAIR_RECIPES[name]) for name in ("far", "far-fragile")}


def long_responses(folder: Path) -> Study:
    """Does a horizon that never recovers guide the beginning of a long response only, and does that hurt?"""
    recipes = long_recipes()
    return Study(
        "long",
        "What does a trust horizon do to long responses, with and without recovery?",
        tuple(recipes),
        tuple(
            variant_of(method, annealed(0.02))
            for method in ("tgpo", "tgpo-trust-horizon", "tgpo-recovering-horizon", "tgpo-soft-horizon")
        ),
        SEEDS,
        {**SETTINGS, "max_new_tokens": 240},
        recipes,
        references=("tgpo", "tgpo-trust-horizon"),
    )


# ── Looks into checkpoints ───────────────────────────────────────────────────────────────────────

LOOKED_AT: dict[str, object] = {**SETTINGS, "checkpoint_every": 20, "keep_checkpoints": 0}


def premise(folder: Path) -> Study:
    """Whether the teacher is right at the student's prefixes, depth by depth, and what TGPO makes of it."""
    half = {map_pair(-13.0, 0.5): map_recipes()[map_pair(-13.0, 0.5)]}
    return Study(
        "premise",
        "Is the teacher right where the student goes, and does TGPO's outcome follow from it?",
        ("near", "mid", "far", *half, "far-fragile"),
        (variant_of("tgpo", annealed(0.02)),),
        FEW_SEEDS,
        LOOKED_AT,
        half,
        "premise",
    )


def gradient(folder: Path) -> Study:
    """Strength and noise of the teacher's signal along training, at every divergence, with the robust teacher."""
    recipes = {map_pair(opening, 1.0): map_recipes()[map_pair(opening, 1.0)] for opening in OPENINGS}
    return Study(
        "gradient",
        "How strong and how noisy is the teacher's signal, and where does it point?",
        tuple(recipes),
        (variant_of("rkl"), variant_of("exact-rkl"), variant_of("tgpo", annealed(0.02))),
        (0, 1, 2),
        LOOKED_AT,
        recipes,
        "gradient",
    )


def known_recipes() -> dict[str, PairRecipe]:
    """Recipes of all pairs that studies are about, by the pair's name."""
    return {**PAIR_RECIPES, **UNSHIPPED_RECIPES, **map_recipes(), **rival_recipes(), **long_recipes()}


STUDIES: dict[str, Callable[[Path], Study]] = {
    "tuning": tuning,
    "headline": headline,
    "tuning-larger": tuning_larger,
    "headline-larger": headline_larger,
    "tuning-larger-longer": tuning_larger_longer,
    "headline-larger-longer": headline_larger_longer,
    "map": divergence_map,
    "rivals": rivals,
    "longer": longer,
    "conditioning": conditioning,
    "schedule": schedule,
    "horizon": horizon,
    "long": long_responses,
    "premise": premise,
    "gradient": gradient,
}


def make_study(name: str, folder: Path = RESULTS) -> Study:
    """A study by name.

    Args:
        name: one of :data:`STUDIES`.
        folder: where results are stored: several studies take their configurations from the tuning there.

    Raises:
        InputError: unknown name, or a study that needs another one's results first.
    """
    if name not in STUDIES:
        raise InputError(f"Unknown study {name!r}: choose one of {', '.join(STUDIES)}.")
    return STUDIES[name](folder)
