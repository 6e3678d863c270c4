"""The headline study: all methods near and far, each at the best of four learning rates, tried on other seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..methods import method_entries
from ..schedules import Constant, LinearDecay, Schedule
from .plan import Study, Variant
from .results import load_results
from .settings import SEEDS, SETTINGS, TUNING_SEEDS, ZERO_AT, annealed, variant_of

TUNED_PAIRS = ("near", "far")
# Three were tried first. On far the largest of them, 6e-4, was the best of guidance and of SFT, so there is one above.
RATES = (1e-4, 3e-4, 6e-4, 1.2e-3)


def configurations(method: str) -> list[Variant]:
    """Four learning rates, the same for every method. What weights do is the question of the study *schedule*."""
    return [variant_of(method, _weight(method), rate, f"{method} {rate:g}") for rate in RATES]


def _weight(method: str) -> Schedule | None:
    """A teacher term's weight in a short run: annealed in the first two thirds of it, as in the papers."""
    if method == "tgpo-constant":
        return Constant(0.02)
    if method.startswith("tgpo"):
        return annealed(0.02)
    return LinearDecay(0.05, 0.04 / ZERO_AT, 0.01) if method.startswith("kdrl") else None


def method_names() -> list[str]:
    """All registered methods."""
    return [entry.name for entry in method_entries()]


def tuning(folder: Path) -> Study:
    """The same number of configurations for every method, on seeds that the other studies never use."""
    variants = tuple(variant for method in method_names() for variant in configurations(method))
    return Study(
        "tuning",
        "Which of four learning rates suits each method best on each pair?",
        TUNED_PAIRS,
        variants,
        TUNING_SEEDS,
        SETTINGS,
    )


def chosen_configurations(folder: Path) -> dict[str, dict[str, Variant]]:
    """Pair → method → the configuration with the largest mean area in the stored tuning; ties go to the first.

    Raises:
        InputError: the tuning is not stored, or not complete.
    """
    runs = load_results("tuning", folder).runs.set_index("fingerprint")
    cells = tuning(folder).cells()
    if any(cell.fingerprint not in runs.index for cell in cells):
        raise InputError(f"The tuning in {folder} is not complete. Run it first: tgpo-lab study tuning")
    areas: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        areas.setdefault((cell.pair, cell.variant.label), []).append(float(runs.loc[cell.fingerprint, "area"]))
    mean = {key: sum(values) / len(values) for key, values in areas.items()}
    return {
        pair: {
            method: replace(
                max(configurations(method), key=lambda variant, pair=pair: mean[pair, variant.label]), label=method
            )
            for method in method_names()
        }
        for pair in TUNED_PAIRS
    }


def headline(folder: Path) -> Study:
    """All methods near and far, each with its tuned configuration."""
    return Study(
        "headline",
        "Where does teacher guidance beat reverse KL, and by how much?",
        TUNED_PAIRS,
        tuple(variant_of(method) for method in method_names()),
        SEEDS,
        SETTINGS,
        choices=chosen_configurations(folder),
    )
