"""What the paper claims, beside what the studies have measured. Verdicts follow from rules, which stand here.

The paper compares accuracies after training, so verdicts do, too, but for rows that say otherwise. A method is AHEAD of
another on a pair if its mean accuracy on the test prompts is larger and the exact sign-flip test over seeds, corrected
by Benjamini and Hochberg over all comparisons of the table, gives less than 0.05; BEHIND likewise; otherwise nothing is
shown. A claim is reproduced if it holds on every pair it is about, reproduced only under a condition if it holds on
some, and else not reproduced. With fewer than six seeds that test cannot show anything, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from scipy import stats

from .catalog import OPENINGS, RELIABILITIES, map_pair
from .results import StudyResults, complete_results
from .settings import ZERO_AT
from .statistics import LEVEL, mean_interval, paired_comparison
from .tables import difference_text, markdown, p_text
from .teacher_tokens import at_equal_tokens, with_teacher_tokens

MOST_PAIRS = 4
"""More are told in one sentence."""
REPRODUCED, CONDITIONAL, NOT_REPRODUCED, OPEN = "reproduced", "only under a condition", "not reproduced", "not measured"
TOO_FEW = "too few seeds to say"
FAR_TO_BEYOND = tuple(map_pair(opening, 1.0) for opening in OPENINGS if opening <= -9)


@dataclass(frozen=True)
class Ahead:
    """One method does better than another on each of some pairs."""

    study: str
    first: str
    second: str
    pairs: tuple[str, ...]
    column: str = "test_accuracy"


@dataclass(frozen=True)
class Stable:
    """A method collapses in no seed, and its accuracy rises: the 95 % interval of the change lies above zero."""

    study: str
    method: str
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class Collapses:
    """A method collapses in at least half of the seeds (see :func:`tgpo_lab.studies.results.run_row`)."""

    study: str
    method: str
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class Grows:
    """A quantity before training is larger on the last of some pairs than on the first, seed by seed: the 95 %
    interval of the difference lies above zero."""

    study: str
    column: str
    pairs: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and what would have to be seen here."""

    sentence: str
    expected: Ahead | Stable | Collapses | Grows


