"""How long each learner's notebook runs, one after the other on a machine with nothing else to do.

    python benchmarks/notebooks.py

Writes benchmarks/results/notebooks.json. Times are what README.md and the notebooks' heads are checked against.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bad_input import run_script

from tgpo_lab.classroom import learner_notebook, notebook_sources, run_notebook
from tgpo_lab.files import write_json
from tgpo_lab.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """Run every learner's notebook and write how long each takes. There are no options."""


def main(options: Options) -> None:
    """Run all notebooks and write their times."""
    seconds = {}
    for source in notebook_sources(ROOT / "notebooks"):
        start = time.perf_counter()
        run_notebook(learner_notebook(source), ROOT / "notebooks")
        seconds[source.stem] = round(time.perf_counter() - start, 1)
        print(f"{source.stem:34}{seconds[source.stem]:7.1f} s", flush=True)
    print(f"{'all':34}{sum(seconds.values()):7.1f} s")
    write_json(ROOT / "benchmarks" / "results" / "notebooks.json", {"seconds": seconds, "made_by": provenance()})


if __name__ == "__main__":
    run_script(main, Options)
