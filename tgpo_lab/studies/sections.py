"""What single studies show beside the general tables: each a function of stored results to sections and figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import figures, tables
from .catalog import OPENINGS, RELIABILITIES, map_pair
from .headline import RATES
from .results import StudyResults
from .settings import MAIN_METHODS, TUNING_SEEDS
from .statistics import mean_interval

Content = tuple[list[tuple[str, str]], dict[str, Figure]]
"""Sections as (heading, Markdown), and figures by name."""

INSIDE, OUTSIDE = "teacher goes on, inside the horizon", "outside of it"
AREA = "mean held-out accuracy over the run"
WHY_A_HORIZON = """\
TGPO teaches whatever the teacher would write. That is worth learning where the teacher goes on rightly, and harmful
where it does not. A trust horizon cannot see which is which: it goes by how believable the prefix is to the teacher,
and helps as far as that tells one from the other. So three numbers of a pair say what to expect. Where the teacher is
right inside and wrong outside, the horizon takes away what misleads. Where it is right on both sides, the horizon
takes away guidance that was good. And it can take away nearly all of it without loss where one token at the prompt,
which is inside every horizon, is enough for the student to end right:

"""


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
        "The rule that chooses, written down before, is the largest mean area: a method that is soon there wins over one "
        "that ends higher. The mean accuracy after the run would have chosen another rate in these cases:\n\n"
    )
    chosen = pd.DataFrame(
        {
            "pair": other.index.get_level_values("pair"),
            "method": other.index.get_level_values("method"),
            "chosen by area: accuracy after the run": after["area"],
            "by accuracy after the run": after["test_accuracy"],
        }
    )
    return [
        ("Mean area, by pair and learning rate", tables.markdown(pd.DataFrame({"method": area.index, **cells}))),
        ("The rule and its effect", rule + tables.markdown(chosen)),
    ], {}


def headline(results: StudyResults) -> Content:
    """The tuning budget and what it chose; entropy, length and gradient norm along training."""
    rates = tables.with_rate(results.runs)
    wide = rates.groupby(["label", "pair"])["rate"].agg(tables.each_rate).unstack("pair")
    table = pd.DataFrame({"method": wide.index, **{f"learning rate on {pair}": wide[pair] for pair in wide}})
    note = (
        f"Every method had the same budget: {len(RATES)} learning rates ({', '.join(f'{rate:g}' for rate in RATES)}) "
        f"on each pair, {len(TUNING_SEEDS)} seeds each, none of which is used here (study tuning). The one with the "
        "largest mean area was taken. Where it lies at the edge of the four, a better one may lie beyond: "
        f"{_at_the_edge(rates)}.\n\n"
    )
    drawn = {
        f"headline-{column.replace('_', '-')}": figures.curves(
            results.steps, MAIN_METHODS, column, unit, bounds=(0.0, np.inf)
        )
        for column, unit in (
            ("entropy", "entropy of the student (nats)"),
            ("length", "length of responses (tokens)"),
            ("gradient_norm", "gradient norm before clipping"),
        )
    }
    return [("Tuning", note + tables.markdown(table))], drawn


def _at_the_edge(runs: pd.DataFrame) -> str:
    """How many methods of each pair took the smallest or the largest rate, and which, if they are few."""
    parts = []
    for (pair, rate), group in runs.groupby(["pair", "rate"]):
        if rate in (min(RATES), max(RATES)):
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
    for first, second in (("tgpo", "rkl"), ("tgpo", "grpo"), ("tgpo-trust-horizon", "tgpo")):
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
    return [("Mean area", note + tables.markdown(best))], drawn


def premise(results: StudyResults) -> Content:
    """Reliability and value of the proposed token by depth, before training; inside and outside the horizon."""
    start = results.looks[results.looks["step"] == 0]
    measures = ["teacher_right", "student_right_after_token", "student_right"]
    by_depth = _weighted(start, ["pair", "depth"], [*measures, "teacher_entropy"])
    named = by_depth.rename(
        columns=dict(zip(measures, ("teacher goes on", "student after its token", "student goes on"), strict=True))
    )
    drawn = {
        "premise-by-depth": figures.by_depth(named, ["teacher goes on", "student after its token", "student goes on"])
    }
    # The prompt alone is inside every horizon: nothing that the student wrote has surprised the teacher yet.
    by_side = _weighted(start, ["pair", "believable", "depth"], ["teacher_right"])
    drawn["premise-horizon"] = figures.by_depth(
        by_side.assign(side=np.where(by_side["believable"], INSIDE, OUTSIDE))
        .pivot(index=["pair", "depth"], columns="side", values="teacher_right")
        .reset_index(),
        [INSIDE, OUTSIDE],
    )
    written = start[start["depth"] > 0]
    share = _weighted(written, ["pair", "believable"], ["prefixes_share"]).set_index(["pair", "believable"])
    sides = _weighted(start, ["pair", "believable"], ["teacher_right"]).set_index(["pair", "believable"])
    opening = start[start["depth"] == 0].groupby("pair")["student_right_after_token"].mean()
    outcome = results.runs.groupby("pair")["test_accuracy"].mean()
    rows, effects = [], []
    for pair in dict.fromkeys(start["pair"]):
        whole = _weighted(written[written["pair"] == pair], ["pair"], [*measures, "teacher_entropy"])
        inside, outside = (
            sides["teacher_right"].get((pair, believable), np.nan) for believable in (True, False)
        )  # no such prefix, no share
        rows.append(
            {
                "pair": pair,
                "teacher goes on rightly": _percent(whole["teacher_right"]),
                "student after the proposed token": _percent(whole["student_right_after_token"]),
                "student as it is": _percent(whole["student_right"]),
                "teacher's entropy (nats)": f"{whole['teacher_entropy'].item():.2f}",
                "prefixes inside": _percent(share["prefixes_share"].get((pair, True), 0.0)),
                "reliability inside, prompt included": _share(inside),
                "outside": _share(outside),
                "TGPO's test accuracy": _percent(outcome[pair]),
            }
        )
        effects.append(
            f"- {pair}: right inside {_share(inside)}, outside {_share(outside)}; after the token that the teacher "
            f"proposes at the prompt, the student ends right in {_share(opening[pair])}."
        )
    note = (
        "At the student's prefixes of one token and more, before training, means over prefixes. Inside the horizon: no "
        "token of the prefix surprises the teacher by more than 4 nats. Right: the response ends in the right sum.\n\n"
    )
    return [
        ("The premise and what came of it", note + tables.markdown(pd.DataFrame(rows))),
        ("Why a horizon works, and when it need not", WHY_A_HORIZON + "\n".join(effects)),
    ], drawn


def _share(value: float) -> str:
    """A share as a percentage; – where there was nothing to take it of."""
    return "–" if np.isnan(value) else _percent(value)


def gradient(results: StudyResults) -> Content:
    """Moments of the signal and cosines, over divergence and along training."""
    dials = results.runs.drop_duplicates("cell").set_index("cell")["opening_logprob"]
    looks = results.looks.assign(divergence=results.looks["cell"].map(dials).round(1))
    start = looks[looks["step"] == 0].groupby("divergence").mean(numeric_only=True).sort_index(ascending=False)
    columns = {
        "mean_policy_gradient_second_moment": "second moment, policy gradient",
        "mean_policy_gradient_variance": "its variance",
        "mean_exact_squared_norm": "squared norm, exact",
        "mean_guidance_squared_norm": "squared norm, guidance",
        "mean_rejected": "probability of a rejected token",
        "mean_largest_rejection": "largest rejection (nats)",
    }
    table = pd.DataFrame({"opening (nats)": [f"{divergence:.1f}" for divergence in start.index]})
    for column, name in columns.items():
        table[name] = [f"{value:.3g}" for value in start[column]]
    cosines = [column for column in looks if column.startswith("cosine")]
    directions = pd.DataFrame({"opening (nats)": table["opening (nats)"]})
    for column in cosines:
        shown = column.removeprefix("cosine ").replace(", ", " and ")
        directions[shown] = ["–" if pd.isna(value) else f"{value:+.2f}" for value in start[column]]
    note = (
        "Before training, mean over the positions of the student's samples, in the space of the logits (nats²). "
        "Rejected: the student gives the token over e⁴ times what the teacher does. Largest rejection: of tokens to "
        "which the student gives 0.01 and more.\n\n"
    )
    cosine_note = "Cosines between whole gradients on one batch, before training, mean over runs that have both.\n\n"
    sections = [("Strength and noise", note + tables.markdown(table)),
                ("Directions", cosine_note + tables.markdown(directions))]  # fmt: skip
    drawn = {
        "gradient-over-divergence": figures.over_divergence(
            start,
            {
                "mean_policy_gradient_second_moment": "second moment, policy gradient (nats²)",
                "mean_policy_gradient_variance": "variance, policy gradient (nats²)",
                "mean_exact_squared_norm": "squared norm, exact (nats²)",
                "mean_guidance_squared_norm": "squared norm, guidance (no unit)",
                "mean_largest_rejection": "bound log(δ/ε) with δ = 0.01 or more (nats)",
            },
        )
    }
    drawn |= {
        f"gradient-{name}": figures.along_training(looks, f"mean_{column}", unit)
        for name, column, unit in (
            ("policy-gradient", "policy_gradient_second_moment", "second moment, policy gradient (nats²)"),
            ("variance", "policy_gradient_variance", "variance, policy gradient (nats²)"),
            ("exact", "exact_squared_norm", "squared norm, exact (nats²)"),
            ("guidance", "guidance_squared_norm", "squared norm, guidance (nats²)"),
        )
    }
    return sections, drawn


def conditioning(results: StudyResults) -> Content:
    """Accuracy against the number of teacher tokens learned from, and at the most that all methods have reached."""
    steps = results.steps.sort_values(["cell", "step"], ignore_index=True)
    at_prefixes = steps["guided"].fillna(0.0) * steps["tokens"]
    own = steps["teacher_trace_tokens"].fillna(0.0)
    as_many = own.clip(upper=steps["tokens"]).where(steps["weight"] > 0, 0.0)  # the ablation takes no more than that
    used = at_prefixes.where(steps["label"] == "tgpo", own).where(steps["label"] != "tgpo-unconditioned", as_many)
    # Accuracy at a step was measured before that step's tokens.
    steps["teacher_tokens"] = used.groupby(steps["cell"]).cumsum() - used
    measured = steps.dropna(subset=["accuracy"])
    rows = []
    for pair, of_pair in measured.groupby("pair", sort=False):
        reached = of_pair.groupby("cell")["teacher_tokens"].max()
        budget = reached.min()
        for (label, seed), run in of_pair.groupby(["label", "seed"]):
            accuracy = np.interp(budget, run["teacher_tokens"], run["accuracy"])
            rows.append({"pair": pair, "label": label, "seed": seed, "budget": budget, "accuracy": accuracy})
    table = pd.DataFrame(rows)
    shown = pd.DataFrame(
        {
            "pair": pair,
            "teacher tokens": f"{group['budget'].iloc[0]:,.0f}",
            "method": label,
            "held-out accuracy there": tables.interval_text(mean_interval(group["accuracy"], (0, 1)), percent=True),
        }
        for (pair, label), group in table.groupby(["pair", "label"], sort=False)
    )
    note = (
        "At the largest number of teacher tokens that every run of the pair has learned from; between measurements in "
        "a straight line. 95 % intervals over seeds.\n\n"
    )
    sections = [("At equal numbers of teacher tokens", note + tables.markdown(shown))]
    compared = tables.comparison(table, "tgpo", "accuracy")
    if len(compared):
        sections.append(("tgpo against each at that number", tables.markdown(compared)))
    return sections, {"conditioning-by-tokens": figures.against_tokens(measured)}


def _weighted(looks: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """Means over prefixes of rows that are means over ``prefixes`` prefixes each."""
    weighted = looks.assign(**{c: looks[c] * looks["prefixes"] for c in columns if c != "prefixes_share"})
    sums = weighted.groupby(keys, sort=False)[[c for c in columns if c != "prefixes_share"] + ["prefixes"]].sum()
    means = sums.div(sums["prefixes"], axis=0).drop(columns="prefixes")
    if "prefixes_share" in columns:
        means["prefixes_share"] = sums["prefixes"] / sums.groupby(level=0)["prefixes"].transform("sum")
    return means.reset_index()


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _percent(share) -> str:
    value = share.item() if hasattr(share, "item") else share
    return f"{100 * value:.0f} %"


SECTIONS: dict[str, Callable[[StudyResults], Content]] = {
    "tuning": tuning,
    "headline": headline,
    "map": divergence_map,
    "premise": premise,
    "gradient": gradient,
    "conditioning": conditioning,
}
"""By study."""
ALONE = {"tuning", "premise", "gradient"}
"""Studies without the general tables: their runs are not compared with each other."""
