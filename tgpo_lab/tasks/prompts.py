"""Prompts with known answers, as ``datasets`` splits that do not overlap."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ..errors import InputError
from ..files import require_name
from ..progress_bars import no_bar_of_datasets
from .prompt_columns import PromptColumns

TRAIN, VALIDATION = "train", "validation"
"""Splits that are looked for where no others are named."""
PART = re.compile(r"-\d+-of-\d+$")
"""How the name of a part of a split ends."""


class PromptSplits(DatasetDict):
    """Splits with the columns ``prompt`` and ``answer``; one that cannot be used is refused when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Dataset]]):
        """Read the splits.

        Raises:
            InputError: a split that a run uses is malformed.
        """
        super().__init__()
        self._refused: dict[str, InputError] = {}
        for split, read in readers.items():
            try:
                self[split] = read()
            except InputError as error:
                self.refuse(split, error)

    def refuse(self, split: str, error: InputError) -> None:
        """Keep the error for who asks for ``test``, which training never does.

        Raises:
            InputError: it is another split.
        """
        if split != "test":
            raise error
        self.pop(split, None)
        self._refused[split] = error

    def __contains__(self, split: object) -> bool:
        return super().__contains__(split) or split in self._refused

    def __missing__(self, split: str) -> Dataset:
        raise self._refused.get(split) or InputError(f"There is no split {split!r}: choose one of {', '.join(self)}.")


def load_prompts(
    source: str | Path,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    *,
    answer_after: str | None = None,
    system_prompt: str | None = None,
    dataset_config: str | None = None,
    train_split: str = TRAIN,
    validation_split: str = VALIDATION,
) -> PromptSplits:
    """Load prompts and answers.

    Args:
        source: a folder with a file for each split (``train.jsonl``, ``test.parquet``, or parts as on the hub:
            ``train-00000-of-00002.parquet``), in itself or in its folders ``data`` or ``dataset_config``; one .jsonl
            or .parquet file (taken as train); or the name of a dataset on the Hugging Face hub.
        prompt_column: name of the column with the prompt: text, or messages of a chat with one turn of the user.
        answer_column: name of the column with the answer text. ``reward_model.ground_truth`` is the field
            ``ground_truth`` of the column ``reward_model``, for prompts likewise.
        answer_after: the answer is what stands after the last such mark; None for the whole text.
        system_prompt: the system message that the prompts' messages may begin with; None for none.
        dataset_config: which configuration of a dataset that has several ("main" of openai/gsm8k).
        train_split: name of its split to train on.
        validation_split: name of the split to hold out, if there is one.

    Returns:
        ``train`` and, if there are any, ``validation`` and ``test`` with the columns ``prompt`` and ``answer``, both
        text.

    Raises:
        InputError: nothing there, a malformed or empty file, a missing column, a prompt in two splits, an option that
            changes nothing. A ``test`` split that cannot be read, or holds what a run uses, is refused when it is asked
            for.
    """
    if not str(source):
        raise InputError("The dataset's name is empty. Give a folder with train.jsonl, a .jsonl file, or a hub name.")
    path = Path(source)
    columns = PromptColumns(prompt_column, answer_column, answer_after, system_prompt)
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
        _refuse_options_of_a_folder(path, train_split, validation_split, dataset_config)
        splits = PromptSplits({"train": lambda: _read([path], columns)})
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


def _from_folder(path: Path, names: dict[str, str], config: str | None, columns: PromptColumns) -> PromptSplits:
    folders = [path / config] if config is not None else [path, path / "data"]
    found: dict[str, list[Path]] = {}
    for split, name in names.items():
        if files := next(filter(None, (_files(folder, name) for folder in folders)), None):
            found[split] = files
    if "train" not in found:
        raise InputError(
            f"{folders[0]} has no {names['train']}.jsonl and no {names['train']}.parquet. "
            + _where_else(path, names["train"], config, columns)
        )
    if "validation" not in found:
        files = [file for folder in folders for kind in ("jsonl", "parquet") for file in folder.glob(f"*.{kind}")]
        _refuse_unknown_validation(path, names["validation"], {PART.sub("", file.stem) for file in files})
    return PromptSplits({split: partial(_read, files, columns) for split, files in found.items()})


