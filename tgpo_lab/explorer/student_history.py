"""The student at every step of a run that was kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoints import checkpoint_folders, read_state
from ..config import TrainConfig
from ..errors import InputError
from ..methods import TGPO, make_method, method_name
from ..metrics import metrics_frame, read_rows
from ..models.pairs import Pair, load_model
from ..runs import CHECKPOINTS, METRICS_FILE, latest_checkpoint, read_config


@dataclass
class StudentHistory:
    """Students of one run by step, or the pair's own student alone (as step 0)."""

    label: str
    checkpoints: dict[int, Path | None]
    """Step → checkpoint, oldest first; None is the pair's own student."""
    config: TrainConfig | None
    weights: dict[int, float]
    """Step → weight of the teacher term, as far as the run has logged it."""
    _loaded: tuple[int, PreTrainedModel] | None = None

    @classmethod
    def of_pair(cls, pair: Pair) -> StudentHistory:
        """The student that the pair brings."""
        return cls(pair.name, {0: None}, None, {})

    @classmethod
    def of_run(cls, directory: str | Path, label: str | None = None) -> StudentHistory:
        """The kept checkpoints of a run.

        A run keeps few by default: train it with ``checkpoint_every=5, keep_checkpoints=0`` for one every five steps.

        Raises:
            InputError: no run there, no whole checkpoint, or a damaged one.
        """
        directory = Path(directory)
        config = read_config(directory)
        latest_checkpoint(directory)
        folders = checkpoint_folders(directory / CHECKPOINTS)
        metrics = metrics_frame(read_rows(directory / METRICS_FILE)).dropna(subset=["weight"])
        weights = dict(zip(metrics["step"].tolist(), metrics["weight"].tolist(), strict=True))
        return cls(label or method_name(config.method), {read_state(f).step: f for f in folders}, config, weights)

    @property
    def steps(self) -> list[int]:
        """Steps whose student was kept, in order."""
        return sorted(self.checkpoints)

    def nearest(self, step: int) -> int:
        """The last kept step that is not after ``step``, or the first."""
        return max((kept for kept in self.steps if kept <= step), default=self.steps[0])

    def student(self, pair: Pair, step: int) -> PreTrainedModel:
        """The student of a kept step, on the teacher's device. The one asked for last stays loaded.

        Raises:
            InputError: that step was not kept, a damaged checkpoint, or another vocabulary than the pair's.
        """
        if step not in self.checkpoints:
            kept = ", ".join(map(str, self.steps))
            raise InputError(
                f"{self.label} has no student of step {step}: kept are {kept}. Train with a smaller checkpoint_every "
                "and keep_checkpoints=0 to keep more."
            )
        folder = self.checkpoints[step]
        if folder is None:
            return pair.student
        if self._loaded is None or self._loaded[0] != step:
            read_state(folder)
            self._loaded = None  # not two students in memory at once
            model = load_model(folder, torch.float32, pair.teacher.device)
            rows = model.get_output_embeddings().weight.shape[0]
            if rows < pair.vocabulary_size:
                raise InputError(
                    f"The student in {folder} has {rows} vocabulary rows, but the pair {pair.name} has "
                    f"{pair.vocabulary_size} tokens. Load the pair that the run was made with."
                )
            self._loaded = step, model
        return self._loaded[1]

    def guidance(self, step: int) -> tuple[TGPO, float]:
        """TGPO with the run's gate, and its weight w at ``step``; of another method's run, the tiny world's at step 0.

        After the last logged step the weight is that of this step.
        """
        if self.config is None or not isinstance(self.config.method, TGPO):
            method = make_method("tgpo", tiny=True)
            return method, method.weight(0)
        logged = [weight for at, weight in sorted(self.weights.items()) if at <= step]
        return self.config.method, logged[-1] if logged else self.config.method.weight(0)
