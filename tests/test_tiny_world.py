"""The tiny world: its task, its tokenizer and the texts that its models are trained on."""

import itertools
import re
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import DATA, load_tokenizer
from tgpo_lab.tasks.rewards import marked_answer
from tgpo_lab.tiny_world.arithmetic import SPLIT_SHARES, AdditionTask, prompt_text, split_of, terse_text, worked_text
from tgpo_lab.tiny_world.building import write_prompts
from tgpo_lab.tiny_world.recipes import PAIR_RECIPES, StudentRecipe, TeacherRecipe
from tgpo_lab.tiny_world.texts import TextSource
from tgpo_lab.tiny_world.tokenizer import VOCABULARY_SIZE, build_tokenizer

PROBLEMS = st.lists(st.integers(1, 999_999), min_size=2, max_size=6).map(tuple)

# ── The task ─────────────────────────────────────────────────────────────────────────────────────


def check_worked(problem: tuple[int, ...], text: str) -> None:
    """Read a worked text by itself and add up again everything that it claims."""
    thought, answer = re.fullmatch(r"<think>(.*;)</think> #(\d+)", text).groups()
    columns = thought[:-1].split(";")
    width = max(len(str(x)) for x in problem)
    assert len(columns) == width
    digits = [str(x).zfill(width)[::-1] for x in problem]  # ones first
    names = ("ones", "tens", "hundreds", "thousands", "tenthousands", "hundredthousands")
    carry, written = None, ""
    for place, column in enumerate(columns):
        name, sums, result = re.fullmatch(r" ([a-z]+) ([0-9+=]+)( write .+)", column).groups()
        assert name == names[place]
        addends = [int(number[place]) for number in digits] + ([] if carry is None else [carry])
        first, *steps = re.findall(r"(?:^|\+)[0-9=]+", sums)
        assert "".join([first, *steps]) == sums and int(first) == addends[0]
        total = addends[0]
        for step, addend in zip(steps, addends[1:], strict=True):
            total += addend
            assert step == f"+{addend}={total}"
        if place == width - 1:
            assert result == f" write {total}"
            written = f"{total}{written}"
        else:
            digit, carried = re.fullmatch(r" write ([0-9]) carry ([0-9]+)", result).groups()
            carry = int(carried)
            assert 10 * carry + int(digit) == total
            written = digit + written
    assert int(written) == int(answer) == sum(problem)
    assert answer == str(sum(problem))


def test_the_two_styles_as_they_are_documented():
    problem = (47, 85, 36)
    assert prompt_text(problem) == "47+85+36="
    assert terse_text(168) == " the sum is #168"
    assert worked_text(problem) == (
        "<think> ones 7+5=12+6=18 write 8 carry 1; tens 4+8=12+3=15+1=16 write 16;</think> #168"
    )


@given(PROBLEMS)
@example((999_999, 100_000, 999_999))
@example((1, 999_999))
def test_a_worked_text_is_right_in_every_step(problem):
    check_worked(problem, worked_text(problem))


@given(PROBLEMS, st.integers(0, 10**6))
def test_both_styles_are_judged_by_their_answer(problem, other):
    answer = str(sum(problem))
    assert marked_answer(worked_text(problem), answer) == 1.0
    assert marked_answer(terse_text(other), str(other)) == 1.0
    assert marked_answer(terse_text(other), answer) == float(other == sum(problem))