BY_DIVERGENCE = tuple(map_pair(opening, 1.0) for opening in OPENINGS)
FAR_ON_THE_MAP = tuple(map_pair(opening, share) for opening in OPENINGS if opening <= -9 for share in RELIABILITIES)
MAP = tuple(map_pair(opening, share) for opening in OPENINGS for share in RELIABILITIES)
CLAIMS = (
    Claim("In-family, reverse KL trains stably.", Stable("headline", "rkl", ("near",))),
    Claim("Cross-family, reverse KL collapses.", Collapses("headline", "rkl", ("far",))),
    Claim("The same, over the whole map.", Collapses("map", "rkl", MAP)),
    Claim("The same, with four times the steps and twice the prompts.", Collapses("longer", "rkl", ("mid", "far"))),
    *(
        Claim(f"Cross-family, TGPO is ahead of {name}.", Ahead("headline", "tgpo", method, ("far",)))
        for name, method in (
            ("reverse KL", "rkl"),
            ("GRPO++", "grpo++"),
            ("KDRL", "kdrl"),
            ("LUFFY", "luffy"),
            ("SFT", "sft"),
        )
    ),
    *(
        Claim(f"In-family, TGPO is ahead of {name}, too.", Ahead("headline", "tgpo", method, ("near",)))
        for name, method in (("reverse KL", "rkl"), ("GRPO++", "grpo++"))
    ),
    *(
        Claim(f"Cross-family, TGPO is ahead of {name}, with four times the steps and twice the prompts.",
              Ahead("longer", "tgpo", method, ("mid", "far")))
        for name, method in (("reverse KL", "rkl"), ("GRPO", "grpo"))
    ),
    *(
        Claim(f"Cross-family, TGPO is ahead of {name}, with a student of 11 million weights, responses of 100 tokens.",
              Ahead("headline-larger", "tgpo", method, ("far-larger",)))
        for name, method in (("reverse KL", "rkl"), ("GRPO", "grpo"), ("SFT", "sft"))
    ),
    Claim("Cross-family, reverse KL collapses, with that student and responses of that length.",
          Collapses("headline-larger", "rkl", ("far-larger",))),
    *(
        Claim(f"Cross-family, TGPO is ahead of {name}, with that student, in twice the steps, on other seeds (planned "
              "after the rows above were read).", Ahead("headline-larger-longer", "tgpo", method, ("far-larger",)))
        for name, method in (("reverse KL", "rkl"), ("GRPO", "grpo"), ("SFT", "sft"))
    ),
    Claim("Cross-family, reverse KL collapses, likewise.", Collapses("headline-larger-longer", "rkl", ("far-larger",))),
    Claim("Where the two are far apart, the gradient of reverse KL is stronger and noisier: its second moment grows.",
          Grows("gradient", "mean_policy_gradient_second_moment", BY_DIVERGENCE, "nats²")),
    Claim("It matters that the teacher is asked at the student's own prefixes (implied).",
          Ahead("headline", "tgpo", "tgpo-unconditioned", ("far",))),
    Claim("The same, by the area: mean accuracy over the run.",
          Ahead("headline", "tgpo", "tgpo-unconditioned", ("far",), "area")),
    Claim("The same, at equal numbers of teacher tokens learned from.",
          Ahead("conditioning", "tgpo", "tgpo-unconditioned", ("mid", "far"), "at_equal_tokens")),
    Claim("Annealing is better than a constant weight.",
          Ahead("schedule", "early to zero 0.02", "constant 0.02", ("mid", "far"))),
    Claim("Reaching zero early is better than annealing to the end.",
          Ahead("schedule", "early to zero 0.02", "to the end 0.02", ("mid", "far"))),
    Claim(f"Ten times the weight suppresses the reward early (mean held-out accuracy, steps 0 to {ZERO_AT // 2}).",
          Ahead("schedule", "early to zero 0.02", "early to zero 0.2", ("mid", "far"), "early_accuracy")),
    Claim(f"The same, to the end of annealing (steps 0 to {ZERO_AT}; added after the row above was read).",
          Ahead("schedule", "early to zero 0.02", "early to zero 0.2", ("mid", "far"), "annealed_accuracy")),
    Claim("TGPO is ahead of GRPO with other teachers as well.", Ahead("map", "tgpo", "grpo", FAR_ON_THE_MAP)),
    Claim("TGPO stays ahead of GRPO when the gap grows (reliable teacher).",
          Ahead("map", "tgpo", "grpo", FAR_TO_BEYOND)),
    Claim("TGPO stays ahead of reverse KL when the gap grows (reliable teacher).",
          Ahead("map", "tgpo", "rkl", FAR_TO_BEYOND)),
)  # fmt: skip


@dataclass
class Judged:
    """A claim with its verdict."""

    claim: Claim
    verdict: str
    measured: list[str] = field(default_factory=list)
    """One text for each pair."""


def judge(folder: Path, claims: tuple[Claim, ...] = CLAIMS) -> list[Judged]:
    """All claims, judged by what is stored in ``folder``; those of a study that is not complete there stay open."""
    stored = {claim.expected.study: complete_results(claim.expected.study, folder) for claim in claims}
    compared = _compared(claims, stored)
    return [_judged(claim, stored[claim.expected.study], compared) for claim in claims]


def claims_table(folder: Path) -> str:
    """The claims as Markdown."""
    rows = [
        {"claim": judged.claim.sentence, "here": f"**{judged.verdict}**", "study": judged.claim.expected.study,
         "measured": "<br>".join(judged.measured)}
        for judged in judge(folder)
    ]  # fmt: skip
    return markdown(pd.DataFrame(rows))


def _compared(claims: tuple[Claim, ...], stored: dict[str, StudyResults | None]) -> pd.DataFrame:
    """All comparisons that the claims ask for, one row each, p-values corrected over all of them."""
    rows = []
    for claim in claims:
        expected = claim.expected
        results = stored[expected.study]
        if not isinstance(expected, Ahead) or results is None:
            continue
        runs = _with_columns(results, expected.column)
        wanted = runs["label"].isin([expected.first, expected.second]) & runs["pair"].isin(expected.pairs)
        table = paired_comparison(runs[wanted], expected.column, expected.first)
        rows.append(table.assign(sentence=claim.sentence))
    whole = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame({"sentence": [], "p": []})
    whole["adjusted_p"] = stats.false_discovery_control(whole["p"]) if len(whole) else []
    return whole


