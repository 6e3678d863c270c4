"""Prompt files, the shipped ones included, and the order in which a run goes through them."""

import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import DATA
from tgpo_lab.randomness import derived_seed, generator_for, rows_of_step
from tgpo_lab.tasks import prompts
from tgpo_lab.tasks.prompts import load_prompts, training_and_held_out
from tgpo_lab.tasks.rewards import last_number
from tgpo_lab.tiny_world.arithmetic import AdditionTask, split_of
from tgpo_lab.tiny_world.building import write_prompts

SHIPPED = sorted((DATA / "prompts").glob("*/"))


def operands(prompt: str) -> tuple[int, ...]:
    assert re.fullmatch(r"[1-9][0-9]*(\+[1-9][0-9]*)+=", prompt)
    return tuple(int(x) for x in prompt[:-1].split("+"))


# ── The shipped prompts ──────────────────────────────────────────────────────────────────────────


def test_there_are_shipped_prompts():
    assert "addition-3x2" in [folder.name for folder in SHIPPED]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f.name)
def test_no_shipped_sum_stands_twice_in_any_order_of_its_operands(folder):
    splits = load_prompts(folder)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4096, "validation": 256, "test": 512}
    sums = {name: [tuple(sorted(operands(p))) for p in rows["prompt"]] for name, rows in splits.items()}
    everything = [problem for problems in sums.values() for problem in problems]
    assert len(set(everything)) == len(everything)
    for name, problems in sums.items():
        assert {split_of(problem) for problem in problems} == {name}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f.name)
def test_shipped_answers_are_right(folder):
    count, digits = map(int, re.fullmatch(r"addition-(\d)x(\d)", folder.name).groups())
    for rows in load_prompts(folder).values():
        for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
            numbers = operands(prompt)
            assert len(numbers) == count and all(len(str(x)) == digits for x in numbers)
            assert answer == str(sum(numbers))


def test_the_shipped_prompts_can_be_made_again(tmp_path):
    write_prompts(AdditionTask(operands=3, digits=2), tmp_path / "again")
    for split in ("train", "validation", "test"):
        again = (tmp_path / "again" / f"{split}.jsonl").read_bytes()
        assert again == (DATA / "prompts" / "addition-3x2" / f"{split}.jsonl").read_bytes()


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────


def write(file, *rows: dict) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_a_folder_gives_the_splits_that_it_has(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "b", "answer": "2"}, {"prompt": "a", "answer": "1"})
    assert set(load_prompts(tmp_path)) == {"train"}
    write(tmp_path / "test.jsonl", {"prompt": "c", "answer": "3"})
    write(tmp_path / "notes.jsonl", {"anything": 1})
    splits = load_prompts(tmp_path)
    assert {name: rows.to_list() for name, rows in splits.items()} == {
        "train": [{"prompt": "b", "answer": "2"}, {"prompt": "a", "answer": "1"}],  # in the order of the file
        "test": [{"prompt": "c", "answer": "3"}],
    }


def test_a_file_is_taken_as_training_prompts(tmp_path):
    file = tmp_path / "mine.jsonl"
    write(file, {"prompt": "Сколько будет 1+1?\n=", "answer": "две", "source": "me"}, {"prompt": "2+2=", "answer": 4})
    splits = load_prompts(str(file))
    assert {name: rows.to_list() for name, rows in splits.items()} == {
        "train": [{"prompt": "Сколько будет 1+1?\n=", "answer": "две"}, {"prompt": "2+2=", "answer": "4"}]
    }


