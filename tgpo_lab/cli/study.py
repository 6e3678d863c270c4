"""``tgpo-lab study``: run a named study, or make its tables and figures from what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..errors import InputError
from ..files import require_writable_folder, write_text
from ..parallel.placement import require_device, usual_device
from ..studies.catalog import STUDIES, make_study
from ..studies.findings import write_findings
from ..studies.report import study_page
from ..studies.results import RESULTS, finished_fingerprints, gather, load_results
from ..studies.runner import is_finished, run_study
from ..tiny_world.building import build_and_measure

RUNS, PAIRS = Path("runs/studies"), Path("runs/pairs")


def study_command(arguments: list[str]) -> int:
    """Run a study, or report on one."""
    commands = {"list": list_studies, "report": report, "findings": findings}
    if arguments and arguments[0] in commands:
        return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="tgpo-lab study")
    return tyro.cli(run, args=arguments, prog="tgpo-lab study")


def list_studies() -> int:
    """List the studies."""
    for name, make in STUDIES.items():
        print(f"{name:14} {(make.__doc__ or '').strip()}")
    return 0


def run(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    processes: int = 2,
    device: str | None = None,
    output: Path = RUNS,
    pairs: Path = PAIRS,
    results: Path = RESULTS,
    discard_old: bool = False,
) -> int:
    """Run a named study: methods × pairs × options × seeds. Finished runs are never repeated, so a study that was
    stopped or killed goes on with the same command. `tgpo-lab study list` names the studies, `tgpo-lab study report
    NAME` makes tables and figures from the stored runs.

    Args:
        name: The study.
        processes: Runs at the same time, each on one thread; on a GPU they share it and its memory.
        device: Where runs compute and pairs are built, such as cuda:1 or cpu; left out, on a GPU if there is one.
        output: Folder for the runs.
        pairs: Folder in which pairs that are not shipped are built, or have been.
        results: Folder in which finished runs are put together as Parquet tables.
        discard_old: Drop stored runs that are not of the study as it is now.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, but is {processes}.")
    where = require_device(device or usual_device())
    study = make_study(name, results)
    require_writable_folder(results)  # before the first hour of training, not after it
    done = finished_fingerprints(name, results)
    torch.set_num_threads(1)  # another number of threads rounds differently, and gives other weights
    needed = {c.pair for c in study.cells() if c.fingerprint not in done and not is_finished(c, output / name)}
    for pair, recipe in study.recipes.items():
        if pair in needed and not (pairs / "pairs" / pair / "card.json").exists():
            print(f"Building the pair {pair} …", flush=True)
            build_and_measure(pair, recipe, pairs, where)
    completed = run_study(study, output / name, pairs, processes, done, where)
    stored = gather(study, output / name, results, discard_old=discard_old)
    print(
        f"{len(stored.runs)} of {len(study.cells())} runs are stored in {results / name}. "
        f"Next: tgpo-lab study report {name}, or tgpo-lab study findings for the page on all studies."
    )
    return 0 if completed else 130


def report(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    output: Path = Path("runs/reports"),
    results: Path = RESULTS,
) -> int:
    """Make a study's tables and figures from the stored runs alone; nothing is trained.

    Args:
        name: The study.
        output: Folder for the page and its figures.
        results: Folder with stored results.
    """
    if name not in STUDIES:
        raise InputError(f"Unknown study {name!r}: choose one of {', '.join(STUDIES)}.")
    page = study_page(load_results(name, results), "figures")
    page.write_figures(output / "figures")
    write_text(output / f"{name}.md", page.text)
    print(page.text)
    print(f"Written to {output / name}.md, with {len(page.figures)} figures.")
    return 0


def findings(output: Path = Path("docs"), results: Path = RESULTS, readme: Path | None = Path("README.md")) -> int:
    """Write findings.md: the tables and figures of all stored studies on one page, and a summary in the README.

    Args:
        output: Folder for the page and its figures.
        results: Folder with stored results.
        readme: The README; None to leave it alone.
    """
    if readme is not None and not readme.exists():
        raise InputError(f"There is no {readme}. Give --readme with its path, or --readme None.")
    print(f"Written: {write_findings(output, results, readme)}")
    return 0
