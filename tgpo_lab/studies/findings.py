"""``docs/findings.md``: everything that the stored studies say, on one page. Written by

    tgpo-lab study findings

and never by hand: a test makes the page again and compares.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from ..files import write_text
from ..tiny_world.building import number_of_weights
from .catalog import STUDIES, known_recipes
from .claims import claims_table
from .report import Page, study_page
from .results import RESULTS, StudyResults, load_results
from .summary import with_summary

HEAD = """\
# Findings

What the studies of tgpo_lab have measured. This page is made by `tgpo-lab study findings` from what is stored in
`data/results`: every result on it, in tables and figures, comes from there. `tgpo-lab study NAME` runs a study, and
goes on with one that is not complete.

All of it is about tiny models that add up numbers ([how the pairs came about](../README.md#pairs)). It says what
happens there, not what happens with large models. {scale}

*Collapsed* means: held-out accuracy had been 20 % or more and ended at half of its largest value or below; or half of
the last responses ran into the token limit; or numbers stopped being finite. A student that starts at 3 % and never
rises cannot lose accuracy in this sense. One configuration in two studies gives the same numbers only while the code
rounds alike: it changed while *headline* ran, so TGPO on *far* there and in *conditioning* are two runs of one thing.
"""

CLAIMS_HEAD = """\
## The paper's claims

What is claimed in [arXiv 2605.13230](https://arxiv.org/abs/2605.13230) about models of billions of weights, and whether
the same is seen here. Verdicts follow from rules ([claims.py](../tgpo_lab/studies/claims.py)): the difference of
accuracies on the test prompts after the run unless a row says otherwise, in brackets its 95 % interval; ahead or behind
where the exact sign-flip test over seeds, corrected over this whole table, gives less than 0.05. A claim that holds on
some of its pairs only is reproduced only under a condition: on those. With fewer than six seeds no such test can show
anything. Rules and claims were written down before their studies' results were read, but for what a reader asked for
afterwards: the rows on longer runs against reverse KL and GRPO, on the second moment, on area, on tokens and to the end
of annealing, and more pairs in the row on other teachers.

Keep in mind what *far* is: it was designed, on one seed, until TGPO learned there in these steps and reverse KL did
not.

"""


def findings_page(results_folder: Path = RESULTS) -> Page:
    """All studies that are stored, in the order of the catalog."""
    stored = {name: load_results(name, results_folder) for name in STUDIES if (results_folder / name).exists()}
    pages = [study_page(results, "figures") for results in stored.values()]
    drawn = {name: figure for page in pages for name, figure in page.figures.items()}
    head = HEAD.format(scale=_scale(stored))
    return Page("\n".join([head, CLAIMS_HEAD + claims_table(results_folder), *(page.text for page in pages)]), drawn)


def _scale(stored: Mapping[str, StudyResults]) -> str:
    """On which machines the stored studies have been run, and how many weights their students have."""
    devices = {made_by["device"] for results in stored.values() for made_by in results.about["made_by"]} - {"CPU"}
    where = f"Some runs were made on {', '.join(sorted(devices))}." if devices else "No study has been run on a GPU."
    recipes = known_recipes()
    weights = functools.cache(lambda student: number_of_weights(student) / 1e6)
    studies: dict[str, list[str]] = {}
    for name, results in stored.items():
        largest = max((weights(recipes[pair].student) for pair in results.runs["pair"] if pair in recipes), default=0)
        studies.setdefault(f"{largest:.2g} million", []).append(name)
    (usual, _), *others = sorted(studies.items(), key=lambda item: -len(item[1])) or [("", [])]
    text = f"{where} Students have {usual} weights" if usual else where
    return text + "".join(f", in {_listed(names)} {size}" for size, names in others) + ("." if usual else "")


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def write_findings(folder: Path, results_folder: Path = RESULTS, readme: Path | None = None) -> Path:
    """Write ``findings.md`` and its ``figures`` into a folder.

    Args:
        folder: where to.
        results_folder: where the results are stored.
        readme: a README whose sentences on the findings are made anew as well.

    Raises:
        InputError: the folder cannot be written, or the README lacks the places for its sentences.
    """
    if readme is not None:
        write_text(readme, with_summary(readme.read_text(encoding="utf-8"), results_folder))
    page = findings_page(results_folder)
    page.write_figures(folder / "figures")
    for file in (folder / "figures").glob("*.png"):
        if file.stem not in page.figures:
            file.unlink()
    write_text(folder / "findings.md", page.text)
    return folder / "findings.md"
