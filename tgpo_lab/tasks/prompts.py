"""Prompts with known answers, as ``datasets`` splits that do not overlap."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ..errors import InputError
from ..files import require_name
from .prompt_columns import PromptColumns


def load_prompts(
    source: str | Path,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    *,
    answer_after: str | None = None,
    dataset_config: str | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
) -> DatasetDict:
    """Load prompts and answers.

    Args:
        source: a folder with a file for each split (``train.jsonl``, ``test.parquet``, or parts as on the hub:
            ``train-00000-of-00002.parquet``), in itself or in its folders ``data`` or ``dataset_config``; one .jsonl
            or .parquet file (taken as train); or the name of a dataset on the Hugging Face hub.
        prompt_column: name of the column with the prompt text.
        answer_column: name of the column with the answer text.
        answer_after: the answer is what stands after the last such mark; None for the whole text.
        dataset_config: which configuration of a dataset that has several ("main" of openai/gsm8k).
        train_split: name of its split to train on.
        validation_split: name of the split to hold out, if there is one.

    Returns:
        Splits ``train`` and, if there are any, ``validation`` and ``test`` with the columns ``prompt`` and
        ``answer``, both text.

    Raises:
        InputError: nothing there, a malformed or empty file, a missing column, a prompt in two splits.
    """
    if not str(source):
        raise InputError("The dataset's name is empty. Give a folder with train.jsonl, a .jsonl file, or a hub name.")
    path = Path(source)
    columns = PromptColumns(prompt_column, answer_column, answer_after)
    if train_split == validation_split:
        raise InputError(
            f"train_split and validation_split are both {train_split!r}: what is trained on cannot be held out."
        )
    names = {"train": train_split, "validation": validation_split}
    if "test" not in names.values():
        names["test"] = "test"
    require_name(path)
    if path.is_dir():
        splits = _from_folder(path, names, dataset_config, columns)
    elif path.exists():
        splits = DatasetDict({"train": _read([path], columns)})
    elif path.suffix in {".jsonl", ".json", ".parquet"} or str(source).startswith((".", "/")):
        raise InputError(f"There is no prompt file or folder {path}. Give an existing one.")
    else:
        splits = _from_hub(str(source), names, dataset_config, columns)
    _refuse_overlap(splits, source)
    return splits


def training_and_held_out(splits: DatasetDict, count: int, source: str | Path) -> tuple[Dataset, Dataset]:
    """Training prompts and ``count`` held-out ones; without a validation split, the last of the training prompts.

    A prompt that stands there several times is held out once, and none of its rows is trained on.

    Raises:
        InputError: no validation split, and too few prompts to hold some out.
    """
    if "validation" in splits:
        held_out = splits["validation"]
        return splits["train"], held_out.select(range(min(count, len(held_out))))
    rows = splits["train"]
    prompts = list(rows["prompt"])
    last = {prompt: number for number, prompt in enumerate(prompts)}  # the last row of each
    if len(last) < 2 * count:
        raise InputError(
            f"{source} has no validation split, and its {len(last)} prompts are too few to hold out "
            f"{count} of them. Add a validation.jsonl or lower evaluation_prompts."
        )
    held_out = sorted(last.values())[-count:]
    kept_out = {prompts[number] for number in held_out}
    trained = [number for number, prompt in enumerate(prompts) if prompt not in kept_out]
    return rows.select(trained), rows.select(held_out)


def known_answers(splits: DatasetDict) -> dict[str, str]:
    """Prompt → right answer over all splits, held-out prompts first."""
    order = sorted(splits, key=lambda name: ({"test": 0, "validation": 1}.get(name, 2), name))
    return {row["prompt"]: row["answer"] for name in order for row in splits[name]}


def _from_folder(path: Path, names: dict[str, str], config: str | None, columns: PromptColumns) -> DatasetDict:
    folders = [path / config] if config is not None else [path, path / "data"]
    found: dict[str, list[Path]] = {}
    for split, name in names.items():
        for folder in folders:
            whole = [f for ending in ("jsonl", "parquet") if (f := folder / f"{name}.{ending}").is_file()]
            parts = sorted(folder.glob(f"{name}-*-of-*.parquet"))
            if (whole or parts) and split not in found:
                found[split] = whole[:1] or parts
    if "train" not in found:
        # A file with the split's name is what anyone would make by hand.
        raise InputError(
            f"{folders[0]} has no {names['train']}.jsonl and no {names['train']}.parquet. Put one JSON object a line "
            f"there, with {(columns.prompt, columns.answer)}, or name the split with train_split."
        )
    return DatasetDict({split: _read(files, columns) for split, files in found.items()})


def _read(files: list[Path], columns: PromptColumns) -> Dataset:
    rows = [row for file in files for row in (_parquet if file.suffix == ".parquet" else _jsonl)(file, columns)]
    if not rows:
        raise InputError(
            f"{files[0]} has no prompts. Expected rows (in .jsonl, one JSON object a line) with "
            f"{(columns.prompt, columns.answer)}."
        )
    return Dataset.from_list(rows)


def _jsonl(file: Path, columns: PromptColumns) -> list[dict[str, str]]:
    rows = []
    number = 1
    with file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(columns.row(json.loads(line.decode("utf-8")), f"{file}, line {number}"))
                    rows[-1]["prompt"].encode(), rows[-1]["answer"].encode()
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}, line {number}: not a JSON object ({error}). Expected one like "
                f'{{"{columns.prompt}": "47+85=", "{columns.answer}": "132"}} on each line.'
            ) from error
    return rows


def _parquet(file: Path, columns: PromptColumns) -> list[dict[str, str]]:
    try:
        rows = Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:  # the reader raises many kinds; to the user they are one
        raise InputError(f"{file} is no Parquet file that can be read ({type(error).__name__}).") from error
    return _checked(rows, columns, str(file))


def _from_hub(name: str, names: dict[str, str], config: str | None, columns: PromptColumns) -> DatasetDict:
    try:
        loaded = load_dataset(name, config)
    except Exception as error:  # the hub raises many kinds; to the user they are one
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"{name!r} is neither an existing file or folder nor a dataset that could be loaded from the hub "
            f"({type(error).__name__}: {reason}). Give a folder with train.jsonl, or check the name, dataset_config "
            "and the network."
        ) from error
    if names["train"] not in loaded:
        raise InputError(f"{name} has no split {names['train']!r}: set train_split to one of {', '.join(loaded)}.")
    return DatasetDict(
        {
            split: Dataset.from_list(_checked(loaded[own], columns, f"{name}, {own}"))
            for split, own in names.items()
            if own in loaded
        }
    )


def _checked(rows: Iterable[dict], columns: PromptColumns, source: str) -> list[dict[str, str]]:
    return [columns.row(row, f"{source}, row {number}") for number, row in enumerate(rows)]


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
