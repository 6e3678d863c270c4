"""What a study says: its tables and figures as one page of Markdown, from the stored results alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..files import require_writable_folder
from . import figures, tables
from .results import StudyResults

REFERENCE = "tgpo"
MAIN_METHODS = ("rkl", "grpo", "kdrl", "luffy", "sft", "tgpo")


@dataclass(frozen=True)
class Page:
    """A study's page: Markdown, and the figures that it shows by name."""

    text: str
    figures: dict[str, Figure]

    def write_figures(self, folder: Path) -> None:
        """Write the figures as PNG.

        Raises:
            InputError: the folder cannot be written.
        """
        require_writable_folder(folder)
        for name, figure in self.figures.items():
            # Without the version of matplotlib in the file, the same figure is the same bytes.
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


def study_page(results: StudyResults, figures_path: str) -> Page:
    """The page of a study.

    Args:
        results: what is stored of it.
        figures_path: where the page finds its figures, relative to itself.
    """
    name = results.about["study"]
    sections, drawn = _CONTENT.get(name, _general)(results)
    text = [f"## {name}", results.about["question"], _runs_sentence(results.about)]
    for heading, section in sections:
        text.append(f"### {heading}\n\n{section}".rstrip())
    for figure_name in drawn:
        text.append(f"![{figure_name.replace('-', ' ')}]({figures_path}/{figure_name}.png)")
    return Page("\n\n".join(text) + "\n", drawn)


def _runs_sentence(about: dict) -> str:
    first = about["made_by"][0]
    versions = first["versions"]
    text = (
        f"{about['runs_finished']} of {about['runs_planned']} runs, seeds {about['seeds'][0]} to {about['seeds'][-1]}, "
        f"{about['run_minutes']:.0f} minutes of one thread in all; `tgpo-lab study {about['study']}`, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, {first['device']}."
    )
    return text if about["runs_finished"] == about["runs_planned"] else text + " **The study is not complete.**"


def _general(results: StudyResults) -> tuple[list[tuple[str, str]], dict[str, Figure]]:
    runs, name = results.runs, results.about["study"]
    labels = list(dict.fromkeys(runs["label"]))  # in alphabetical order, as stored
    sections = [("Means over seeds", _TABLE_NOTE + tables.markdown(tables.summary(runs)))]
    shared = runs.groupby("pair")["seed"].nunique().min()
    reference = REFERENCE if REFERENCE in labels else labels[0]
    if shared > 1 and len(labels) > 1:
        compared = tables.markdown(tables.comparison(_seeds_of_all(runs), reference))
        sections.append((f"{reference} against each, seed by seed", _TEST_NOTE + compared))
    shown = [label for label in MAIN_METHODS if label in labels] if len(labels) > 9 else labels
    drawn = {f"{name}-ranking": figures.ranking(runs), f"{name}-accuracy": figures.curves(results.steps, shown)}
    return sections, drawn


def _tuning(results: StudyResults) -> tuple[list[tuple[str, str]], dict[str, Figure]]:
    area = results.runs.groupby(["pair", "label"], sort=False)["area"].mean().unstack("pair")
    table = pd.DataFrame(
        {"configuration": area.index, **{pair: [f"{100 * x:.1f} %" for x in area[pair]] for pair in area}}
    )
    return [("Mean area", tables.markdown(table))], {}


def _map(results: StudyResults) -> tuple[list[tuple[str, str]], dict[str, Figure]]:
    sections, _ = _general(results)
    measured = {
        "divergence": results.runs["opening_logprob"].round(1),
        "reliability": results.runs["reliability"].round(2),
    }
    runs = results.runs.assign(**measured)
    area = runs.groupby(["label", "reliability", "divergence"])["area"].mean().unstack("divergence")
    area = area[sorted(area.columns, reverse=True)]
    names = {
        "index": "reliability of the teacher on student prefixes",
        "columns": "log-probability of the opening (nats)",
    }
    drawn = {}
    for label in dict.fromkeys(runs["label"]):
        table = area.loc[label].sort_index(ascending=False).rename_axis(**names)
        drawn[f"map-{label}"] = figures.heatmap(table, label, "mean held-out accuracy over the run")
    margin = (area.loc["tgpo"] - area.loc["rkl"]).sort_index(ascending=False).rename_axis(**names)
    drawn["map-tgpo-minus-rkl"] = figures.heatmap(margin, "tgpo − rkl", "difference of the means", diverging=True)
    return sections, drawn


def _seeds_of_all(runs: pd.DataFrame) -> pd.DataFrame:
    """Only the labels with at least two seeds on their pair: a study may be under way."""
    counts = runs.groupby(["pair", "label"])["seed"].transform("nunique")
    return runs[counts > 1]


_TABLE_NOTE = (
    "Test accuracy: greedy, 512 prompts, after the run. Area: mean of held-out accuracy over the run. In brackets 95 % "
    "bootstrap intervals over seeds. Steps: median over the seeds that got there. The last three: medians.\n\n"
)
_TEST_NOTE = (
    "Difference of areas, with 95 % bootstrap intervals; exact sign-flip test over seeds, corrected by Benjamini and "
    "Hochberg over the table. Effect: Cohen's d of the paired differences.\n\n"
)
_CONTENT: dict[str, Callable[[StudyResults], tuple[list[tuple[str, str]], dict[str, Figure]]]] = {
    "tuning": _tuning,
    "map": _map,
}
