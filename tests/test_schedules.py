"""Schedules of a weight over steps, and how they are written and read."""

import json

import pytest

from tgpo_lab.errors import InputError
from tgpo_lab.schedules import SCHEDULES, Constant, LinearDecay, Trapezoid, UntilAgreement, parse_schedule


def observed(schedule: UntilAgreement, agreements: list[float], start: int = 0) -> UntilAgreement:
    for step, agreement in enumerate(agreements, start):
        schedule.observe(step, agreement)
    return schedule


@pytest.mark.parametrize("step, weight", [(0, 0.002), (1, 0.00199), (100, 0.001), (199, 1e-5), (200, 0.0), (201, 0.0)])
def test_the_papers_decay_is_exact_and_exactly_zero_from_step_200(step, weight):
    assert LinearDecay(2e-3, 1e-5)(step) == weight


def test_linear_decay_stops_at_its_floor():
    kdrl = LinearDecay(5e-3, 5e-5, floor=1e-3)
    assert [kdrl(step) for step in (0, 79, 80, 81, 1000)] == [0.005, 0.00105, 0.001, 0.001, 0.001]


def test_trapezoid_holds_then_falls_in_a_straight_line_then_stays_at_its_floor():
    schedule = Trapezoid(1.0, hold_until=10, end=20, floor=0.5)
    found = [schedule(step) for step in (0, 9, 10, 11, 15, 19, 20, 21, 1000)]
    assert found == pytest.approx([1, 1, 1, 0.95, 0.75, 0.55, 0.5, 0.5, 0.5], abs=1e-12)
    assert [Trapezoid(1.0, 0, 1)(step) for step in (0, 1, 2)] == [1, 0, 0]


def test_until_agreement_ramps_down_after_as_many_steps_in_a_row_as_its_patience():
    schedule = observed(UntilAgreement(0.8, agreement=0.9, patience=2, ramp=4), [0.5, 0.9])
    assert schedule(2) == 0.8, "one step is not yet two in a row"
    observed(schedule, [0.95], start=2)
    assert [schedule(step) for step in (2, 3, 4, 5, 6, 7, 100)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0])


def test_until_agreement_counts_anew_when_the_streak_breaks():
    schedule = observed(UntilAgreement(1.0, agreement=0.9, patience=3, ramp=2), [0.9, 0.9, 0.89, 0.9, 0.9])
    assert [schedule(step) for step in (5, 50)] == [1, 1]
    assert observed(schedule, [0.9], start=5)(6) == 0.5


def test_until_agreement_once_begun_goes_on_down_whatever_is_observed_later():
    schedule = observed(UntilAgreement(1.0, agreement=0.9, patience=1, ramp=2), [0.9, 0.1, 0.99, 0.99])
    assert [schedule(step) for step in (0, 1, 2, 3)] == [1, 0.5, 0, 0]
    without_ramp = observed(UntilAgreement(1.0, agreement=0.9, patience=1, ramp=0), [0.1, 0.9])
    assert [without_ramp(step) for step in (1, 2)] == [1, 0]


@pytest.mark.parametrize("seen", [[], [0.9], [0.9, 0.9], [0.9, 0.9, 0.1]])
def test_until_agreement_goes_on_after_a_checkpoint_as_if_never_stopped(seen):
    schedule, resumed = (UntilAgreement(1.0, agreement=0.9, patience=2, ramp=4) for _ in range(2))
    resumed.load_state(json.loads(json.dumps(observed(schedule, seen).state())))
    assert resumed == schedule
    later = [0.9, 0.5, 0.9, 0.9]
    one, other = (observed(s, later, start=len(seen)) for s in (schedule, resumed))
    assert [one(step) for step in range(12)] == [other(step) for step in range(12)]
    assert one(12) == 0


