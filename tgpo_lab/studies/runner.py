"""Running the cells of a study in parallel processes, each result a file of its own.

A cell that is finished is never run again. Ctrl-C, a kill or a dead process lose nothing but the
cells in hand: the same command goes on with the rest.

On a GPU, processes share the one that the study was given. That has not been run yet; on a CPU it is tested.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..checkpoints import checkpoint_folders, read_state
from ..errors import InputError
from ..evaluation import evaluate
from ..files import held_folder, require_writable_folder, write_json
from ..loop.stopping import NonFiniteError
from ..metrics import read_rows
from ..models.pairs import load_model, load_pair
from ..precision import products_in
from ..provenance import provenance
from ..runs import CHECKPOINTS, METRICS_FILE
from ..sampling.engine import OwnEngine
from ..tasks.prompts import load_prompts
from ..trackers import tracking_accelerator
from ..training import train
from .looks import LOOKS
from .plan import Cell, Study, measured_dials, pair_digest

CELLS, WORKING = "cells", "working"
CPU = torch.device("cpu")


def run_study(
    study: Study,
    output: Path,
    pairs_folder: Path,
    processes: int,
    done: frozenset[str],
    device: torch.device = CPU,
) -> bool:
    """Run all cells of a study that are not finished yet.

    Args:
        study: what to run.
        output: folder of the study; each cell becomes ``output/cells/NAME.json``.
        pairs_folder: where pairs that are not shipped have been built.
        processes: runs at the same time; on a CPU each computes on one thread, on a GPU they share it and its memory.
        done: fingerprints of cells that are finished elsewhere.
        device: where all of them compute.

    Returns:
        Whether all cells are finished.

    Raises:
        InputError: a folder that cannot be written, a pair that is not built, or a process that died.
    """
    require_writable_folder(output)
    cells = [cell for cell in study.cells() if cell.fingerprint not in done and not is_finished(cell, output)]
    for cell in cells:  # before the first hour of training, not after it
        cell.config(output, pairs_folder)
    console = Console(highlight=False, markup=False)
    console.print(f"{study.name}: {len(study.cells())} runs, {len(cells)} of them to do, {processes} at a time.")
    if not cells:
        return True
    # Fresh processes: a forked one would inherit threads that are not there any more.
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_prepare_process, initargs=(device,)
    )
    waiting: dict[Future[bool], Cell] = {}
    # Two studies in one folder would run the same cells over each other.
    held_elsewhere = f"Another process is running this study in {output}. Wait for it to end, or give another output."
    try:
        with held_folder(output, held_elsewhere), _Display(console, study.name, len(cells)) as display:
            todo = iter(cells)
            while True:
                # Never more than can run: what the pool has taken in, it finishes even after a stop.
                for cell in itertools.islice(todo, processes - len(waiting)):
                    waiting[executor.submit(run_cell, cell, output, pairs_folder)] = cell
                if not waiting:
                    return True
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    cell = waiting.pop(future)
                    if not future.result():
                        raise KeyboardInterrupt
                    display.finished(cell)
    except KeyboardInterrupt:
        console.print(
            f"{study.name} is stopping. Finished runs are kept; the same command goes on with the others.",
            soft_wrap=True,
        )
        return False
    except BrokenExecutor as error:
        raise InputError(
            f"A process of the study died, perhaps for lack of memory ({error}). Finished runs are kept in {output}: "
            "start the same command again, with fewer --processes if memory is short."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def is_finished(cell: Cell, output: Path) -> bool:
    """Whether the cell's result is in ``output``, and was made under the same configuration."""
    try:
        return json.loads(result_file(cell, output).read_text())["fingerprint"] == cell.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def result_file(cell: Cell, output: Path) -> Path:
    """Where a cell's result stands."""
    return output / CELLS / f"{cell.name}.json"