def _files(folder: Path, name: str) -> list[Path]:
    """A split's file in a folder, or its parts; none if it is not there."""
    whole = [file for kind in ("jsonl", "parquet") if (file := folder / f"{name}.{kind}").is_file()]
    return whole[:1] or sorted(folder.glob(f"{name}-*-of-*.parquet"))


WRITTEN_BY_SAVE_TO_DISK = ("dataset_info.json", "dataset_dict.json")
"""Files that tell such a folder, of one split or of several."""


def _where_else(path: Path, name: str, config: str | None, columns: PromptColumns) -> str:
    """What to do where a folder has no training prompts."""
    if config is not None and (_files(path, name) or _files(path / "data", name)):
        return f"dataset_config is {config!r}, but {path} has such a file without it: leave dataset_config out."
    if having := sorted(folder.name for folder in path.iterdir() if folder.is_dir() and _files(folder, name)):
        return f"Such files are in {', '.join(having)} of {path}: name one as dataset_config."
    if any((path / file).is_file() for file in WRITTEN_BY_SAVE_TO_DISK):
        return (
            f"It was written by save_to_disk of datasets: read it with load_from_disk, and write each split with "
            f"to_parquet to {name}.parquet in a folder."
        )
    # A file with the split's name is what anyone would make by hand.
    return (
        f"Put one JSON object a line there, with {(columns.prompt, columns.answer)}, or name the split with "
        "train_split."
    )


def _refuse_unknown_validation(source: str | Path, name: str, known: Iterable[str]) -> None:
    """Refuse a name that was given and is not there; without the usual one, training prompts are held out."""
    if name != VALIDATION:
        raise InputError(
            f"{source} has no split {name!r}: set validation_split to one of {', '.join(sorted(known))}, or leave it "
            "out."
        )


def _refuse_options_of_a_folder(file: Path, train: str, validation: str, config: str | None) -> None:
    given = {
        "train_split": (train, TRAIN),
        "validation_split": (validation, VALIDATION),
        "dataset_config": (config, None),
    }
    if idle := next((name for name, (value, usual) in given.items() if value != usual), None):
        raise InputError(
            f"{file} is one file, all of it to train on, so {idle} {given[idle][0]!r} would change nothing. Leave "
            f"{idle} out, or give a folder."
        )


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
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors begin with a mark
                    rows.append(columns.row(json.loads(text), f"{file}, line {number}"))
                    rows[-1]["prompt"].encode(), rows[-1]["answer"].encode()
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}, line {number}: not a JSON object ({error}). Expected one like "
                f'{{"{columns.prompt}": "47+85=", "{columns.answer}": "132"}} on each line.'
            ) from error
    return rows


def _parquet(file: Path, columns: PromptColumns) -> list[dict[str, str]]:
    try:
        with no_bar_of_datasets():
            rows = Dataset.from_parquet(str(file), keep_in_memory=True)
    except Exception as error:  # the reader raises many kinds; to the user they are one
        raise InputError(
            f"{file} is no Parquet file that can be read ({type(error).__name__}). Write or copy it again, or give the "
            "prompts as .jsonl."
        ) from error
    return _checked(rows, columns, str(file))


def _from_hub(name: str, names: dict[str, str], config: str | None, columns: PromptColumns) -> PromptSplits:
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
    if names["validation"] not in loaded:
        _refuse_unknown_validation(name, names["validation"], loaded)

    def read(own: str) -> Dataset:
        return Dataset.from_list(_checked(loaded[own], columns, f"{name}, {own}"))

    return PromptSplits({split: partial(read, own) for split, own in names.items() if own in loaded})


def _checked(rows: Iterable[dict], columns: PromptColumns, source: str) -> list[dict[str, str]]:
    return [columns.row(row, f"{source}, row {number}") for number, row in enumerate(rows)]


def _refuse_overlap(splits: PromptSplits, source: str | Path) -> None:
    seen: dict[str, str] = {}
    for split in sorted(splits, key=lambda name: name == "test"):
        try:
            for prompt in set(splits[split]["prompt"]):
                if prompt in seen:
                    raise InputError(
                        f"{source}: the prompt {prompt!r} stands in {seen[prompt]} and in {split}. "
                        "Remove it from one of them: what is trained on cannot be held out."
                    )
        except InputError as error:
            splits.refuse(split, error)
        else:
            seen |= dict.fromkeys(splits[split]["prompt"], split)