@pytest.mark.parametrize("schedule", [Constant(1.0), LinearDecay(1.0, 0.1), Trapezoid(1.0, 2, 4)], ids=str)
def test_schedules_of_the_clock_have_no_state_and_ignore_agreement(schedule):
    before = [schedule(step) for step in range(6)]
    schedule.observe(0, 1.0)
    schedule.load_state(schedule.state())
    assert schedule.state() == {}
    assert [schedule(step) for step in range(6)] == before
    assert Constant(1.0)(10**6) == 1


ALL = [Constant(0.25), LinearDecay(2e-3, 1e-5, floor=1e-4), Trapezoid(0.1, 5, 9, 0.01), UntilAgreement(0.1, 0.8, 2, 7)]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_what_a_schedule_prints_is_read_back_as_the_same_schedule(schedule):
    assert parse_schedule(str(schedule)) == schedule
    assert {type(s) for s in ALL} == set(SCHEDULES.values()), "a new schedule is missing from this test"


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("0.02", Constant(0.02)),
        (" 3 ", Constant(3.0)),
        ("LinearDecay(0.02, rate=0.0002)", LinearDecay(0.02, 0.0002, 0.0)),
        ("Trapezoid(end=9, hold_until=5, value=1)", Trapezoid(1, 5, 9, 0.0)),
        ("UntilAgreement(0.1)", UntilAgreement(0.1, 0.95, 3, 10)),
    ],
)
def test_schedules_are_written_as_in_python_and_a_bare_number_is_constant(text, schedule):
    assert parse_schedule(text) == schedule


REFUSED = """
__import__('os').system('x') | Constant(__import__('os').getpid()) | Constant(2 ** 3) | (lambda: 1)() | x := 1
Constant | Cosine(1) | object() | Schedule() | Constant(value=x) | nan | [1] | {} | None | 1 + 2j | Constant(1)(2)
a.Constant(1) | Constant('0.5') | Constant([1]) | Constant(None) | 'LinearDecay(1, 1)' | Constant() | Constant(1, 2)
Constant(weight=1) | Constant(*[1]) | Constant(**{'value': 1}) | LinearDecay(1) | LinearDecay(1 | 1; 2
UntilAgreement(1, _streak=3) | Constant(value=True or 1) | Constant(f'{1}')
-1 | Constant(-0.1) | LinearDecay(-1, 0) | LinearDecay(1, -0.1) | LinearDecay(1, 0.1, -1) | Trapezoid(-1, 1, 2)
Trapezoid(1, -1, 2) | Trapezoid(1, 2, 2) | Trapezoid(1, 3, 2) | Trapezoid(1, 2, 3, -1) | UntilAgreement(-1)
UntilAgreement(1, 0) | UntilAgreement(1, 1.01) | UntilAgreement(1, patience=0) | UntilAgreement(1, ramp=-1)
"""


@pytest.mark.parametrize("text", ["", *(entry.strip() for entry in REFUSED.replace("\n", "|").strip("|").split("|"))])
def test_code_unknown_names_strings_and_weights_below_zero_are_refused_as_bad_input(text):
    with pytest.raises(InputError):
        parse_schedule(text)


@pytest.mark.parametrize("text", ["'0.5'", "b'1'", "True", "Constant(True)", "1e999", "9" * 400])
def test_quoted_numbers_truth_values_and_numbers_too_large_are_refused_as_bad_input(text):
    with pytest.raises(InputError):
        parse_schedule(text)


def test_refusals_name_the_text_the_choices_and_the_reason():
    with pytest.raises(InputError, match=r"'Cosine\(1\)'.*LinearDecay.*Trapezoid.*UntilAgreement.*numbers"):
        parse_schedule("Cosine(1)")
    with pytest.raises(InputError, match=r"^LinearDecay: rate must be a finite number, 0 or more, but is -0\.1"):
        parse_schedule("LinearDecay(1.0, -0.1)")
    with pytest.raises(InputError, match=r"^Trapezoid: end \(2\) must come after hold_until \(2\)"):
        Trapezoid(1.0, 2, 2)