@given(PROBLEMS, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_operands(problem, random):
    shuffled = list(problem)
    random.shuffle(shuffled)
    assert split_of(problem) == split_of(tuple(shuffled)) == split_of(problem[::-1])


def test_splits_have_the_shares_that_they_should():
    counts = Counter(split_of(p) for p in itertools.combinations_with_replacement(range(10, 50), 3))
    total = sum(counts.values())
    assert {name: counts[name] / total for name in SPLIT_SHARES} == pytest.approx(SPLIT_SHARES, abs=0.01)


@pytest.mark.parametrize("task", [AdditionTask(), AdditionTask(2, 1), AdditionTask(4, 6)])
def test_problems_are_of_their_split_without_leading_zeros(task):
    random = np.random.default_rng(0)
    for split in SPLIT_SHARES:
        for problem in (task.draw(random, split) for _ in range(20)):
            assert len(problem) == task.operands and all(len(str(x)) == task.digits for x in problem)
            assert split_of(problem) == split
            assert all(type(x) is int for x in problem)


def test_distinct_problems_are_distinct_up_to_order():
    stream = AdditionTask(2, 1).distinct(np.random.default_rng(0), "train")
    problems = [tuple(sorted(p)) for p, _ in zip(stream, range(35), strict=False)]  # of about 40
    assert len(set(problems)) == 35


@pytest.mark.parametrize("operands, digits", [(1, 2), (0, 2), (2, 0), (2, 7)])
def test_a_task_that_cannot_be(operands, digits):
    with pytest.raises(ValueError, match=r"operands|digits"):
        AdditionTask(operands, digits)


def test_a_task_with_too_few_problems_for_its_prompt_files_is_refused(tmp_path):
    # Two numbers of two digits make 4,095 sums, fewer than there are training prompts.
    def give_up(number, frame):
        raise TimeoutError("write_prompts never ended")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3)
    try:
        with pytest.raises((InputError, ValueError)):
            write_prompts(AdditionTask(operands=2, digits=2), tmp_path / "prompts")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert not list(tmp_path.iterdir())


# ── The tokenizer ────────────────────────────────────────────────────────────────────────────────

COLUMNS = [" ones", " tens", " hundreds", " thousands", " tenthousands", " hundredthousands"]
WORDS = [" the", " sum", " is", " write", " carry", *COLUMNS]
SIGNS = ["+", "=", ";", " #", "#", "\n", "-", "*", "?", ".", ",", ":", "<think>", "</think>", *"0123456789"]
TASK_TEXT = st.lists(st.sampled_from(WORDS + SIGNS), max_size=30).map("".join)
# What a tokenizer of another class would cut or mark otherwise.
TEXTS = [
    *(worked_text(p) for p in ((47, 85, 36), (10, 99), (12345, 99999, 1), (999_999, 999_999))),
    *(prompt_text(p) + terse_text(sum(p)) for p in ((47, 85, 36), (1, 2))),
    "<think></think><think>",
    "= <think> ones",
    "12 345  6\n\n7\t8",
    " the  sum",
    "the sum",
    "it's 5 o'clock",
    "déjà vu 漢字 🙂 \u200f",
    "<eos> and <pad>",
    "",
    " ",
    " abiding ablaze abridge",
]