def test_empty_lines_are_passed_over(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('\n{"prompt": "a", "answer": "1"}\n\n  \n{"prompt": "b", "answer": "2"}')
    assert load_prompts(file)["train"]["prompt"] == ["a", "b"]


def test_columns_can_have_other_names(tmp_path):
    file = tmp_path / "mine.jsonl"
    write(file, {"question": "1+1=", "solution": "2", "prompt": "no", "answer": "no"})
    rows = load_prompts(file, prompt_column="question", answer_column="solution")["train"]
    assert rows.to_list() == [{"prompt": "1+1=", "answer": "2"}]
    with pytest.raises(InputError, match=r"line 1.*'reply'"):
        load_prompts(file, prompt_column="question", answer_column="reply")


def test_the_same_prompt_twice_in_one_split_is_allowed_but_not_in_two(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "1"})
    write(tmp_path / "test.jsonl", {"prompt": "b", "answer": "1"})
    assert len(load_prompts(tmp_path)["train"]) == 2
    write(tmp_path / "validation.jsonl", {"prompt": "b", "answer": "2"})
    with pytest.raises(InputError, match=r"'b'.*validation.*test"):
        load_prompts(tmp_path)["test"]


def held_out_of(folder, prompts: str, count: int) -> tuple[list[str], list[str]]:
    """Prompts, one letter each, that are trained on and held out of a single split; answers are row numbers."""
    write(folder / "train.jsonl", *({"prompt": p, "answer": n} for n, p in enumerate(prompts)))
    parts = training_and_held_out(load_prompts(folder), count, folder)
    return tuple([row["prompt"] + row["answer"] for row in rows] for rows in parts)


def test_without_a_validation_split_the_last_prompts_are_held_out(tmp_path):
    assert held_out_of(tmp_path, "abcdef", 2) == (["a0", "b1", "c2", "d3"], ["e4", "f5"])


def test_no_prompt_that_is_held_out_stands_among_the_trained_ones(tmp_path):
    assert held_out_of(tmp_path, "abcdabcd", 2) == (["a0", "b1", "a4", "b5"], ["c6", "d7"])
    assert held_out_of(tmp_path, "abcdeccdd", 2) == (["a0", "b1", "e4"], ["c6", "d8"])
    with pytest.raises(InputError, match="its 4 prompts are too few to hold out 3"):
        held_out_of(tmp_path, "abcdabcd", 3)


# ── Datasets as on the hub, stood in for by local files ──────────────────────────────────────────

# The schema of openai/gsm8k: a configuration "main", splits train and test, parts in Parquet.
GSM8K = [
    {"question": f"Ann has {n} eggs and buys 1,000. How many?", "answer": f"{n}+1000={n + 1000}\n#### {n + 1000:,}"}
    for n in range(10)
]


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    Dataset.from_list(GSM8K[:4]).to_parquet(folder / "main" / "train-00000-of-00002.parquet")
    Dataset.from_list(GSM8K[4:8]).to_parquet(folder / "main" / "train-00001-of-00002.parquet")
    Dataset.from_list(GSM8K[8:]).to_parquet(folder / "main" / "test-00000-of-00001.parquet")
    return folder


GSM8K_COLUMNS = {"prompt_column": "question", "answer_column": "answer", "answer_after": "####"}


def test_a_dataset_with_the_schema_of_gsm8k(gsm8k):
    splits = load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="main")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "test": 2}
    expected = [{"prompt": row["question"], "answer": f"{n + 1000:,}"} for n, row in enumerate(GSM8K)]
    assert splits["train"].to_list() + splits["test"].to_list() == expected
    assert all(last_number(row["answer"], expected[n]["answer"]) == 1 for n, row in enumerate(GSM8K))
    with pytest.raises(InputError, match=r"other.* has no train\.jsonl and no train\.parquet"):
        load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="other")


def test_a_folder_of_configurations_says_which_there_are(gsm8k, tmp_path):
    with pytest.raises(
        InputError, match=r"gsm8k has no train\.jsonl .*Such files are in main .* one as dataset_config"
    ):
        load_prompts(gsm8k, **GSM8K_COLUMNS)
    with pytest.raises(InputError, match=r"gsm8k/other has no train\.jsonl .*Such files are in main "):
        load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="other")
    with pytest.raises(InputError, match=r"dataset_config is 'main', but .*main has .* leave dataset_config out"):
        load_prompts(gsm8k / "main", **GSM8K_COLUMNS, dataset_config="main")