def run_cell(cell: Cell, output: Path, pairs_folder: Path) -> bool:
    """Train one cell, evaluate its student on the test prompts, and write the result.

    All of it happens on the device that training takes: see :func:`_prepare_process`. A run whose numbers stop being
    finite is a result, too: it is stored with what it measured until then.

    Returns:
        False if the run was asked to stop before its end; then nothing is written.
    """
    device = tracking_accelerator(output, ()).device  # the one that training takes
    # Of this process alone: the machine may have other work. That is no time of a GPU's.
    seconds = time.process_time if device.type == "cpu" else time.perf_counter
    start = seconds()
    working = output / WORKING / cell.name
    shutil.rmtree(working, ignore_errors=True)  # what a kill has left: a cell is short and starts anew
    config = cell.config(working, pairs_folder)
    failure = tested = None
    looks: list[dict] = []
    try:
        result = train(config, show_progress=False)
        if not result.completed:
            return False
        pair = load_pair(
            config.student, config.teacher, device=device, prompt_format=config.prompt_format, **config.position_options
        )
        prompts = load_prompts(config.dataset or pair.prompts, **config.prompt_options)["test"]
        with products_in(config.precision, device):  # as in the run
            tested = evaluate(
                pair, result.student, prompts=prompts, temperature=config.evaluation_temperature, seed=config.seed,
                max_new_tokens=config.max_new_tokens, reward=config.reward,
                engine=OwnEngine(result.student, rows_at_once=config.sampling_rows),
            )  # fmt: skip
        for checkpoint in checkpoint_folders(working / CHECKPOINTS) if cell.look else []:
            pair.student = load_model(checkpoint, torch.float32, device)
            frame = LOOKS[cell.look](pair, prompts, config)
            frame.insert(0, "step", read_state(checkpoint).step)
            looks += frame.to_dict("records")
    except NonFiniteError as error:
        failure = str(error).split(" No update")[0]
    target = result_file(cell, output)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "cell": cell.name,
        "pair": cell.pair,
        "label": cell.variant.label,
        "seed": cell.seed,
        "fingerprint": cell.fingerprint,
        "config": {**config.as_dict(), "student": cell.pair, "teacher": None, "dataset": None, "output": ""},
        "dials": measured_dials(cell.pair, pairs_folder),
        "pair_digest": pair_digest(cell.pair, pairs_folder),
        "failure": failure,
        "test_accuracy": None if tested is None else tested.accuracy,
        "test_length": None if tested is None else tested.length,
        "seconds": seconds() - start,
        "steps": read_rows(working / METRICS_FILE),
        "looks": looks,
        "made_by": provenance(device),
    }
    write_json(target, content)
    shutil.rmtree(working, ignore_errors=True)
    return True


def _prepare_process(device: torch.device) -> None:
    """One thread for each run, on ``device``; and no run goes on after the study itself was killed."""
    torch.set_num_threads(1)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # training takes a GPU by itself where there is one
    elif device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Display:
    """A bar with the time left; on a stream that is no terminal, a line for every twentieth of the runs."""

    def __init__(self, console: Console, title: str, total: int):
        self._console, self._title, self._total, self._count = console, title, total, 0
        self._start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[last]}"))  # fmt: skip
        # Runs take minutes: the default estimate looks only at the last 30 seconds.
        self._bar = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600, expand=False
        )
        self._task = self._bar.add_task(title, total=total, last="")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def finished(self, cell: Cell) -> None:
        """Show that one more run is finished."""
        self._count += 1
        self._bar.update(self._task, completed=self._count, last=cell.name)
        if not self._console.is_terminal and (
            self._count * 20 // self._total > (self._count - 1) * 20 // self._total or self._count == self._total
        ):
            elapsed = time.perf_counter() - self._start
            left = elapsed / self._count * (self._total - self._count)
            print(
                f"{self._title}  {self._count}/{self._total} runs  {elapsed / 60:.0f} min, {left / 60:.0f} min left",
                flush=True,
            )
