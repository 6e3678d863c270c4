"""What the studies that look into checkpoints show: functions of stored results to sections and figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import figures, tables
from .results import StudyResults
from .statistics import mean_interval
from .tables import interval_text

Content = tuple[list[tuple[str, str]], dict[str, Figure]]
"""Sections as (heading, Markdown), and figures by name."""

INSIDE, OUTSIDE = "teacher goes on, inside the horizon", "outside of it"
WHY_A_HORIZON = """\
TGPO teaches whatever the teacher would write. A trust horizon cannot see whether that is right: it goes by how
believable the prefix is to the teacher. Two things follow, and a third was found.

Where the teacher is right inside and lost outside, the horizon takes away what misleads. It does not make the
difference everywhere: on the map (study *map*, cell by cell) it is ahead of TGPO with the lost teacher where the
student is far, and level with it where the student is near, since TGPO gets there all the same.

It can take away nearly all guidance without loss, because one token at the prompt, which is inside every horizon, is
enough for these students to end right; and what the teacher proposes outside is worth little to them, even where the
teacher itself goes on rightly.

And on *far*, where the teacher is right on both sides, the horizon is ahead, too (studies *headline*, *horizon*). We
had expected a loss. A reading, not a test: guidance at a terse answer's end teaches to go on from a wrong start, with
two answers and long responses, and the horizon leaves that out.

Before training, inside is nearly always the prompt alone, but on *near*:

"""


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
    drawn["premise-entropy"] = figures.by_depth(
        by_depth.rename(columns={"teacher_entropy": "of its next token"}),
        ["of its next token"], "teacher's entropy (nats)", (-0.04, None),
    )  # fmt: skip
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
    beyond = _weighted(written, ["pair", "believable"], ["student_right_after_token"]).set_index(["pair", "believable"])
    beyond = beyond["student_right_after_token"]
    outcome = {
        pair: interval_text(mean_interval(group, (0, 1)), percent=True)
        for pair, group in results.runs.groupby("pair")["test_accuracy"]
    }
    trained = results.looks[(results.looks["step"] == results.looks["step"].max()) & (results.looks["depth"] > 0)]
    later = _weighted(trained, ["pair", "believable"], ["teacher_right", "prefixes_share"]).set_index(
        ["pair", "believable"]
    )
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
                "TGPO's test accuracy": outcome[pair],
            }
        )
        effects.append(
            f"- {pair}: the teacher goes on rightly from {_share(inside)} of prefixes inside, {_share(outside)} "
            f"outside; after the token that it proposes the student ends right in {_share(opening[pair])} at the "
            f"prompt, {_share(beyond.get((pair, False), np.nan))} outside."
        )
    note = (
        "At the student's prefixes of one token and more, before training, means over prefixes. Inside the horizon: no "
        "token of the prefix surprises the teacher by more than 4 nats. Right: the response ends in the right sum.\n\n"
    )
    after = pd.DataFrame(
        {
            "pair": pair,
            "prefixes inside": _share(later["prefixes_share"].get((pair, True), np.nan)),
            "reliability inside": _share(later["teacher_right"].get((pair, True), np.nan)),
            "outside": _share(later["teacher_right"].get((pair, False), np.nan)),
        }
        for pair in dict.fromkeys(start["pair"])
    )
    after_note = (
        f"After {trained['step'].iloc[0]} steps of TGPO, at prefixes of one token and more: as students open as their "
        "teacher does, most prefixes come inside.\n\n"
    )
    return [
        ("The premise and what came of it", note + tables.markdown(pd.DataFrame(rows))),
        ("Inside and outside, after training", after_note + tables.markdown(after)),
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
                "mean_guidance_squared_norm": "squared norm, guidance (nats²)",
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
    drawn["gradient-rejected"] = figures.along_training(
        looks, "mean_rejected", "probability of a rejected token", scale="linear"
    )
    for column in cosines:
        name, shown = column.removeprefix("cosine ").replace(", ", " and "), column.replace(", ", "-").replace(" ", "-")
        drawn[f"gradient-{shown}"] = figures.along_training(
            looks.dropna(subset=[column]), column, f"cosine, {name}", scale="linear"
        )
    return sections, drawn


def _weighted(looks: pd.DataFrame, keys: list[str], columns: list[str]) -> pd.DataFrame:
    """Means over prefixes of rows that are means over ``prefixes`` prefixes each."""
    weighted = looks.assign(**{c: looks[c] * looks["prefixes"] for c in columns if c != "prefixes_share"})
    sums = weighted.groupby(keys, sort=False)[[c for c in columns if c != "prefixes_share"] + ["prefixes"]].sum()
    means = sums.div(sums["prefixes"], axis=0).drop(columns="prefixes")
    if "prefixes_share" in columns:
        means["prefixes_share"] = sums["prefixes"] / sums.groupby(level=0)["prefixes"].transform("sum")
    return means.reset_index()


def _percent(share) -> str:
    value = share.item() if hasattr(share, "item") else share
    return f"{100 * value:.0f} %"