def test_a_validation_split_that_is_named_has_to_be_there(gsm8k, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"gsm8k has no split 'dev': set validation_split to one of test, train, or"):
        load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="main", validation_split="dev")
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name, "answer": "1"})
    with pytest.raises(InputError, match=r"no split 'dev': set validation_split to one of train, validation, or leave"):
        load_prompts(tmp_path, validation_split="dev")
    rows = Dataset.from_list([{"prompt": "a", "answer": "1"}])
    monkeypatch.setattr(prompts, "load_dataset", lambda name, config: DatasetDict({"train": rows}))
    with pytest.raises(InputError, match=r"some/data has no split 'dev': set validation_split to one of train, or"):
        load_prompts("some/data", validation_split="dev")
    assert set(load_prompts("some/data")) == {"train"}


def test_a_test_split_with_other_columns_is_refused_when_it_is_asked_for_and_not_before(gsm8k):
    Dataset.from_list([{"id": 1, "question": "?"}]).to_parquet(gsm8k / "main" / "test-00000-of-00001.parquet")
    splits = load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="main")
    assert list(splits) == ["train"]
    training, held_out = training_and_held_out(splits, 2, gsm8k)
    assert (len(training), len(held_out)) == (6, 2)
    assert "test" in splits and "validation" not in splits
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet, row 0: .*'answer'.*'question'"):
        splits["test"]
    with pytest.raises(InputError, match=r"There is no split 'validation': choose one of train"):
        splits["validation"]
    (gsm8k / "main" / "train-00000-of-00002.parquet").write_text("?")
    with pytest.raises(
        InputError, match=r"is no Parquet file that can be read .*Write or copy it again"
    ):  # a split that is used
        load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="main")


