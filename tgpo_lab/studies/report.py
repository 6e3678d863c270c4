"""What a study says: its tables and figures as one page of Markdown, from the stored results alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..files import require_writable_folder
from . import figures, tables
from .results import StudyResults
from .sections import ALONE, SECTIONS, Content
from .settings import MAIN_METHODS

LINES = 7


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
    sections, drawn = SECTIONS[name](results) if name in SECTIONS else ([], {})
    if name not in ALONE:
        general_sections, general_figures = _general(results)
        sections, drawn = [*sections, *general_sections], {**drawn, **general_figures}
    text = [f"## {name}", results.about["question"], _runs_sentence(results)]
    for heading, section in sections:
        text.append(f"### {heading}\n\n{section}".rstrip())
    for figure_name in drawn:
        text.append(f"![{figure_name.replace('-', ' ')}]({figures_path}/{figure_name}.png)")
    return Page("\n\n".join(text) + "\n", drawn)


def _runs_sentence(results: StudyResults) -> str:
    about = results.about
    machines = [
        f"torch {made_by['versions']['torch']}, transformers {made_by['versions']['transformers']}, {made_by['device']}"
        for made_by in about["made_by"]
    ]
    settings = about["settings"]
    size = " × ".join(f"{settings[key]} {name}" for key, name in
                      (("steps", "steps"), ("prompts_per_step", "prompts")) if key in settings)  # fmt: skip
    rates = {json.loads(config).get("learning_rate") for config in results.runs["config"]}
    rate = f" Learning rate {rates.pop():g}." if len(rates) == 1 and None not in rates else ""
    on_processors = all(made_by["device"] == "CPU" for made_by in about["made_by"])
    taken = (
        "of one core in all, on two cores half of that" if on_processors else "in all, of each run one after another"
    )
    seeds = about["seeds"]
    text = (
        f"{about['runs_finished']} of {about['runs_planned']} runs, "
        f"{f'seed {seeds[0]}' if len(seeds) == 1 else f'seeds {seeds[0]} to {seeds[-1]}'}, "
        f"{about['run_minutes']:.0f} minutes {taken}. "
        f"A run: {size} × 8 samples{', in bfloat16' if settings.get('precision') == 'bfloat16' else ''}.{rate} "
        f"{'' if about['study'] in ALONE else 'Intervals are over these seeds, on one built pair each. '}"
        f"`tgpo-lab study {about['study']}`, "
        f"{'; '.join(dict.fromkeys(machines))}."
    )
    return text if about["runs_finished"] == about["runs_planned"] else text + " **The study is not complete.**"


def _general(results: StudyResults) -> Content:
    runs, name = results.runs, results.about["study"]
    labels = list(dict.fromkeys(runs["label"]))  # in alphabetical order, as stored
    sections = [("Means over seeds", _TABLE_NOTE + tables.markdown(tables.summary(runs)))]
    if same := _same_runs(runs):
        sections.append(("The same run under several names", _SAME_NOTE + "\n".join(f"- {text}" for text in same)))
    for reference in results.about["references"]:
        compared = tables.comparison(runs, reference) if reference in labels else pd.DataFrame()
        if len(compared):
            note = _TEST_NOTE.format(smallest=tables.p_text(2.0 ** (1 - runs["seed"].nunique())))
            sections.append((f"{reference} against each, seed by seed", note + tables.markdown(compared)))
    drawn = {
        f"{name}-ranking": figures.ranking(runs),
        f"{name}-accuracy": figures.curves(results.steps, _shown(runs, results.about["references"])),
    }
    return sections, drawn


def _shown(runs: pd.DataFrame, references: list[str]) -> list[str]:
    """As many labels as a figure bears: the main methods, or the references and those with the largest area. The main
    methods stand in one order, so that they look alike in all figures."""
    by_area = runs.groupby("label")["area"].mean().sort_values(ascending=False)
    first = [label for label in (*MAIN_METHODS, *references) if label in by_area]
    return list(dict.fromkeys([*first, *by_area.index]))[:LINES]


def _same_runs(runs: pd.DataFrame) -> list[str]:
    """Methods on pairs whose every seed gave the same numbers, to the last digit. Two accuracies alone can be alike by
    chance where a student has learned nothing."""
    values = ["area", "test_accuracy", "largest_gradient_norm"]
    wide = runs.pivot(index=["pair", "label"], columns="seed", values=values)
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for (pair, label), values in wide.iterrows():
        groups.setdefault(tuple(values), []).append((pair, label))
    texts = []
    for group in groups.values():
        pairs, labels = ({entry[place] for entry in group} for place in (0, 1))
        if len(group) > 1:
            texts.append(
                f"{', '.join(sorted(labels))} on {', '.join(sorted(pairs))}"
                if len(labels) == 1 or len(pairs) == 1
                else ", ".join(f"{label} on {pair}" for pair, label in group)
            )
    return texts


_TABLE_NOTE = (
    "Test accuracy: of responses sampled at temperature 1 to the test prompts, after the run. Area: mean of held-out "
    "accuracy, sampled likewise, over the run. In brackets 95 % intervals (Student's t) over seeds. Steps: median over "
    "seeds. The last three: medians.\n\n"
)
_SAME_NOTE = (
    "These agree in area, test accuracy and largest gradient norm of every seed, so they are one piece of evidence and "
    "not several; the corrections below count each.\n\n"
)
_TEST_NOTE = (
    "Difference of areas, with 95 % intervals (Student's t); exact sign-flip test over seeds, corrected by Benjamini "
    "and Hochberg over the table. With these seeds no p-value can be below {smallest}. Effect: Cohen's d_z of the "
    "paired differences.\n\n"
)
