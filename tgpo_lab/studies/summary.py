"""The findings in three sentences for the README, made from stored results: numbers and words alike."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import InputError
from .results import StudyResults, complete_results
from .statistics import LEVEL, mean_interval, paired_comparison
from .tables import SHARE, difference_text, each_rate, interval_text, steps_text, with_rate

BEGIN, END = "<!-- findings: made by `tgpo-lab study findings` -->", "<!-- end of findings -->"


def summary(folder: Path) -> str:
    """What *headline*, *longer*, *headline-larger*, *headline-larger-longer* and *horizon* have shown as Markdown, a
    sentence for each situation.

    Nothing is said of a study that is not complete.
    """
    headline, longer, larger, larger_longer, horizon = (
        complete_results(name, folder)
        for name in ("headline", "longer", "headline-larger", "headline-larger-longer", "horizon")
    )
    far = [part(results) for part, results in ((_far, headline), (_far_longer, longer)) if results is not None]
    sentences = [f"**Far:** {'; '.join(far)}."] if far else []
    wide = [
        how + _far(results, "far-larger")
        for how, results in (("", larger), ("tuned anew, on other seeds, ", larger_longer))
        if results is not None
    ]
    if wide:
        sentences.append(f"**Far, with 11 million weights and responses of twice the length:** {'; '.join(wide)}.")
    if headline is not None:
        sentences.append(_near(headline))
    if horizon is not None:
        sentences.append(_fragile(horizon))
    return "\n".join(f"- {sentence}" for sentence in sentences) or "No study is complete yet."


def with_summary(readme: str, folder: Path) -> str:
    """The README with the sentences between its two markers made anew.

    Raises:
        InputError: a marker is missing.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise InputError(f"README.md needs the line {BEGIN} once, and {END} once after it: put them back.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{summary(folder)}\n{END}{rest.split(END)[1]}"


def _far(results: StudyResults, pair: str = "far") -> str:
    runs = results.runs[results.runs["pair"] == pair]
    shown = ", ".join(
        f"{name} at {_accuracy(runs, label)}"
        for name, label in (("reverse KL ends", "rkl"), ("GRPO", "grpo"), ("SFT on the teacher's responses", "sft"))
    )
    return (
        f"TGPO takes the student from {100 * runs['accuracy_before'].mean():.0f} % to {_accuracy(runs, 'tgpo')} in "
        f"{results.about['settings']['steps']} steps, from the same start {shown} "
        f"({_standing(runs, 'tgpo', 'sft', 'SFT')})"
    )


def _far_longer(results: StudyResults) -> str:
    """What never came in the steps of the headline, given more of them."""
    runs, settings = results.runs[results.runs["pair"] == "far"], results.about["settings"]
    half = {label: runs.loc[runs["label"] == label, "steps_to_50"] for label in ("tgpo", "rkl")}
    steps = {label: steps_text(values) for label, values in half.items()}
    ends = ", ".join(f"{name} at {_accuracy(runs, label)}" for name, label in (("TGPO", "tgpo"), ("GRPO", "grpo")))
    return (
        f"in {settings['steps']} steps of {settings['prompts_per_step']} prompts reverse KL ends at "
        f"{_accuracy(runs, 'rkl')}, {ends}, and half of the answers were right at step {steps['rkl']} with reverse KL "
        f"and at step {steps['tgpo']} with TGPO (medians, measured every {settings['evaluate_every']} steps)"
    )


def _near(results: StudyResults) -> str:
    runs = results.runs[results.runs["pair"] == "near"]
    return (
        f"**Near:** from {100 * runs['accuracy_before'].mean():.0f} %, reverse KL ends at {_accuracy(runs, 'rkl')} "
        f"and TGPO at {_accuracy(runs, 'tgpo')} ({_standing(runs, 'tgpo', 'rkl', 'reverse KL')})."
    )


def _fragile(results: StudyResults) -> str:
    """With *far* beside it: this study has another learning rate than the headline, so its numbers are others too."""
    fragile, robust = (
        f"TGPO ends at {_accuracy(runs, 'no gate')}, with guidance inside a trust horizon alone at "
        f"{_accuracy(runs, 'worst token > 4')} ({_shown(runs, 'worst token > 4', 'no gate')})"
        for runs in (results.runs[results.runs["pair"] == pair] for pair in ("far-fragile", "far"))
    )
    return (
        f"**Far, with a teacher that is lost on the student's prefixes** (another study, learning rate "
        f"{each_rate(with_rate(results.runs)['rate'])}): {fragile}; with the robust teacher in that study {robust}."
    )


def _accuracy(runs: pd.DataFrame, label: str) -> str:
    return interval_text(mean_interval(runs.loc[runs["label"] == label, "test_accuracy"], SHARE), percent=True)


def _standing(runs: pd.DataFrame, first: str, second: str, name: str) -> str:
    """In words, after the run and over it, by the rule of :mod:`tgpo_lab.studies.claims`."""
    after, over = (_compared(runs, first, second, column) for column in ("test_accuracy", "area"))
    if after.p >= LEVEL:
        text = f"between TGPO and {name} no difference is shown after the run"
    else:
        text = f"after the run TGPO is {'ahead of' if after.difference > 0 else 'behind'} {name}"
    if over.p >= LEVEL:
        return text
    sooner = "TGPO" if over.difference > 0 else name
    return f"{text}; {sooner} is sooner, with {100 * abs(over.difference):.1f} points more on average over the run"


def _shown(runs: pd.DataFrame, first: str, second: str) -> str:
    """The difference after the run, and whether it is shown."""
    row = _compared(runs, first, second, "test_accuracy")
    return f"{difference_text(row)}, {'' if row.p < LEVEL else 'not '}shown"


def _compared(runs: pd.DataFrame, first: str, second: str, column: str) -> tuple:
    """The row of :func:`paired_comparison` for two methods on one pair."""
    (row,) = paired_comparison(runs[runs["label"].isin([first, second])], column, first).itertuples()
    return row
