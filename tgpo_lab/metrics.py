# ruff: noqa: E501 (the table of metrics reads better with one metric a line)
"""The measurements of a run: what each one is, what healthy looks like, and the file they go to.

A row describes the student AFTER ``step`` batches, on the rollouts that it then sampled; the last
row has the final held-out accuracy alone. ``docs/metrics.md`` is printed from the table here:

    python -m tgpo_lab.metrics > docs/metrics.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .errors import InputError
from .files import write_text


@dataclass(frozen=True)
class Metric:
    """Definition of one column."""

    unit: str
    definition: str
    healthy: str


METRICS: dict[str, Metric] = {
    "reward": Metric("0 to 1", "Mean verifiable reward of the student's sampled responses.", "Rises."),
    "accuracy": Metric(
        "0 to 1", "Share of held-out prompts answered rightly, every `evaluate_every` steps: by greedy decoding, or sampled at `evaluation_temperature`.",
        "Rises with the reward; a reward that rises alone is memorised or hacked.",
    ),
    "length": Metric("tokens", "Mean length of the sampled responses.", "Moves towards the teacher's length and stays."),
    "truncated": Metric("0 to 1", "Share of responses cut at the token limit.", "Near 0. A climb to 1 is the length explosion."),
    "entropy": Metric("nats", "Mean entropy of the student at the measured positions.", "Falls slowly; a jump upwards comes before collapse."),
    "teacher_entropy": Metric("nats", "Mean entropy of the teacher at the same positions.", "Low: the teacher knows what it would write there."),
    "kl_sampled": Metric("nats", "Mean of d_t = log πθ(y_t) − log πT(y_t) over the sampled tokens (k1).", "Falls towards 0; agrees with `reverse_kl` up to sampling noise."),
    "reverse_kl": Metric("nats", "Mean KL(πθ‖πT) over the vocabulary at the measured positions.", "Falls."),
    "forward_kl": Metric("nats", "Mean KL(πT‖πθ) at the measured positions.", "Falls; stays high where the student gives the teacher's token no mass."),
    "agreement": Metric("0 to 1", "Share of measured positions at which both have the same most probable token.", "Rises towards 1."),
    "rejected": Metric("0 to 1", "Share of sampled tokens with d_t above `rejection_threshold`: the student wrote what the teacher would not.", "Falls."),
    "positive_signal": Metric("0 to 1", "Share of sampled tokens that the teacher finds more probable than the student does.", "About one half once both agree; near 0 the teacher only says no."),
    "clip_fraction": Metric("0 to 1", "Share of tokens whose ratio πθ/π_old left the clip range in the last update of the batch.", "0 with one update a batch; below 0.2 otherwise."),
    "engine_difference": Metric("nats", "Mean of |log π_old(y_t) − log π_engine(y_t)|: π_old as the update computes it, π_engine as it was sampled from.", "Rounding: about 2e-7 in float32 (far) and 1e-4 to 2e-3 in bfloat16 (near, mid, far), over two steps of the preset `tiny` on a CPU. A jump means that the engine has other weights."),
    "engine_difference_largest": Metric("nats", "The largest of these differences.", "In the same steps 15 to 18 times the mean in float32, and 35 to 390 times in bfloat16, most where the mean is least (near). At log 2 = 0.69 an importance weight is 2 or ½."),
    "engine_kl": Metric("nats", "Estimate of KL(π_engine‖π_old) from the sampled tokens: mean of e^δ − 1 − δ with δ = log π_old(y_t) − log π_engine(y_t) (k3).", "About half the mean squared difference. Steady."),
    "importance_truncated": Metric("0 to 1", "Share of tokens whose importance weight was cut to `importance_cap`.", "0 or near it: what is cut is biased."),
    "weight": Metric("", "Weight of the teacher term at this step.", "Follows the schedule."),
    "guided": Metric("0 to 1", "Mean weight of TGPO's guidance over the student's tokens: the share of them that its gate lets through (a soft gate in parts).", "1 without a gate. Within a trust horizon it rises as the student's prefixes become believable to the teacher."),
    "loss_reward": Metric("", "Value of the reward term (a surrogate: its size means nothing, its gradient does).", "No trend to expect."),
    "loss_teacher": Metric("nats", "Value of the teacher term before its weight.", "Falls."),
    "gradient_norm": Metric("", "Norm of the gradient before it is clipped.", "Steady; spikes by a factor of ten are the warning."),
    "gradient_norm_reward": Metric("", "Norm of the reward term's own gradient (every `gradient_terms_every` steps).", "Of the order of the teacher term's while both matter."),
    "gradient_norm_teacher": Metric("", "Norm of the teacher term's own gradient, with its weight.", "Falls as both agree or the weight is annealed."),
    "gradient_cosine": Metric("−1 to 1", "Cosine between the reward term's and the teacher term's gradient.", "Above 0: the teacher points where the reward does."),
    "learning_rate": Metric("", "Learning rate of this step.", "Follows the configuration."),
    "tokens": Metric("tokens", "Response tokens that the student sampled.", "Rows times length."),
    "teacher_trace_tokens": Metric("tokens", "Response tokens that the teacher wrote for methods that learn from its own responses.", "0 for the others."),
    "teacher_tokens": Metric("tokens", "Prompt and response tokens that the teacher read to answer, padding not counted. A server is sent as many, and more where a request is repeated.", "Rows times prompt and length."),
    "seconds_sample": Metric("s", "Time for sampling, the teacher's own responses included.", "The largest part on real models."),
    "seconds_traces": Metric("s", "The part of it for the teacher's own responses, written or read from the cache.", "0 for methods that do not learn from them."),
    "seconds_reward": Metric("s", "Time for decoding and judging.", "Small."),
    "seconds_teacher": Metric("s", "Time for the teacher's answers: its forward pass, or the server's. With `exact-rkl`, `gkd`, `forward-kl` and one update a batch, its output layer counts in the update, which needs it.", "Below the update's; of a server, it falls with more requests at once."),
    "seconds_update": Metric("s", "Time for the student's forward and backward passes and the optimiser.", ""),
    "seconds_measure": Metric("s", "Time for held-out accuracy and whole-distribution measurements.", ""),
    "seconds_save": Metric("s", "Time for the previous step's checkpoint.", ""),
}  # fmt: skip


class MetricsLog:
    """Metrics as JSON lines: one row a step, appended and flushed at once. Without ``writes`` the file is only read."""

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self._writes = path, writes
        self.rows: list[dict[str, float]] = []

    def append(self, row: dict[str, float]) -> None:
        """Add a row."""
        self.rows.append(row)
        if not self._writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Forget the rows of ``step`` and later ones, as a resumed run makes them again."""
        self.rows = [row for row in read_rows(self.path) if row["step"] < step]
        if self._writes:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file; a last line that was cut short by a kill is left out.

    Raises:
        InputError: a broken line that is not the last.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise TypeError("no JSON object with a step")
            rows.append(row)
        except (ValueError, TypeError) as error:
            if number < len(lines) or isinstance(error, TypeError):  # a line cut short is no JSON at all
                raise InputError(
                    f"{path}, line {number} is broken ({error}). Restore the file or remove the line."
                ) from error
    return rows


