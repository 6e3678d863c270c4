"""Keeping what a benchmark measured: a JSON file, and a table in README.md between two comments that bear its name."""

from __future__ import annotations

from pathlib import Path

from tgpo_lab.files import write_json, write_text

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).parent / "results"


def keep_results(result: object, table: str, output: Path, own_file: Path | None, table_name: str) -> None:
    """Write the numbers, print the table and, if they go to the benchmark's own file, put the table into README.md.

    Args:
        result: the numbers as plain values.
        table: they in Markdown.
        output: the JSON file.
        own_file: the benchmark's file in :data:`RESULTS`; None if these numbers are for no table.
        table_name: the table stands between ``<!-- table_name: start -->`` and ``<!-- table_name: end -->``.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print(table)
    if output == own_file:
        start, end = (f"<!-- {table_name}: {side} -->" for side in ("start", "end"))
        before, rest = README.read_text(encoding="utf-8").split(start)
        write_text(README, f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}")