def test_a_test_split_that_repeats_others_is_refused_to_who_asks_for_it(tmp_path):
    for split, rows in {"train": ["1", "2"], "validation": ["3"], "test": ["2", "4"]}.items():
        lines = [json.dumps({"prompt": f"{row}=", "answer": row}) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    splits = load_prompts(tmp_path)
    assert (splits["train"]["answer"], splits["validation"]["answer"]) == (["1", "2"], ["3"])
    with pytest.raises(InputError, match=r"the prompt '2=' stands in train and in test\. Remove it"):
        splits["test"]
    (tmp_path / "validation.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n')
    with pytest.raises(InputError, match=r"the prompt '1=' stands in train and in validation\."):
        load_prompts(tmp_path)


def test_reading_parquet_shows_no_bar_and_leaves_those_of_others(tmp_path, capsys):
    Dataset.from_list([{"prompt": f"{tmp_path}", "answer": "2"}]).to_parquet(tmp_path / "train.parquet")
    capsys.readouterr()
    datasets.enable_progress_bars()
    load_prompts(tmp_path)
    assert capsys.readouterr().err == "" and not datasets.are_progress_bars_disabled()


def test_whole_numbers_that_pandas_made_floats_are_integers(tmp_path):
    pd.DataFrame({"prompt": ["a", "b"], "answer": [7.0, -12.0]}).to_parquet(tmp_path / "train.parquet")
    assert load_prompts(tmp_path)["train"]["answer"] == ["7", "-12"]
    pd.DataFrame({"prompt": ["a", "b"], "answer": [7, None]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"row 1: .* found answer=None\. Fill it in, remove the row, or"):
        load_prompts(tmp_path)


def as_parquet(folder, *rows) -> Path:
    Dataset.from_list(list(rows)).to_parquet(folder / "train.parquet")
    return folder


def test_a_prompt_as_chat_messages_is_what_the_user_says(tmp_path):
    # The schema of BytedTsinghua-SIA/DAPO-Math-17k and others: messages, and the answer within a column.
    row = {"prompt": [{"content": "1+1=", "role": "user"}], "reward_model": {"ground_truth": "2", "style": "rule"}}
    splits = load_prompts(as_parquet(tmp_path, row), answer_column="reward_model.ground_truth")
    assert splits["train"].to_list() == [{"prompt": "1+1=", "answer": "2"}]
    with pytest.raises(
        InputError, match=r"Name one of its fields with answer_column, such as reward_model\.ground_tru"
    ):
        load_prompts(tmp_path, answer_column="reward_model")
    with pytest.raises(InputError, match=r"under the key 'reward_model\.truth', but found the keys .*Name the column"):
        load_prompts(tmp_path, answer_column="reward_model.truth")


def test_a_column_with_a_dot_in_its_name_is_that_column(tmp_path):
    row = {"prompt": "1+1=", "a.b": "2", "a": {"b": "3"}}
    assert load_prompts(as_parquet(tmp_path, row), answer_column="a.b")["train"]["answer"] == ["2"]


def test_the_system_message_of_messages_must_be_the_runs_own(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
    as_parquet(tmp_path, {"prompt": messages, "answer": "2"})
    assert load_prompts(tmp_path, system_prompt="Be brief.")["train"]["prompt"] == ["1+1="]
    for own in (None, "Think."):
        with pytest.raises(InputError, match=rf"row 0, 'prompt': the system message is 'Be brief.', but .* is {own!r}"):
            load_prompts(tmp_path, system_prompt=own)


@pytest.mark.parametrize(
    ("roles", "named"),
    [(["user", "assistant"], r"\['user', 'assistant'\]"), (["system"], "system"), (["user", "user"], "user")],
)
def test_messages_that_are_no_single_turn_are_refused(tmp_path, roles, named):
    messages = [{"role": role, "content": "1+1="} for role in roles]
    with pytest.raises(InputError, match=rf"one message of the user.*the roles \[?.*{named}.*prompt_column"):
        load_prompts(as_parquet(tmp_path, {"prompt": messages, "answer": "2"}))


def test_messages_without_text_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": [{"role": "user", "content": [{"text": "?"}]}], "answer": "2"}')
    with pytest.raises(InputError, match=r"line 1: expected text under the key 'prompt', but found prompt=\[\{'text'"):
        load_prompts(tmp_path)


def test_of_a_field_that_is_missing_the_others_beside_it_are_named(tmp_path):
    row = {"prompt": "1+2=", "judged": {"by": {"rule": "3", "style": "x"}}, "answer": "3"}
    write(tmp_path / "train.jsonl", row)
    for column, found in (
        ("judged.by.truth", r"\['rule', 'style'\] in judged\.by\."),
        ("judged.with", r"\['by'\] in judged\."),
        ("answer.text", r"\['answer', 'judged', 'prompt'\]\."),
        ("truth", r"\['answer', 'judged', 'prompt'\]\."),
    ):
        with pytest.raises(InputError, match=rf"under the key '{column}', but found the keys {found} Name the column"):
            load_prompts(tmp_path, answer_column=column)


def test_a_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path):
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    assert load_prompts(tmp_path)["train"].to_list() == rows
    (tmp_path / "train.jsonl").write_text(text + "\ufeff" + text, encoding="utf-8", newline="")
    with pytest.raises(InputError, match="line 4: not a JSON object"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("several", [False, True])
def test_a_folder_of_save_to_disk_says_how_it_is_read(tmp_path, several):
    split = Dataset.from_list([{"prompt": "1+1=", "answer": "2"}])
    (DatasetDict(train=split) if several else split).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"save_to_disk.*load_from_disk.*to_parquet to train\.parquet"):
        load_prompts(tmp_path / "saved")


def test_the_hub_is_asked_for_name_and_configuration(gsm8k, monkeypatch):
    asked = []

    def stand_in(name, config):
        asked.append((name, config))
        files = {split: [str(f) for f in sorted((gsm8k / "main").glob(f"{split}-*"))] for split in ("train", "test")}
        return DatasetDict({split: Dataset.from_parquet(f, keep_in_memory=True) for split, f in files.items()})

    monkeypatch.setattr(prompts, "load_dataset", stand_in)
    here = load_prompts(gsm8k, **GSM8K_COLUMNS, dataset_config="main")
    there = load_prompts("openai/gsm8k", **GSM8K_COLUMNS, dataset_config="main")
    assert {n: r.to_list() for n, r in there.items()} == {n: r.to_list() for n, r in here.items()}
    assert asked == [("openai/gsm8k", "main")]
    swapped = load_prompts("openai/gsm8k", **GSM8K_COLUMNS, train_split="test", validation_split="train")
    assert (swapped["train"].to_list(), swapped["validation"].to_list()) == (
        here["test"].to_list(), here["train"].to_list(),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"no split 'all': set train_split to one of train, test"):
        load_prompts("openai/gsm8k", **GSM8K_COLUMNS, train_split="all")
    with pytest.raises(InputError, match=r"openai/gsm8k, train, row 0: .*'prompt'.*'question'"):
        load_prompts("openai/gsm8k")


def test_one_parquet_file_and_a_folder_of_them(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert load_prompts(tmp_path / "train.parquet")["train"].to_list() == rows
    assert load_prompts(tmp_path)["train"].to_list() == rows
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:100])
    with pytest.raises(InputError, match=r"train\.parquet is no Parquet file that can be read"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match=r"no prompt file or folder .*none\.parquet"):
        load_prompts(tmp_path / "none.parquet")


def test_other_splits_of_a_folder(tmp_path):
    for name in ("easy", "hard", "train"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name, "answer": "1"})
    splits = load_prompts(tmp_path, train_split="easy", validation_split="hard")
    assert {name: rows["prompt"][0] for name, rows in splits.items()} == {"train": "easy", "validation": "hard"}
    with pytest.raises(InputError, match="train_split and validation_split are both 'easy'"):
        load_prompts(tmp_path, train_split="easy", validation_split="easy")


def test_the_last_mark_counts(tmp_path):
    write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "1 #### 2 #### 3"})
    assert load_prompts(tmp_path, answer_after="####")["train"]["answer"] == ["3"]