def _with_columns(results: StudyResults, column: str) -> pd.DataFrame:
    """Runs with the column that a claim compares, where it has to be made from their steps."""
    runs, steps = results.runs, results.steps
    windows = {"early_accuracy": ZERO_AT // 2, "annealed_accuracy": ZERO_AT}
    if column in windows:
        made = steps[steps["step"] <= windows[column]].groupby("cell")["accuracy"].mean()
    elif column == "at_equal_tokens":
        made = at_equal_tokens(with_teacher_tokens(steps)).set_index("cell")["accuracy"]
    else:
        return runs
    return runs.assign(**{column: runs["cell"].map(made)})


def _judged(claim: Claim, results: StudyResults | None, compared: pd.DataFrame) -> Judged:
    if results is None:
        return Judged(claim, OPEN)
    expected = claim.expected
    if isinstance(expected, Ahead):
        outcomes = list(_ahead(compared[compared["sentence"] == claim.sentence]))
    elif isinstance(expected, Grows):
        outcomes = [_grows(expected, results.looks)]
    else:
        of_method = results.runs[results.runs["label"] == expected.method]
        outcome_of = _stable if isinstance(expected, Stable) else _collapses
        outcomes = [outcome_of(pair, of_method[of_method["pair"] == pair]) for pair in expected.pairs]
    holds = [outcome for outcome, _ in outcomes]
    if isinstance(expected, Ahead) and 2.0 ** (1 - _seeds(results.runs, expected)) >= LEVEL:
        return Judged(claim, TOO_FEW, [text for _, text in outcomes])
    verdict = REPRODUCED if all(holds) else CONDITIONAL if any(holds) else NOT_REPRODUCED
    if isinstance(expected, Collapses) and len(expected.pairs) > MOST_PAIRS:
        return Judged(claim, verdict, [_collapses_together(of_method[of_method["pair"].isin(expected.pairs)])])
    return Judged(claim, verdict, [text for _, text in outcomes])


def _seeds(runs: pd.DataFrame, expected: Ahead) -> int:
    """Seeds of a claim's runs: with n of them no p-value of the sign-flip test is below 2^(1 − n)."""
    return runs.loc[runs["pair"].isin(expected.pairs) & (runs["label"] == expected.first), "seed"].nunique()


def _ahead(table: pd.DataFrame) -> Iterator[tuple[bool, str]]:
    for row in table.itertuples():
        shown = row.adjusted_p < LEVEL
        word = "no difference shown" if not shown else "ahead" if row.difference > 0 else "behind"
        yield (
            shown and row.difference > 0,
            f"{row.pair}: {word}, {difference_text(row)}, {row.wins} of {row.seeds} seeds, p {p_text(row.adjusted_p)}",
        )


def _stable(pair: str, runs: pd.DataFrame) -> tuple[bool, str]:
    change = mean_interval((runs["test_accuracy"] - runs["accuracy_before"]).to_numpy())
    return not runs["collapsed"].any() and change.low > 0, _course(pair, runs)


def _collapses(pair: str, runs: pd.DataFrame) -> tuple[bool, str]:
    return 2 * int(runs["collapsed"].sum()) >= len(runs), _course(pair, runs)


def _grows(expected: Grows, looks: pd.DataFrame) -> tuple[bool, str]:
    start = looks[looks["step"] == 0]
    near, far = (
        start[start["pair"] == pair].groupby("seed")[expected.column].mean()
        for pair in (expected.pairs[0], expected.pairs[-1])
    )
    interval = mean_interval((far - near).to_numpy())
    text = (
        f"{expected.pairs[-1]} − {expected.pairs[0]}: {interval.mean:+.2g} {expected.unit} ({interval.low:+.2g} to "
        f"{interval.high:+.2g}), {interval.count} seeds"
    )
    return interval.low > 0, text


def _collapses_together(runs: pd.DataFrame) -> str:
    """Many pairs in one sentence, with those in which any seed collapsed."""
    collapsed = runs.groupby("pair")["collapsed"].agg(["sum", "size"])
    named = ", ".join(f"{pair} ({row['sum']} of {row['size']})" for pair, row in collapsed.iterrows() if row["sum"])
    after = 100 * runs.groupby("pair")["test_accuracy"].mean()
    return (
        f"{len(collapsed)} pairs: {runs['collapsed'].sum()} of {len(runs)} runs collapsed"
        f"{f', of {named}' if named else ''}; accuracy after the run {after.min():.0f} to {after.max():.0f} % "
        "(mean of a pair), below"
    )


def _course(pair: str, runs: pd.DataFrame) -> str:
    before, after = (100 * runs[column].mean() for column in ("accuracy_before", "test_accuracy"))
    return f"{pair}: {runs['collapsed'].sum()} of {len(runs)} seeds collapsed, accuracy {before:.0f} → {after:.0f} %"
