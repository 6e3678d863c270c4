"""Numbers that compare runs: the step at which a level is reached, the summary, its text."""

import math
from pathlib import Path

import pandas as pd
import pytest

from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.metrics import metrics_frame, steps_to
from tgpo_lab.reports.comparison import caption, format_table, percent, summary_table, table_texts
from tgpo_lab.runs import RunResult

NAN = math.nan


def accuracies(*values: float, every: int = 1) -> pd.DataFrame:
    return pd.DataFrame({"step": [every * i for i in range(len(values))], "accuracy": values})


def run_with(rows: list[dict[str, float]]) -> RunResult:
    """A run of which only the metrics matter."""
    return RunResult(Path("nowhere"), TrainConfig(steps=30), metrics_frame(rows), student=None, completed=True)


FAST = run_with(
    [
        {"step": 0, "accuracy": 0.1, "reverse_kl": 3.0, "length": 5.0, "gradient_norm": 0.5},
        {"step": 10, "accuracy": 0.6, "reverse_kl": 2.0, "length": 20.0, "gradient_norm": 12.345},
        {"step": 20, "reverse_kl": 1.25, "length": 48.26, "gradient_norm": 0.25},
        {"step": 30, "accuracy": 0.9},
    ]
)
SLOW = run_with([{"step": 0, "accuracy": 0.1, "reverse_kl": 4.0, "length": 6.0, "gradient_norm": 0.0}])
EMPTY = run_with([])


@pytest.mark.parametrize(
    ("metrics", "level", "expected"),
    [
        (accuracies(0.0, 0.4, 0.5, 0.9), 0.5, 2),  # reaching is enough, exceeding not needed
        (accuracies(0.0, 0.4, 0.4999), 0.5, None),
        (accuracies(0.7, 0.1), 0.5, 0),  # before any update; what comes later does not matter
        (accuracies(0.1, 0.8, 0.2, 0.9, every=5), 0.5, 5),  # the first time, even if it falls again
        (accuracies(NAN, NAN, 0.6, NAN), 0.5, 2),
        (accuracies(NAN, NAN), 0.0, None),
        (accuracies(), 0.5, None),
        (accuracies(0.0), 0.0, 0),
        (accuracies(0.5, 1.0), 1.0, 1),
        (accuracies(0.1, 0.8, 0.9).iloc[::-1], 0.5, 1),  # in whatever order the rows stand
    ],
)
def test_steps_to_is_the_first_measured_step_at_or_above_the_level(metrics, level, expected):
    found = steps_to(metrics, level)
    assert found == expected
    assert found is None or type(found) is int


@pytest.mark.parametrize("level", [-0.1, 1.01, 50, NAN])
def test_a_level_that_is_no_accuracy_is_refused(level):
    with pytest.raises(InputError, match="from 0 to 1"):
        steps_to(accuracies(0.5), level)


def test_summary_takes_the_last_measured_value_and_the_largest_norm():
    table = summary_table({"fast": FAST, "slow": SLOW})
    assert list(table.index) == ["fast", "slow"]
    assert list(table.columns) == [
        "accuracy before", "accuracy after", "steps to 50 %", "steps to 80 %",
        "reverse KL to the teacher", "mean length at the end", "largest gradient norm",
    ]  # fmt: skip
    assert table.loc["fast"].tolist() == [0.1, 0.9, 10, 30, 1.25, 48.26, 12.345]
    assert table.loc["slow"].tolist()[:2] == [0.1, 0.1]
    assert table.loc["slow"].isna().tolist() == [False, False, True, True, False, False, False]
    assert table["steps to 50 %"].dtype == "Int64"


def test_accuracies_given_replace_those_of_the_run_and_the_caption_says_which_they_are():
    own = summary_table({"fast": FAST})
    given = summary_table({"fast": FAST}, {"fast": 0.25}, {"fast": 0.75})
    assert given.loc["fast"].tolist()[:2] == [0.25, 0.75]
    assert given["steps to 50 %"].tolist() == own["steps to 50 %"].tolist()
    assert "share of test prompts" in caption(given)
    assert "share of held-out prompts of the run" in caption(own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one run"),
        (({"fast": FAST}, {"fast": 0.1}), "or neither"),
        (({"fast": FAST}, None, {"fast": 0.1}), "or neither"),
        (({"fast": FAST}, {"fast": 0.1}, {"other": 0.1}), "no accuracy for 'fast': those given are for other"),
    ],
)
def test_a_summary_of_nothing_or_with_half_the_accuracies_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        summary_table(*arguments)


def test_texts_say_never_and_leave_out_what_was_not_measured():
    texts = table_texts(summary_table({"fast": FAST, "slow": SLOW, "empty": EMPTY}))
    assert texts.loc["fast"].tolist() == ["10.0 %", "90.0 %", "10", "30", "1.25", "48.3", "12.3"]
    assert texts.loc["slow"].tolist() == ["10.0 %", "10.0 %", "never", "never", "4", "6.0", "0"]
    assert texts.loc["empty"].tolist() == ["–", "–", "never", "never", "–", "–", "–"]
    assert percent(1) == "100.0 %"


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_shows_every_heading_and_cell_whole(width):
    table = summary_table({"tgpo": FAST, "[grpo] :smile:": SLOW})
    text = format_table(table, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    words = set(text.split())
    for heading in [*table.columns, "(nats)", "(tokens)"]:
        assert set(heading.split()) <= words
    assert {"tgpo", "[grpo]", ":smile:"} <= words  # labels are not markup
    line = next(line for line in text.splitlines() if "tgpo" in line)
    assert line.split() == ["tgpo", "10.0", "%", "90.0", "%", "10", "30", "1.25", "48.3", "12.3"]