@pytest.mark.parametrize("text", ["42", "42 ####", "42 #### "])
def test_an_answer_without_its_mark_is_named(tmp_path, text):
    write(tmp_path / "train.jsonl", {"prompt": "a", "answer": "x #### 1"}, {"prompt": "b", "answer": text})
    with pytest.raises(InputError, match=r"line 2: expected the answer after '####' .* found '42"):
        load_prompts(tmp_path, answer_after="####")


# ── Order ────────────────────────────────────────────────────────────────────────────────────────

SEEDS, PER_STEP, AVAILABLE = st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 30)


@given(SEEDS, PER_STEP, AVAILABLE)
def test_each_pass_through_the_data_is_a_permutation_without_gaps_between_steps(seed, per_step, available):
    steps = [rows_of_step(seed, step, per_step, available) for step in range(3 * available // per_step + 1)]
    assert all(len(rows) == per_step for rows in steps)
    drawn = [row for rows in steps for row in rows]
    for start in range(0, len(drawn) - available + 1, available):
        assert sorted(drawn[start : start + available]) == list(range(available))
    rest = drawn[len(drawn) // available * available :]
    assert len(set(rest)) == len(rest)


@given(SEEDS, PER_STEP, AVAILABLE, st.integers(0, 1000))
def test_a_step_depends_on_nothing_but_seed_and_number(seed, per_step, available, step):
    wanted = rows_of_step(seed, step, per_step, available)
    for other in (0, step + 1):
        rows_of_step(seed, other, per_step, available)
    assert rows_of_step(seed, step, per_step, available) == wanted


def test_every_pass_and_every_seed_has_an_order_of_its_own():
    orders = [tuple(rows_of_step(seed, epoch, 50, 50)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_a_derived_seed_is_the_same_in_every_version():
    # A run made before must be resumed with the same prompts and samples: a change here is a change of format.
    assert derived_seed(0, "sampling", "student", 40) == 887842660533609252


@given(SEEDS, st.lists(st.text(max_size=5) | st.integers(0, 99), max_size=3))
def test_seeds_derived_for_different_purposes_differ(seed, purpose):
    derived = derived_seed(seed, *purpose)
    assert 0 <= derived < 2**63
    assert derived == derived_seed(seed, *purpose)
    assert derived != derived_seed(seed + 1, *purpose)
    assert derived != derived_seed(seed, *purpose, "more")
    assert generator_for(seed, *purpose).initial_seed() == derived