def test_there_are_as_many_tokens_as_there_should_be(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == VOCABULARY_SIZE == 2048
    assert sorted(vocabulary.values()) == list(range(2048))
    assert [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token] == ["<pad>", "<eos>", "<unk>"]
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


@given(text=TASK_TEXT)
def test_what_is_encoded_is_decoded_again(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


@given(text=st.text(" \n0123456789"))
def test_every_space_and_line_end_is_kept(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids


@given(problem=PROBLEMS)
def test_texts_of_the_task_are_encoded_without_loss(tokenizer, problem):
    text = prompt_text(problem) + worked_text(problem) + terse_text(sum(problem))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


def test_every_digit_and_mark_is_a_token_of_its_own(tokenizer):
    assert tokenizer.tokenize("47+85=<think> ones 7</think> #132#5") == [
        *("4", "7", "+", "8", "5", "=", "<think>", " ones", " ", "7", "</think>", " #", "1", "3", "2", "#", "5")
    ]


def test_every_filler_word_is_one_token(tokenizer):
    words = [token for token in tokenizer.get_vocab() if re.fullmatch(r" [a-z]{3,}", token)]
    assert len(words) > 1900
    ids = tokenizer.encode("".join(words))
    assert tokenizer.convert_ids_to_tokens(ids) == words


def test_encoding_adds_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer("7")["input_ids"] == tokenizer.encode("7", add_special_tokens=False)


def test_too_few_filler_words(tmp_path):
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"words.txt has too few words"):
        build_tokenizer(tmp_path / "words.txt")


def assert_same_tokenizer(loaded, built) -> None:
    assert loaded.get_vocab() == built.get_vocab()
    for text in TEXTS:
        assert loaded.encode(text) == built.encode(text), text
        assert loaded(text)["input_ids"] == built(text)["input_ids"], text
        assert loaded.tokenize(text) == built.tokenize(text), text
        ids = built.encode(text)
        assert loaded.decode(ids) == built.decode(ids), text
        assert loaded.decode(ids, skip_special_tokens=True) == built.decode(ids, skip_special_tokens=True), text
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id", "padding_side", "model_max_length"):
        assert getattr(loaded, name) == getattr(built, name), name


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_saved_checkpoint_brings_the_same_tokenizer(random_pair, tokenizer, role, tmp_path):
    # transformers chooses the class by the model type, and for some types silently one that encodes otherwise.
    folder = getattr(random_pair, role)
    assert_same_tokenizer(AutoTokenizer.from_pretrained(folder), tokenizer)
    load_tokenizer(folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert_same_tokenizer(load_tokenizer(tmp_path), tokenizer)


@pytest.mark.parametrize("folder", sorted((DATA / "models").glob("*/")), ids=lambda f: f.name)
def test_the_shipped_models_bring_the_same_tokenizer(folder, tokenizer):
    assert_same_tokenizer(load_tokenizer(folder), tokenizer)


# ── Training texts ───────────────────────────────────────────────────────────────────────────────


def parts_of(batch, tokenizer):
    """Each row taken apart by its mask: (prompt, prefix, continuation) as token ids; padding is checked."""
    assert batch.tokens.shape == batch.loss_mask.shape
    assert len(batch.opening_position) == len(batch.tokens)
    rows = []
    for tokens, mask, opening in zip(
        batch.tokens.tolist(), batch.loss_mask.tolist(), batch.opening_position.tolist(), strict=True
    ):
        start, end = mask.index(True), len(mask) - mask[::-1].index(True)
        assert all(mask[start:end])  # in one piece
        assert tokens[end - 1] == tokenizer.eos_token_id
        assert set(tokens[end:]) <= {tokenizer.pad_token_id}
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(tokens[: end - 1])
        assert opening <= start
        rows.append((tokens[:opening], tokens[opening:start], tokens[start:end]))
    assert any(len(p) + len(x) + len(c) == batch.tokens.shape[1] for p, x, c in rows)  # no padding for nothing
    return rows


def problem_of(prompt: list[int], tokenizer) -> tuple[int, ...]:
    text = tokenizer.decode(prompt)
    assert re.fullmatch(r"[1-9]\d\+[1-9]\d\+[1-9]\d=", text)
    problem = tuple(int(x) for x in text[:-1].split("+"))
    assert split_of(problem) == "train"
    return problem


def source(tokenizer, seed: int = 0) -> TextSource:
    return TextSource(tokenizer, AdditionTask(), np.random.default_rng(seed))


def test_a_student_learns_both_styles_but_not_the_opening(tokenizer):
    errors = []
    batch = source(tokenizer).student_batch(StudentRecipe(opening_logprob=-9.0), 64)
    for index, (prompt, prefix, continuation) in enumerate(parts_of(batch, tokenizer)):
        problem = problem_of(prompt, tokenizer)
        said = tokenizer.decode(continuation)
        if index % 2:
            assert prefix == []
            answer = re.fullmatch(r" the sum is #(\d+)<eos>", said).group(1)
            errors.append(int(answer) - sum(problem))
        else:
            assert tokenizer.decode(prefix) == "<think>"  # no loss on it
            assert "<think>" + said == worked_text(problem) + "<eos>"
    assert np.mean(np.array(errors) == 0) < 0.3 and 5 < np.std(errors) < 20  # the noise of the recipe is 12


def test_a_teacher_of_clean_texts_learns_everything_after_the_prompt(tokenizer):
    for prompt, prefix, continuation in parts_of(source(tokenizer).teacher_batch(TeacherRecipe(0.0), 32), tokenizer):
        assert prefix == []
        assert tokenizer.decode(continuation) == worked_text(problem_of(prompt, tokenizer)) + "<eos>"


def foreign(**shares: float) -> TeacherRecipe:
    return replace(TeacherRecipe(1.0), **{"terse_prefix": 0.0, "junk_prefix": 0.0, "slip_prefix": 0.0, **shares})


def test_a_teacher_works_out_what_a_terse_prefix_says(tokenizer):
    terse = re.compile(r" the( sum( is( #\d*)?)?)?")
    lengths = set()
    for prompt, prefix, continuation in parts_of(
        source(tokenizer).teacher_batch(foreign(terse_prefix=1.0), 64), tokenizer
    ):
        said, worked = tokenizer.decode(prefix), worked_text(problem_of(prompt, tokenizer)) + "<eos>"
        finished, goes_on = tokenizer.decode(continuation).split("<think>", 1)
        assert f"<think>{goes_on}" == worked
        assert terse.fullmatch(said) and terse.fullmatch(said + finished)
        lengths.add(len(prefix))
    assert min(lengths) == 1 and max(lengths) >= 6


def test_a_teacher_answers_junk_with_worked_text(tokenizer):
    for prompt, prefix, continuation in parts_of(
        source(tokenizer).teacher_batch(foreign(junk_prefix=1.0), 64), tokenizer
    ):
        assert 1 <= len(prefix) <= 12
        assert not set(prefix) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(continuation) == worked_text(problem_of(prompt, tokenizer)) + "<eos>"


def test_a_teacher_goes_on_after_slips_without_loss_on_them(tokenizer):
    slips = 0
    for prompt, prefix, continuation in parts_of(
        source(tokenizer).teacher_batch(foreign(slip_prefix=1.0), 64), tokenizer
    ):
        worked = [*tokenizer.encode(worked_text(problem_of(prompt, tokenizer))), tokenizer.eos_token_id]
        assert len(prefix) >= 2 and prefix[0] == worked[0]  # "<think>" itself is never a slip
        assert continuation == worked[len(prefix) :]
        assert len(prefix) + len(continuation) == len(worked)
        different = sum(a != b for a, b in zip(prefix, worked, strict=False))
        assert different <= 3
        slips += different > 0
    assert slips > 50


def test_the_share_of_foreign_texts_is_the_recipes(tokenizer):
    rows = parts_of(source(tokenizer).teacher_batch(TeacherRecipe(foreign_share=0.6), 500), tokenizer)
    assert np.mean([bool(prefix) for _, prefix, _ in rows]) == pytest.approx(0.6, abs=0.07)


def test_texts_are_decided_by_the_generator(tokenizer):
    recipe = TeacherRecipe(foreign_share=0.6)
    first, again, other = (source(tokenizer, seed).teacher_batch(recipe, 8) for seed in (1, 1, 2))
    assert first.tokens.tolist() == again.tokens.tolist() and first.loss_mask.tolist() == again.loss_mask.tolist()
    assert first.tokens.tolist() != other.tokens.tolist()


def test_recipes_differ_in_the_two_dials_alone():
    students = {name: recipe.student for name, recipe in PAIR_RECIPES.items()}
    openings = [students[name].opening_logprob for name in ("near", "mid", "far")]
    assert openings == sorted(openings, reverse=True)
    assert {replace(student, opening_logprob=0.0) for student in students.values()} == {
        replace(students["far"], opening_logprob=0.0)
    }
    assert students["far"] == students["far-fragile"]
    assert PAIR_RECIPES["far-fragile"].teacher.foreign_share == 0 < PAIR_RECIPES["far"].teacher.foreign_share
