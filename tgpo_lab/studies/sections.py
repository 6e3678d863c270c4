"""What single studies show beside the general tables: each a function of stored results to sections and figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from . import figures, tables
from .catalog import OPENINGS, RELIABILITIES, map_pair
from .headline import HEADLINES
from .look_sections import Content, gradient, premise
from .results import StudyResults
from .settings import MAIN_METHODS
from .statistics import LEVEL, mean_interval, paired_comparison
from .teacher_tokens import at_equal_tokens, with_teacher_tokens

AREA = "mean held-out accuracy over the run"
MAP_COMPARISONS = (("tgpo", "rkl"), ("tgpo", "grpo"), ("tgpo-trust-horizon", "tgpo"))
CELL_NOTE = (
    "In points: area / accuracy on the test prompts after the run. A star: shown, by the sign-flip test over seeds, "
    "corrected over the fifteen pairs.\n\n"
)


def tuning(results: StudyResults) -> Content:
    """Mean area of every configuration, and where accuracy after the run would have chosen another one."""
    runs = tables.with_rate(results.runs)
    runs = runs.assign(method=runs["label"].str.split().str[0])
    means = runs.groupby(["pair", "method", "rate"])[["area", "test_accuracy"]].mean()
    best = means.groupby(["pair", "method"]).idxmax().map(lambda key: key[-1])  # ties go to the smaller rate
    area = means["area"].unstack(["pair", "rate"])
    cells = {f"{pair} {rate:g}": [f"{100 * x:.1f} %" for x in area[pair, rate]] for pair, rate in area}

    other = best[best["area"] != best["test_accuracy"]]
    after = {
        column: [
            f"{rate:g}: {100 * means.loc[(*key, rate), 'test_accuracy']:.0f} %" for key, rate in other[column].items()
        ]
        for column in other
    }
    rule = (
        "The rule that chooses, written down before, is the largest mean area: a method that is soon there wins over "
        "one that ends higher. The mean accuracy after the run would have chosen another rate "
        f"{'in these cases:' if len(other) else 'in no case.'}\n\n"
    )
    chosen = pd.DataFrame(
        {
            "pair": other.index.get_level_values("pair"),
            "method": other.index.get_level_values("method"),
            "chosen by area: accuracy after the run": after["area"],
            "by accuracy after the run": after["test_accuracy"],
        }
    )
    equal = means["area"].groupby(["pair", "method"]).agg(lambda areas: (areas == areas.max()).sum() > 1)
    if equal.any():
        named = ", ".join(f"{method} on {pair}" for pair, method in equal.index[equal])
        rule = f"Several rates have the same largest area, and the smallest of them was taken: {named}.\n\n{rule}"
    return [
        ("Mean area, by pair and learning rate", tables.markdown(pd.DataFrame({"method": area.index, **cells}))),
        ("The rule and its effect", rule + (tables.markdown(chosen) if len(other) else "")),
    ], {}


def headline(results: StudyResults) -> Content:
    """The tuning budget and what it chose; entropy, length and gradient norm along training."""
    plan = HEADLINES[results.about["study"]]
    rates = tables.with_rate(results.runs)
    wide = rates.groupby(["label", "pair"])["rate"].agg(tables.each_rate).unstack("pair")
    table = pd.DataFrame({"method": wide.index, **{f"learning rate on {pair}": wide[pair] for pair in wide}})
    note = (
        f"Every method had the same budget: {len(plan.rates)} learning rates "
        f"({', '.join(f'{rate:g}' for rate in plan.rates)}) on each pair, {_seeds_each(plan.tuning_seeds)} used here "
        f"(study {plan.tuning}). The one with the largest mean area was taken. Where it lies at the edge of them, a "
        f"better one may lie beyond: {_at_the_edge(rates, plan.rates)}.\n\n"
    )
    drawn = {
        f"{plan.name}-{column.replace('_', '-')}": figures.curves(
            results.steps, MAIN_METHODS, column, unit, bounds=(0.0, np.inf)
        )
        for column, unit in (
            ("entropy", "entropy of the student (nats)"),
            ("length", "length of responses (tokens)"),
            ("gradient_norm", "gradient norm before clipping"),
        )
    }
    return [("Tuning", note + tables.markdown(table))], drawn


def _seeds_each(seeds: tuple[int, ...]) -> str:
    return "one seed each, which is not" if len(seeds) == 1 else f"{len(seeds)} seeds each, none of which is"


def _at_the_edge(runs: pd.DataFrame, tried: tuple[float, ...]) -> str:
    """How many methods of each pair took the smallest or the largest rate, and which, if they are few."""
    parts = []
    for (pair, rate), group in runs.groupby(["pair", "rate"]):
        if rate in (min(tried), max(tried)):
            labels = list(dict.fromkeys(group["label"]))
            named = ", ".join(labels) if len(labels) <= 6 else f"{len(labels)} methods"
            parts.append(f"{named} on {pair} ({rate:g})")
    return "; ".join(parts) or "none does"


def divergence_map(results: StudyResults) -> Content:
    """Heatmaps of the area on measured axes: each method, and who is ahead by how much."""
    runs = results.runs
    asked = {map_pair(opening, share): (opening, share) for opening in OPENINGS for share in RELIABILITIES}
    openings, shares = (runs["pair"].map(lambda pair, i=i: asked[pair][i]) for i in (0, 1))
    # A dial is asked for, and what comes of it is measured: cells go by what was asked, axes say what was measured.
    columns = {o: f"{runs.loc[openings == o, 'opening_logprob'].mean():.1f}" for o in OPENINGS if (openings == o).any()}
    rows = {
        share: _range(runs.loc[shares == share, "reliability"]) for share in RELIABILITIES if (shares == share).any()
    }
    area = runs.groupby(["label", shares.rename("share"), openings.rename("opening")])["area"].mean()
    labels = list(dict.fromkeys(runs["label"]))

    def on_the_map(values: pd.Series) -> pd.DataFrame:
        table = values.unstack("opening").reindex(index=list(rows)[::-1], columns=list(columns))
        table.index, table.columns = ([names[key] for key in axis] for names, axis in
                                      ((rows, table.index), (columns, table.columns)))  # fmt: skip
        return table.rename_axis(index="teacher reliability", columns="log-probability of the teacher's opening (nats)")

    drawn = {f"map-{label}": figures.heatmap(on_the_map(area[label]), label, AREA) for label in labels}
    for first, second in MAP_COMPARISONS:
        if {first, second} <= set(labels):
            drawn[f"map-{first}-minus-{second}"] = figures.heatmap(
                on_the_map(area[first] - area[second]), f"{first} − {second}", "difference of the means", diverging=True
            )
    whole = area.unstack("label")
    best = pd.DataFrame(
        {
            "teacher reliability": [rows[share] for share, _ in whole.index],
            "opening (nats)": [columns[opening] for _, opening in whole.index],
            **{label: [f"{100 * value:.0f} %" for value in whole[label]] for label in whole},
        }
    )
    rates = tables.with_rate(runs).groupby("label")["rate"].agg(tables.each_rate)
    note = (
        "Rows are teachers, with the range of reliability that was measured with the students of the columns. Who "
        "is ahead is for the tests below to say.\n\n"
        "On the whole map a method keeps the configuration that the tuning chose for it on *far* "
        f"({', '.join(f'{label} at {rate}' for label, rate in rates.items())}): in the columns away "
        "from *far*'s it is not tuned.\n\n"
    )
    sections = [("Mean area", note + tables.markdown(best))]
    for first, second in MAP_COMPARISONS:
        if {first, second} <= set(labels):
            table = _cell_by_cell(runs, first, second, asked, rows, columns)
            sections.append((f"{first} − {second}, cell by cell", CELL_NOTE + tables.markdown(table)))
    return sections, drawn


def _cell_by_cell(
    runs: pd.DataFrame, first: str, second: str, asked: dict[str, tuple[float, float]], rows: dict, columns: dict
) -> pd.DataFrame:
    """Differences of area and of accuracy after the run for every pair of the map, with a star where one is shown."""
    both = runs[runs["label"].isin([first, second])]
    texts: dict[tuple[float, float], list[str]] = {}
    for measure in ("area", "test_accuracy"):
        for row in paired_comparison(both, measure, first).itertuples():
            star = " *" if row.adjusted_p < LEVEL else ""
            texts.setdefault(asked[row.pair], []).append(f"{100 * row.difference:+.0f}{star}")
    return pd.DataFrame(
        {
            "teacher reliability": list(rows.values()),
            **{
                f"{column} nats": [" / ".join(texts.get((opening, share), ["–"])) for share in rows]
                for opening, column in columns.items()
            },
        }
    )


def conditioning(results: StudyResults) -> Content:
    """Accuracy against the number of teacher tokens learned from, and at the most that all methods have reached."""
    steps = with_teacher_tokens(results.steps)
    table = at_equal_tokens(steps)
    shown = pd.DataFrame(
        {
            "pair": pair,
            "teacher tokens": f"{group['budget'].iloc[0]:,.0f}",
            "method": label,
            "held-out accuracy there": tables.interval_text(mean_interval(group["accuracy"], (0, 1)), percent=True),
            "written by the teacher by then": f"{group['written'].mean():,.0f}",
            "held-out accuracy when it had written so many": "–"
            if group["by_written"].isna().any()
            else tables.interval_text(mean_interval(group["by_written"], (0, 1)), percent=True),
        }
        for (pair, label), group in table.groupby(["pair", "label"], sort=False)
    )
    note = (
        "At the largest number of teacher tokens that every run of the pair has learned from; between measurements in "
        "a straight line. 95 % intervals over seeds. Not all that a teacher writes is learned from: for "
        "tgpo-unconditioned it writes a response for each of the student's, and as many of their tokens are taken as "
        "the student has written.\n\n"
    )
    sections = [("At equal numbers of teacher tokens", note + tables.markdown(shown))]
    compared = tables.comparison(table, "tgpo", "accuracy")
    if len(compared):
        sections.append(("tgpo against each at that number", tables.markdown(compared)))
    return sections, {"conditioning-by-tokens": figures.against_tokens(steps.dropna(subset=["accuracy"]))}


def long_responses(results: StudyResults) -> Content:
    """How much of a long response is guided, and what responses are like, just before guidance ends."""
    steps = results.steps[results.steps["weight"] > 0]
    last = steps.loc[steps.groupby("cell")["step"].idxmax()].sort_values("step")
    shown = pd.DataFrame(
        {
            "pair": pair,
            "method": label,
            "guided positions": tables.interval_text(mean_interval(group["guided"], (0, 1)), percent=True),
            "agreement with the teacher": tables.interval_text(mean_interval(group["agreement"], (0, 1)), percent=True),
            "tokens a response": tables.interval_text(mean_interval(group["length"], (0, np.inf))),
            "cut at the limit": tables.interval_text(mean_interval(group["truncated"], (0, 1)), percent=True),
            "right": tables.interval_text(mean_interval(group["reward"], (0, 1)), percent=True),
        }
        for (pair, label), group in last.groupby(["pair", "label"], sort=True)
    )
    note = (
        f"On the student's samples of step {last['step'].iloc[0]}, the last with a weight above zero. In brackets 95 % "
        "intervals (Student's t) over seeds.\n\n"
    )
    of_study = list(dict.fromkeys(results.runs["label"]))
    labels = [label for label in LONG_METHODS if label in of_study]
    drawn = {"long-guided": figures.curves(steps, labels, "guided", "share of positions guided")}
    return [
        ("What is guided at the end of guidance", note + tables.markdown(shown)),
        ("A reading", LONG_READING),
    ], drawn


LONG_METHODS = ("tgpo", "tgpo-trust-horizon", "tgpo-soft-horizon", "tgpo-recovering-horizon")
LONG_READING = """\
All four teach the opening within a few steps: responses become long. But the first steps also cost the student some of
its skill, and one wrong digit anywhere makes a long response wrong, so no reward comes to repair it. What could repair
it is guidance along the response. A horizon that never recovers ends at the first slip and guides the beginning alone:
no answer is right. One that recovers guides most of the response. Plain TGPO guides all of it, the terse wrong starts
too, and with the lost teacher these are lessons in nonsense. A reading of the numbers above, not a test of its own.

The learning rate is the one that the study was planned with. After seed 0 had been read, two runs with the larger one
that the tuning chose on *far* were tried in its place. They had no right answer and are not stored; the study went on
as planned, with its runs of seed 0."""


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


SECTIONS: dict[str, Callable[[StudyResults], Content]] = {
    "tuning": tuning,
    "headline": headline,
    "tuning-larger": tuning,
    "headline-larger": headline,
    "tuning-larger-longer": tuning,
    "headline-larger-longer": headline,
    "map": divergence_map,
    "premise": premise,
    "gradient": gradient,
    "conditioning": conditioning,
    "long": long_responses,
}
"""By study."""
ALONE = {"tuning", "tuning-larger", "tuning-larger-longer", "premise", "gradient"}
"""Studies without the general tables: their runs are not compared with each other."""
