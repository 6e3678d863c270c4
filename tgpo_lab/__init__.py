"""On-policy distillation of language models: learn it, see it, use it.

    import tgpo_lab

    pair = tgpo_lab.load_pair("far")
    result = tgpo_lab.train(tgpo_lab.TrainConfig.preset("tiny", "tgpo", student="far", output="runs/tgpo"))
    print(tgpo_lab.evaluate(pair, result.student).accuracy)

The letters of tensor shapes are explained once, in :mod:`tgpo_lab.losses`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig
    from .diagnostics.pair_card import measure_pair
    from .doctor.diagnose import diagnose
    from .errors import InputError
    from .evaluation import evaluate
    from .methods import make_method
    from .models.pairs import Pair, load_pair, shipped_pairs
    from .runs import RunResult, load_run
    from .training import train

__version__ = "0.1.0"

# Imported on first use: the command line answers --help without waiting for torch and transformers.
_HOMES = {
    "InputError": "errors",
    "Pair": "models.pairs",
    "RunResult": "runs",
    "TrainConfig": "config",
    "diagnose": "doctor.diagnose",
    "evaluate": "evaluation",
    "load_pair": "models.pairs",
    "load_run": "runs",
    "make_method": "methods",
    "measure_pair": "diagnostics.pair_card",
    "shipped_pairs": "models.pairs",
    "train": "training",
}
_MODULES = {"losses", "plots", "schedules", "methods", "metrics"}

__all__ = [
    "InputError",
    "Pair",
    "RunResult",
    "TrainConfig",
    "diagnose",
    "evaluate",
    "load_pair",
    "load_run",
    "make_method",
    "measure_pair",
    "shipped_pairs",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
