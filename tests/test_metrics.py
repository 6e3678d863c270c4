"""The metrics table, its page, and the file that a run writes."""

import json
import math

import pytest

from tgpo_lab.errors import InputError
from tgpo_lab.metrics import METRICS, MetricsLog, metrics_frame, metrics_markdown, read_rows
from tgpo_lab.models.pairs import DATA


def test_the_page_is_the_table():
    page = DATA.parent / "docs" / "metrics.md"
    assert page.read_text() == metrics_markdown(), "run: python -m tgpo_lab.metrics > docs/metrics.md"


def test_every_metric_says_what_it_is():
    assert all(metric.definition.endswith(".") for metric in METRICS.values())


def test_a_run_is_rewound_to_a_step_and_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.append({"step": step, "reward": step / 10})
    with log.path.open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    again = MetricsLog(log.path)
    again.rewind(3)
    again.append({"step": 3, "reward": 0.9})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 3]
    assert again.rows[-1]["reward"] == 0.9


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_rows(file)


def test_the_frame_has_all_columns_and_nan_where_a_step_has_no_value():
    frame = metrics_frame([{"step": 0, "reward": 0.5}, {"step": 1, "accuracy": 1.0}])
    assert list(frame.columns) == ["step", *METRICS]
    assert frame["reward"][0] == 0.5
    assert math.isnan(frame["reward"][1])
