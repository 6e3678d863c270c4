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
from ..models.pairs import DATA, shipped_pairs
from ..tiny_world.recipes import PairRecipe

LOOP_VERSION = 1
"""To be raised when a change of the package changes the numbers of a run: stored runs then count no longer."""
DIALS = ("opening_logprob", "reverse_kl", "forward_kl", "rejected", "agreement", "reliability")
"""Figures of a pair's card that stand beside each of its runs."""


# Fields of TrainConfig that are younger than the first results. At their defaults they are left out of a run's
# fingerprint: then they change nothing, and the results stay those of the same runs.
ADDED_LATER = (
    "answer_after", "chat_template", "chat_template_options", "compile_decoding", "dataset_config", "engine",
    "fused_kernels", "importance_cap",
    "lora_alpha", "lora_merged", "lora_rank", "prompt_template", "sampling_rows", "student_positions",
    "student_rope_theta", "system_prompt", "teacher_cache", "teacher_device",
    "teacher_offload", "teacher_server", "teacher_server_model", "teacher_server_requests", "teacher_server_retries",
    "teacher_server_timeout", "trackers", "train_split", "validation_split", "vllm_memory_share", "vllm_sleep",
)  # fmt: skip


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
    recipe: str = ""
    """Digest of the recipe that the pair was built from."""

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
        """Digest of everything that decides the run's numbers: configuration, look, the pair's recipe, the version
        of the loop. (The same recipe gives other weights on another kind of processor: see ``pair_digest``.)"""
        config = self._config(student=self.pair, output="any")
        unchanged = {name for name in ADDED_LATER if getattr(config, name) == getattr(TrainConfig(), name)}
        values = {name: value for name, value in config.as_dict().items() if name not in unchanged}
        return digest([values, self.look, self.recipe, LOOP_VERSION])

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
    references: tuple[str, ...] = ("tgpo",)
    """Labels that all others are compared with."""
    choices: Mapping[str, Mapping[str, Variant]] = field(default_factory=dict)
    """Pair → label → the variant to take for it there, where a label's options were chosen pair by pair."""

    def cells(self) -> list[Cell]:
        """All runs, seeds outermost: a study that is stopped has whole rounds behind it."""
        recipes = {pair: self._recipe_digest(pair) for pair in self.pairs}
        return [
            Cell(
                pair,
                self.choices.get(pair, {}).get(variant.label, variant),
                seed,
                self.settings,
                self.look,
                recipes[pair],
            )
            for seed in self.seeds
            for pair in self.pairs
            for variant in self.variants
        ]

    def _recipe_digest(self, pair: str) -> str:
        if pair in self.recipes:
            return digest(self.recipes[pair].as_dict())
        file = DATA / "pairs" / pair / "pair.json"
        return digest(json.loads(file.read_text())["recipe"]) if file.exists() else ""


def digest(values: object) -> str:
    """Sixteen hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


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


def pair_digest(name: str, pairs_folder: Path) -> str:
    """Digest of the weights and prompts of a pair, to tell whether two runs started from the same models."""
    entry = json.loads((_root(name, pairs_folder) / "pairs" / name / "pair.json").read_text())
    total = hashlib.sha256()
    for place, pattern in (("student", "*.safetensors"), ("teacher", "*.safetensors"), ("prompts", "*.jsonl")):
        for file in sorted((_root(name, pairs_folder) / entry[place]).glob(pattern)):
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _root(name: str, pairs_folder: Path) -> Path:
    return DATA if name in shipped_pairs() else pairs_folder


def measured_dials(name: str, pairs_folder: Path) -> dict[str, float]:
    """Divergence and reliability of a pair as its card has them; nothing for a pair without a card."""
    file = _root(name, pairs_folder) / "pairs" / name / "card.json"
    if not file.exists():
        return {}
    card = json.loads(file.read_text())
    return {dial: card[dial] for dial in DIALS}
