"""What a study is made of: cells, each one pair, one variant of a method, one seed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import TrainConfig
from ..errors import InputError
from ..methods import make_method
from ..pairs import DATA, shipped_pairs
from ..tiny_world.recipes import PairRecipe

DIALS = ("opening_logprob", "reverse_kl", "forward_kl", "rejected", "agreement", "reliability")
"""Figures of a pair's card that stand beside each of its runs."""


@dataclass(frozen=True)
class Variant:
    """A method with its options, under the name that tables and figures give it."""

    label: str
    method: str
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of the method that differ from those of the preset ``tiny``."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of :class:`TrainConfig` that differ from the study's."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    pair: str
    variant: Variant
    seed: int
    settings: Mapping[str, object]
    """Fields of :class:`TrainConfig` that all cells of the study share."""
    look: str = ""
    """Name in :data:`tgpo_lab.studies.looks.LOOKS`: what is looked at in each checkpoint; nothing if empty."""

    @property
    def name(self) -> str:
        """Pair, label and seed as a relative path, for instance ``far/tgpo/seed-3``."""
        label = re.sub(r"[^a-z0-9.+=]+", "-", self.variant.label.lower()).strip("-")
        return f"{self.pair}/{label}/seed-{self.seed}"

    def config(self, output: Path, pairs_folder: Path) -> TrainConfig:
        """Configuration of the run.

        Raises:
            InputError: the pair is neither shipped nor built, or an option cannot be.
        """
        return self._config(output=str(output), **pair_paths(self.pair, pairs_folder))

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the run's numbers but the pair's weights."""
        values = json.dumps([self._config(student=self.pair, output="any").as_dict(), self.look], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]

    def _config(self, **places: str) -> TrainConfig:
        method = make_method(self.variant.method, tiny=True, **self.variant.options)
        changes = {"seed": self.seed, **self.settings, **self.variant.settings, **places}
        return TrainConfig.preset("tiny", **changes).with_changes(method=method)


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    pairs: tuple[str, ...]
    """Shipped pairs, or those of ``recipes``."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, object]
    recipes: Mapping[str, PairRecipe] = field(default_factory=dict)
    """Pairs that are built before the first run."""
    look: str = ""
    """See :class:`Cell`."""
    choices: Mapping[str, Mapping[str, Variant]] = field(default_factory=dict)
    """Pair → label → the variant to take for it there, where a label's options were chosen pair by pair."""

    def cells(self) -> list[Cell]:
        """All runs, seeds outermost: a study that is stopped has whole rounds behind it."""
        return [
            Cell(pair, self.choices.get(pair, {}).get(variant.label, variant), seed, self.settings, self.look)
            for seed in self.seeds
            for pair in self.pairs
            for variant in self.variants
        ]


def pair_paths(name: str, pairs_folder: Path) -> dict[str, str]:
    """The fields ``student``, ``teacher`` and ``dataset`` of a configuration for a pair.

    Raises:
        InputError: neither a shipped pair nor one built in ``pairs_folder``.
    """
    if name in shipped_pairs():
        return {"student": name}
    try:
        entry = json.loads((pairs_folder / "pairs" / name / "pair.json").read_text())
        return {field: str(pairs_folder / entry[key]) for field, key in
                (("student", "student"), ("teacher", "teacher"), ("dataset", "prompts"))}  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The pair {name!r} is neither shipped nor built in {pairs_folder} ({error}). Give its folder."
        ) from error


def measured_dials(name: str, pairs_folder: Path) -> dict[str, float]:
    """Divergence and reliability of a pair as its card has them; nothing for a pair without a card."""
    file = (DATA if name in shipped_pairs() else pairs_folder) / "pairs" / name / "card.json"
    if not file.exists():
        return {}
    card = json.loads(file.read_text())
    return {dial: card[dial] for dial in DIALS}
