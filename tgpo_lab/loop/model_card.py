"""The model card of a checkpoint: what was trained on what, and the run's numbers."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import TrainConfig
from ..methods import method_entries, method_name
from ..models.lora import CONFIGURATION
from ..provenance import provenance

SHOWN = ("reward", "accuracy", "length", "truncated", "reverse_kl", "forward_kl", "agreement", "rejected", "entropy")
"""Metrics in the card's table, first and last measured value of each."""


def model_card(config: TrainConfig, rows: list[dict[str, float]], step: int) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Args:
        config: the run.
        rows: rows of its ``metrics.jsonl`` so far.
        step: batches that the checkpoint has learned from.
    """
    method = method_name(config.method)
    summary = next((entry.summary for entry in method_entries() if entry.name == method), "")
    metadata = {
        # A path of this machine means nothing elsewhere.
        "base_model": None if _is_local(config.student) else config.student,
        "datasets": None if config.dataset is None or _is_local(config.dataset) else [config.dataset],
        "library_name": "peft" if config.lora_rank and not config.lora_merged else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tgpo-lab", "on-policy-distillation", method],
    }
    teacher = _shown(config.teacher) if config.teacher else "of the same pair"
    prompts = _shown(config.dataset) if config.dataset else "of the pair"
    settings = {name: value for name, value in config.as_dict().items() if name != "output"}
    made = provenance()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items() if value),  # JSON is YAML
        "---",
        "",
        f"# {_shown(config.student)} trained with {method}",
        "",
        f"Student {_shown(config.student)}, teacher {teacher}, prompts {prompts}. {summary}",
        "",
        f"After {step} of {config.steps} steps of {config.prompts_per_step} prompts × {config.group_size} samples.",
        "",
        *_table(rows),
        "",
        *_positions(config),
        "## Settings",
        "",
        "```",
        *(f"{name}: {_setting(value)}" for name, value in settings.items()),
        "```",
        "",
        f"Made by `{made['command']}` with {versions} on {made['device']}.",
    ]
    return "\n".join(lines) + "\n"


def _positions(config: TrainConfig) -> list[str]:
    if not config.lora_rank or config.lora_merged or not any(config.position_options.values()):
        return []
    return [
        "The base's positions were changed for the training. Load these adapters with that configuration: "
        f'`from_pretrained(folder, config=AutoConfig.from_pretrained(folder + "/{CONFIGURATION}"))`.',
        "",
    ]


def _table(rows: list[dict[str, float]]) -> list[str]:
    measured = {name: [(row["step"], row[name]) for row in rows if name in row] for name in SHOWN}
    lines = ["| Metric | First | Last |", "|---|---|---|"]
    for name, values in measured.items():
        if values:
            first, last = (f"{value:.4g} (step {step})" for step, value in (values[0], values[-1]))
            lines.append(f"| {name} | {first} | {last} |")
    return lines if len(lines) > 2 else ["Nothing was measured yet."]


def _is_local(name: str) -> bool:
    # The name of a shipped pair is no name on the hub either.
    return "/" not in name or name.startswith((".", "/")) or Path(name).exists()


def _shown(name: str) -> str:
    return Path(name).name if _is_local(name) else name


def _setting(value: object) -> object:
    return _shown(value) if isinstance(value, str) and Path(value).is_absolute() else value
