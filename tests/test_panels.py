"""The three small panels: their numbers, and what moving a control does."""

import math
import re
from xml.etree import ElementTree

import pandas as pd
import pytest

from tgpo_lab.errors import InputError
from tgpo_lab.explorer.logit_updates import UPDATE_METHODS
from tgpo_lab.methods import make_method
from tgpo_lab.schedules import LinearDecay, UntilAgreement
from tgpo_lab.training import train
from tgpo_lab.widgets import kl_panel, schedule_panel, softmax_panel
from tgpo_lab.widgets.kl_panel import two_kls
from tgpo_lab.widgets.panel import INK
from tgpo_lab.widgets.schedule_panel import schedule_table
from tgpo_lab.widgets.softmax_panel import SHARES, TEACHER_SURE, softmax_updates


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    method = make_method("tgpo", weight=LinearDecay(0.5, 0.1))
    return train(tiny_config(tmp_path_factory.mktemp("panels"), method=method), show_progress=False)


def test_two_kls_by_hand():
    reverse, forward, table = two_kls([3, 1], [1, 1])
    assert reverse == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert forward == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2))
    assert table["student"].tolist() == [0.75, 0.25] and table["teacher"].tolist() == [0.5, 0.5]
    assert table["reverse_kl"].sum() == pytest.approx(reverse) and table["forward_kl"].sum() == pytest.approx(forward)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1], [1], "two or more"),
        ([1, 1], [1, 1, 1], "2 and 3"),
        ([1, 0], [1, 1], "above 0"),
        ([1, math.nan], [1, 1], "nan"),
    ],
)
def test_distributions_that_have_no_divergence_are_refused(student, teacher, message):
    with pytest.raises(InputError, match=message):
        two_kls(student, teacher)
    with pytest.raises(InputError, match=message):
        kl_panel(student, teacher)


def test_dragging_a_weight_changes_table_sentence_and_figure():
    panel = kl_panel([0.5, 0.5], [0.5, 0.5])
    before = panel.picture.value
    assert "0.000 nats" in panel.said.value
    panel.children[0].children[0].value = 0.125
    reverse, forward, table = two_kls([panel.children[0].children[0].value, 0.5], [0.5, 0.5])
    pd.testing.assert_frame_equal(panel.table, table)
    assert f"{reverse:.3f}" in panel.said.value and f"{forward:.3f}" in panel.said.value
    assert panel.picture.value != before


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_one_softmax_position_by_formula(temperature):
    table = softmax_updates(0.01, temperature=temperature, guidance_weight=0.1, advantage=2.0, written=1)
    at_one = [0.01, *(0.99 * share for share in SHARES)]
    warmed = [p ** (1 / temperature) for p in at_one]
    p = [x / sum(warmed) for x in warmed]
    q = [TEACHER_SURE, *[(1 - TEACHER_SURE) / 4] * 4]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert table["student"].tolist() == pytest.approx(p) and table["teacher"].tolist() == pytest.approx(q)
    assert table["rkl"].tolist() == pytest.approx([math.log(q[1] / p[1]) * ((v == 1) - p[v]) for v in range(5)])
    assert table["exact-rkl"].tolist() == pytest.approx([-p[v] * (math.log(p[v] / q[v]) - kl) for v in range(5)])
    assert table["grpo"].tolist() == pytest.approx([2 * ((v == 1) - p[v]) for v in range(5)])
    assert table["tgpo"].tolist() == pytest.approx([2 * ((v == 1) - p[v]) + 0.1 * ((v == 0) - p[v]) for v in range(5)])


def test_guidance_stays_where_reverse_kl_vanishes():
    """What the panel is there to show: at 1e−6 exact RKL hardly lifts the teacher's token, guidance by w."""
    table = softmax_updates(1e-6, guidance_weight=0.02)
    assert 0 < table["exact-rkl"].iloc[0] < 2e-5 and table["tgpo"].iloc[0] == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((0.0,), {}), ((1.0,), {}), ((0.5,), {"temperature": 0}), ((0.5,), {"guidance_weight": -1}),
     ((0.5,), {"advantage": math.inf}), ((0.5,), {"written": 5})],
)  # fmt: skip
def test_positions_that_cannot_be_are_refused(arguments, options):
    with pytest.raises(InputError):
        softmax_updates(*arguments, **options)


