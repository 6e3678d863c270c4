"""Prompts with known answers, as ``datasets`` splits that do not overlap."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from .errors import InputError
from .files import require_name

SPLITS = ("train", "validation", "test")


def load_prompts(source: str | Path, prompt_column: str = "prompt", answer_column: str = "answer") -> DatasetDict:
    """Load prompts and answers.

    Args:
        source: a folder with ``train.jsonl`` and, if there are any, ``validation.jsonl`` and ``test.jsonl``;
            one ``.jsonl`` file (taken as train); or the name of a dataset on the Hugging Face hub.
        prompt_column: name of the column with the prompt text.
        answer_column: name of the column with the answer text.

    Returns:
        Splits with the columns ``prompt`` and ``answer``, both text.

    Raises:
        InputError: nothing there, a malformed or empty file, a missing column, a prompt in two splits.
    """
    path = Path(source)
    columns = (prompt_column, answer_column)
    require_name(path)
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if "train" not in files:
            raise InputError(f"{path} has no train.jsonl. Put one JSON object a line there, with {columns}.")
        splits = DatasetDict({split: _read_jsonl(file, columns) for split, file in files.items()})
    elif path.exists():
        splits = DatasetDict({"train": _read_jsonl(path, columns)})
    elif path.suffix in {".jsonl", ".json"} or str(source).startswith((".", "/")):
        raise InputError(f"There is no prompt file or folder {path}. Give an existing one.")
    else:
        splits = _from_hub(str(source), columns)
    _refuse_overlap(splits, source)
    return splits


def training_and_held_out(splits: DatasetDict, count: int, source: str | Path) -> tuple[Dataset, Dataset]:
    """Training prompts and ``count`` held-out ones; without a validation split, the last of the training prompts.

    Raises:
        InputError: no validation split, and too few prompts to hold some out.
    """
    if "validation" in splits:
        held_out = splits["validation"]
        return splits["train"], held_out.select(range(min(count, len(held_out))))
    rows = splits["train"]
    if len(rows) < 2 * count:
        raise InputError(
            f"{source} has no validation split, and its {len(rows)} prompts are too few to hold out "
            f"{count} of them. Add a validation.jsonl or lower evaluation_prompts."
        )
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))


def known_answers(splits: DatasetDict) -> dict[str, str]:
    """Prompt → right answer over all splits, held-out prompts first."""
    order = sorted(splits, key=lambda name: ({"test": 0, "validation": 1}.get(name, 2), name))
    return {row["prompt"]: row["answer"] for name in order for row in splits[name]}


def _read_jsonl(file: Path, columns: tuple[str, str]) -> Dataset:
    rows = []
    number = 1
    with file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_check_row(json.loads(line.decode("utf-8")), columns, f"{file}, line {number}"))
                    rows[-1]["prompt"].encode(), rows[-1]["answer"].encode()
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}, line {number}: not a JSON object ({error}). Expected one like "
                f'{{"{columns[0]}": "47+85=", "{columns[1]}": "132"}} on each line.'
            ) from error
    if not rows:
        raise InputError(f"{file} has no prompts. Expected one JSON object a line, with {columns}.")
    return Dataset.from_list(rows)


def _check_row(row: object, columns: tuple[str, str], place: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object with the keys {columns}, but found {type(row).__name__}.")
    for column in columns:
        value = row.get(column)
        if not isinstance(value, (str, int)) or isinstance(value, bool) or str(value).strip() == "":
            found = f"{column}={value!r}" if column in row else f"the keys {sorted(row)}"
            raise InputError(f"{place}: expected text under the key {column!r}, but found {found}.")
    return {"prompt": str(row[columns[0]]), "answer": str(row[columns[1]])}


def _from_hub(name: str, columns: tuple[str, str]) -> DatasetDict:
    try:
        loaded = load_dataset(name)
    except Exception as error:  # the hub raises many kinds; to the user they are one
        raise InputError(
            f"{name!r} is neither an existing file or folder nor a dataset that could be loaded from the hub "
            f"({type(error).__name__}). Give a folder with train.jsonl, or check the name and the network."
        ) from error
    return DatasetDict(
        {
            split: Dataset.from_list(
                [_check_row(row, columns, f"{name}, {split}, row {i}") for i, row in enumerate(rows)]
            )
            for split, rows in loaded.items()
        }
    )


def _refuse_overlap(splits: DatasetDict, source: str | Path) -> None:
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        for prompt in set(rows["prompt"]):
            if prompt in seen:
                raise InputError(
                    f"{source}: the prompt {prompt!r} stands in {seen[prompt]} and in {split}. "
                    "Remove it from one of them: what is trained on cannot be held out."
                )
            seen[prompt] = split