def metrics_frame(rows: list[dict[str, float]]) -> pd.DataFrame:
    """Rows as a DataFrame: ``step`` and the columns of :data:`METRICS`, NaN where a step has no value."""
    return pd.DataFrame(rows, columns=["step", *METRICS]).astype({"step": int}).astype(dict.fromkeys(METRICS, float))


def metrics_markdown() -> str:
    """The table of all metrics as a page."""
    lines = [
        "# Metrics of a run",
        "",
        "`metrics.jsonl` has one row a step, `RunResult.metrics` is the same as a DataFrame. A row describes the student",
        "after `step` batches, on the rollouts that it then sampled; the last row has the final held-out accuracy alone.",
        "All methods fill the same columns. A value is missing where a step or a method has none. πθ is the student,",
        "πT the teacher, y_t the sampled token, d_t = log πθ(y_t) − log πT(y_t). Divergences are per token.",
        "",
        "| Column | Unit | What it is | What healthy looks like |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{name}` | {m.unit} | {m.definition} | {m.healthy} |" for name, m in METRICS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_markdown(), end="")


def steps_to(metrics: pd.DataFrame, level: float) -> int | None:
    """First step at which the measured held-out accuracy is at least ``level``; None if it never was.

    Accuracy is measured every ``evaluate_every`` steps, so the level may have been passed up to so
    many steps earlier.

    Args:
        metrics: of a run, with the columns ``step`` and ``accuracy`` (NaN where not measured).
        level: accuracy, from 0 to 1.

    Raises:
        InputError: the level is outside 0 to 1.
    """
    if not 0 <= level <= 1:
        raise InputError(f"level must be an accuracy from 0 to 1, but is {level}.")
    reached = metrics.loc[metrics["accuracy"] >= level, "step"]  # NaN compares as False
    return None if reached.empty else int(reached.min())