def test_the_softmax_panel_follows_its_sliders():
    panel = softmax_panel()
    probability, temperature, weight, advantage, written = panel.children[0].children
    probability.value, temperature.value, weight.value, advantage.value, written.value = 1e-4, 2.0, 0.5, 1.0, 0
    expected = softmax_updates(1e-4, temperature=2.0, guidance_weight=0.5, advantage=1.0, written=0)
    pd.testing.assert_frame_equal(panel.table, expected)
    assert all(name in panel.table for name in UPDATE_METHODS)


def test_the_schedule_beside_reward_and_agreement(run):
    table = schedule_table(run)
    assert table["step"].tolist() == [0, 1, 2] and table["weight"].tolist() == pytest.approx([0.5, 0.4, 0.3])
    logged = run.metrics.dropna(subset=["reward"])
    for column in ("reward", "agreement"):
        assert table[column].tolist() == logged[column].tolist()
    pd.testing.assert_frame_equal(table, schedule_table(run.directory))


def test_another_schedule_sees_the_agreement_of_the_run(run):
    agreement = run.metrics["agreement"].iloc[0]
    schedule = UntilAgreement(1.0, agreement=agreement, patience=1, ramp=2)
    table = schedule_table(run, schedule)
    assert table["other_weight"].tolist() == [1.0, 0.5, 0.0]
    assert schedule.state() == {"streak": 0, "reached_at": None}, "the caller's schedule is left alone"


def test_the_schedule_panel_takes_a_schedule_as_text_and_says_what_is_none(run):
    panel = schedule_panel(run.directory)
    place, other = panel.children[0].children
    assert "weight 0.5" in panel.said.value
    place.value = 2
    assert panel.said.value.startswith("step 2: weight 0.3")
    other.value = "Constant(0.25)"
    assert panel.table["other_weight"].tolist() == [0.25] * 3
    other.value = "<b>__import__('os')</b>"
    assert "is not a schedule" in panel.said.value and "<b>" not in panel.said.value
    assert "other_weight" not in panel.table


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        schedule_panel(tmp_path)


def test_figures_take_the_colours_of_the_page(run):
    """Text and lines have the colour of the text around them, nothing has a ground of its own."""
    for made in (kl_panel, softmax_panel, lambda: schedule_panel(run)):
        panel = made()
        svg = ElementTree.fromstring(panel.picture.value)
        assert svg.tag.endswith("svg") and svg.get("role") == "img" and svg.get("aria-label").startswith(panel._title)
        styles = [element.get("style") or "" for element in svg.iter()]
        colors = {color for style in styles for color in re.findall(r"(?:fill|stroke): (#\w+|\w+)", style)}
        assert "currentColor" in colors and INK not in panel.picture.value
        assert not colors & {"#ffffff", "#000000", "#1a1a1a", "white", "black"}
        assert made().picture.value == panel.picture.value, "the same numbers, another picture"


def test_what_a_panel_says_is_data_in_its_picture(run):
    panel = schedule_panel(run.directory)
    panel.children[0].children[1].value = '"><script>alert(1)</script>'
    svg = ElementTree.fromstring(panel.picture.value)
    assert "<script>" in svg.get("aria-label") and not any(e.tag.endswith("script") for e in svg.iter())


def test_a_panel_without_a_kernel_shows_its_numbers(run):
    for panel in (kl_panel(), softmax_panel(), schedule_panel(run)):
        bundle = panel._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in bundle
        assert bundle["text/html"].count("<tr") == len(panel.table) + (2 if panel.table.index.name else 1)
        assert panel.said.value in bundle["text/html"]
