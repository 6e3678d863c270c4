"""The answer checker against text that tries to get a reward it does not deserve."""

import importlib.util
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgpo_lab.errors import InputError
from tgpo_lab.evaluation import evaluate
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.tasks.math_answers import MathChecker, math_verify
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.tasks.rewards import exact_match, last_number, marked_answer, reward_function, score

RIGHT = [
    "#168",
    " the sum is #168",
    "# 168",
    "#168 ",
    "#168\n",
    "#\n 168 \n",
    "#12 no, #168",
    "#167#168",
    "##168",
    "#168 #168",
    "\x00\u202e anything before the mark #168",
    "<think> ones 7+5=12 write 2 carry 1;</think> #168",
]

WRONG = [
    "",
    " ",
    "168",
    "#",
    "# ",
    "168#",
    "#167",
    "#1680",
    "#1168",
    "#16",
    "#861",
    "#168 #12",  # the last one counts
    "#168#",
    "#168# ",
    "#168 and that is all",
    "#168.",
    "#168;",
    "#168 168",
    "#1 68",
    "#1\n68",
    "#1,68",
    "#168.0",
    "#168e0",
    "#1.68e2",
    "#+168",
    "#-168",
    "#--168",
    "#−168",  # a minus sign, not a hyphen
    "#0168",
    "#00000168",
    "#0x a8",
    "#0xa8",
    "#0b10101000",
    "#1_68",
    "#168L",
    "#84+84",
    "#(168)",
    "#[168]",
    "#'168'",
    '#"168"',
    "#\\boxed{168}",
    "#$168$",
    "#168%",
    "#１６８",  # fullwidth
    "#١٦٨",  # Arabic
    "#१६८",  # Devanagari
    "#𝟏𝟔𝟖",  # mathematical bold
    "#¹⁶⁸",
    "#①⑥⑧",
    "#CLXVIII",
    "＃168",  # another number sign
    "♯168",
    "#168\x00",
    "#\x00168",
    "#1\x0068",
    "#\u200f168",  # right-to-left mark
    "#\u202e861",  # right-to-left override: looks like 168
    "#\u202e168",
    "#168\u200b",  # zero-width space
    "#\ufeff168",
    "#168\u0301",  # combining accent
    "#\u00a0168",  # no-break space
    "#168\u2028",
    "#168\x0b",
    "#168\r",
    "#168</think>",
    "#168<eos>",
    "#__import__('os').getpid()",
    "#int('168')",
    "#{168}",
    "#%d",
    "#None",
    "#True",
    "#nan",
    "#inf",
    "#1e2",
]


@pytest.mark.parametrize("response", RIGHT)
def test_a_right_answer_is_found(response):
    assert marked_answer(response, "168") == 1.0


@pytest.mark.parametrize("response", WRONG)
def test_anything_else_is_wrong(response):
    assert marked_answer(response, "168") == 0.0


@pytest.mark.parametrize(
    "response, answer", [("#-5", "-5"), ("#0", "0"), ("# -12 ", "-12"), (f"#{10**63}", str(10**63))]
)
def test_negative_numbers_zero_and_large_numbers(response, answer):
    assert marked_answer(response, answer) == 1.0


@pytest.mark.parametrize("response, answer", [("#-0", "0"), ("#0", "-0"), ("#- 5", "-5"), ("#", ""), ("#x", "x")])
def test_what_looks_equal_is_not_the_same_integer_in_plain_digits(response, answer):
    assert marked_answer(response, answer) == 0.0


def test_the_text_is_never_run(tmp_path):
    file = tmp_path / "made"
    assert marked_answer(f"#__import__('pathlib').Path({str(file)!r}).touch()", "168") == 0.0
    assert not file.exists()


@given(st.text(), st.integers(-(10**6), 10**6))
def test_a_right_answer_counts_after_any_text(before, number):
    assert marked_answer(f"{before}#{number}", str(number)) == 1.0


@given(st.text(), st.integers(), st.integers())
def test_an_answer_never_equals_another_integer(before, said, answer):
    assert marked_answer(f"{before}#{said}", str(answer)) == float(said == answer and len(str(abs(said))) <= 64)


OTHER = st.text(st.characters(exclude_characters="#-0123456789 \n"), min_size=1)


@given(st.text(), st.integers(0, 10**6), OTHER, st.integers(0, 7))
def test_other_characters_after_the_last_mark_make_it_wrong(before, number, other, place):
    digits = str(number)
    assert marked_answer(f"{before}#{digits[:place]}{other}{digits[place:]}", digits) == 0.0


@given(st.text(), st.text(st.characters(exclude_characters="#")))
def test_without_a_mark_there_is_no_answer(text, answer):
    assert marked_answer(text.replace("#", ""), answer) == 0.0


@given(st.text(), st.text())
def test_every_reward_is_zero_or_one_for_any_text(response, answer):
    for reward in (marked_answer, exact_match):
        assert reward(response, answer) in (0.0, 1.0)
    assert last_number(response, f"{answer} 7") in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["#", "9", "#9", " ", "#168 ", "\n", "-", "#-", "1 ", "((((", "\u202e", "#\x00"], ids=lambda p: ascii(p)
)
@pytest.mark.parametrize("reward", [marked_answer, exact_match])
def test_very_long_responses_take_time_in_proportion(reward, piece):
    long = piece * (2_000_000 // len(piece))
    started = time.process_time()
    for text in (f"#{piece * 25}x", f"#{long}x"):  # a pattern that tries every split would not get past the first
        assert reward(text, "168") == 0.0
        assert time.process_time() - started < 1.0
    assert reward(long, "168") == float(reward is marked_answer and piece == "#168 ")
    assert reward(long + "#168", "168") == float(reward is marked_answer)
    assert time.process_time() - started < 1.0  # a quadratic search would take hours


def test_an_exact_match_is_the_whole_response():
    assert exact_match(" 168\n", "168") == 1.0
    assert exact_match("168", " 168 ") == 1.0
    assert exact_match("#168", "168") == 0.0
    assert exact_match("168 168", "168") == 0.0
    assert exact_match("0168", "168") == 0.0


def test_rewards_are_chosen_by_name():
    assert reward_function("marked_answer") is marked_answer
    assert reward_function("exact_match") is exact_match
    with pytest.raises(
        InputError, match=r"'eval'.*exact_match, last_number, marked_answer, math_verify, or package\.module:function"
    ):
        reward_function("eval")


def rollouts_of(tokenizer, responses: list[str], finished: list[bool]) -> Rollouts:
    """Rollouts with these texts; a finished one ends with the end-of-sequence token."""
    end = tokenizer.eos_token_id
    ids = [tokenizer.encode(text) + [end] * ends for text, ends in zip(responses, finished, strict=True)]
    width = max(len(row) for row in ids)
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    mask = torch.arange(width) < torch.tensor([len(row) for row in ids]).unsqueeze(-1)
    return Rollouts([[1]] * len(ids), tokens, mask, torch.tensor(finished), tokenizer.pad_token_id)


def test_a_response_that_was_cut_gets_nothing(tokenizer):
    rollouts = rollouts_of(tokenizer, [" the sum is #16", " the sum is #16", "#168"], [True, False, False])
    assert score(rollouts, ["16", "16", "168"], marked_answer, tokenizer).tolist() == [1.0, 0.0, 0.0]


def test_each_row_is_judged_by_its_own_answer(tokenizer):
    said = ["#12", "#12", "#7", "#7", " the sum is #7", "#12"]
    rollouts = rollouts_of(tokenizer, said, [True] * 6)
    rewards = score(rollouts, ["12", "12", "12", "7", "7", "7"], marked_answer, tokenizer)
    assert rewards.tolist() == [1, 1, 0, 1, 1, 0]
    assert rewards.dtype == torch.float32 and rewards.device.type == "cpu"
    with pytest.raises(ValueError):
        score(rollouts, ["12", "7"], marked_answer, tokenizer)  # one for each row, not for each prompt


def test_padding_is_not_part_of_the_response(tokenizer):
    rollouts = rollouts_of(tokenizer, ["#7", " the sum is #7"], [True, True])
    garbage = rollouts.responses.clone()
    garbage[~rollouts.mask] = tokenizer.convert_tokens_to_ids("8")
    padded = Rollouts(rollouts.prompts, garbage, rollouts.mask, rollouts.finished, rollouts.pad_token)
    assert score(padded, ["7", "7"], marked_answer, tokenizer).tolist() == [1.0, 1.0]


def test_a_special_token_within_the_answer_makes_it_wrong(tokenizer):
    # "#1<unk>2" is not #12, though special tokens vanish in decoding.
    ids = [*tokenizer.encode("#1"), tokenizer.unk_token_id, *tokenizer.encode("2"), tokenizer.eos_token_id]
    rollouts = Rollouts([[1]], torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), torch.tensor([True]), 0)
    assert score(rollouts, ["12"], marked_answer, tokenizer).tolist() == [0.0]


@pytest.mark.parametrize("group_size", [1, 4])
def test_rewards_stay_with_their_group_in_a_run(random_pair, group_size):
    pair, prompts = load_pair(random_pair.student, random_pair.teacher), load_prompts(random_pair.prompts)["train"]
    # The models say 7 or 8: where the answer is 9, they cannot be right.
    prompts = prompts.map(lambda row, i: {"answer": "7" if i % 2 else "9"}, with_indices=True)
    found = evaluate(
        pair, prompts=prompts, temperature=1.0, samples_per_prompt=group_size, max_new_tokens=12, prompts_at_once=5
    )
    by_prompt = found.rewards.view(len(prompts), group_size)
    texts = found.rollouts.texts(pair.tokenizer)
    said_seven = torch.tensor([float(t.endswith("#7")) for t in texts]) * found.rollouts.finished
    assert by_prompt[::2].sum() == 0 and by_prompt[1::2].sum() > 0
    assert torch.equal(by_prompt[1::2], said_seven.view_as(by_prompt)[1::2])


# ── The last number ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("So she pays $1,234.50 in all.", "1234.5", 1),
        ("First 3, then 42.", "#### 42", 1),
        ("42 is the answer", "42", 1),
        ("It is -7", "-7", 1),
        ("10-3=7", "7", 1),
        ("10-7", "-7", 0),  # a subtraction
        ("x-7", "7", 1),
        ("42.0", "42", 1),
        ("007", "7", 1),
        ("42, no, 43", "42", 0),
        ("1,23", "123", 0),  # no thousands
        ("12,345,678 people", "12345678", 1),
        ("no number at all", "42", 0),
        ("", "42", 0),
        ("\u0664\u0662", "42", 0),  # Arabic digits
        (r"\boxed{1{,}234}", "1234", 1),  # as LaTeX sets thousands
        (r"12\,345 and 1,\!234,\!567", "1234567", 1),
        (r"(1{,}2)", "12", 0),
        ("so x = \u22125", "-5", 1),  # a minus sign that is no hyphen
        ("10\u22127", "7", 1),
        ("1e3", "1000", 0),  # decimal notation only
        ("0.10", ".1", 0),  # a dot alone starts no number: .1 reads as 1
    ],
)
def test_the_last_number_counts_by_its_value(response, answer, right):
    assert last_number(response, answer) == right


@given(st.integers(-(10**12), 10**12))
def test_thousands_may_be_marked(number):
    assert last_number(f"the sum is {number:,}.", str(number)) == 1.0
    assert last_number(f"the sum is {number:,}.", str(number + 1)) == 0.0


def test_an_answer_without_a_number_is_refused():
    with pytest.raises(InputError, match=r"last_number compares numbers, but the right answer 'two' has none"):
        last_number("2", "two")


def test_a_long_row_of_digits_is_no_trouble():
    assert last_number("1" * 200_000, "7") == 0.0
    assert last_number("1," * 100_000, "7") == 0.0


# ── One's own function ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A function that writes a module into the working directory and gives the import path of its ``judge``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str, name: str = "judge") -> str:
        module = f"own_rewards_{abs(hash(code))}"
        (tmp_path / f"{module}.py").write_text(code)
        return f"{module}:{name}"

    return write


@pytest.mark.parametrize("returned, value", [("True", 1.0), ("0", 0.0), ("0.25", 0.25), ("-1.5", -1.5)])
def test_a_function_of_ones_own_judges(own_module, tokenizer, returned, value):
    reward = reward_function(own_module(f"def judge(response, answer):\n    return {returned}\n"))
    rollouts = rollouts_of(tokenizer, ["#1", "#2"], [True, False])
    assert score(rollouts, ["1", "2"], reward, tokenizer).tolist() == [value, 0.0]


def test_it_is_given_the_response_and_the_answer(own_module):
    judge = reward_function(own_module("def judge(response, answer):\n    return response == 'r' and answer == 'a'\n"))
    assert (judge("r", "a"), judge("a", "r")) == (1.0, 0.0)


def test_a_function_that_raises_is_named_with_the_response(own_module):
    path = own_module("def judge(response, answer):\n    return int(response)\n")
    with pytest.raises(InputError) as refusal:
        reward_function(path)("x" * 500 + "seven", "7")
    assert path in str(refusal.value) and "ValueError" in str(refusal.value) and "seven' and the" in str(refusal.value)
    assert len(str(refusal.value)) < 1200


@pytest.mark.parametrize("body", ["def judge(response, answer):\n    ", ""], ids=["judging", "imported"])
def test_what_a_function_raises_on_several_lines_is_told_on_one(own_module, body):
    with pytest.raises(InputError, match="ValueError: one two") as refusal:
        reward_function(own_module(f"{body}raise ValueError('one\\n  two')"))("r", "7")
    assert "\n" not in str(refusal.value)


def test_a_function_that_ends_the_program_is_named_and_ctrl_c_is_not_taken_for_its_error(own_module):
    path = own_module("import sys\ndef judge(response, answer):\n    sys.exit(3)\n")
    with pytest.raises(InputError, match=r"judge raised SystemExit: 3 for the response 'r'"):
        reward_function(path)("r", "7")
    with pytest.raises(InputError, match=r"could not be imported \(SystemExit: 4\)"):
        reward_function(own_module("raise SystemExit(4)"))
    with pytest.raises(KeyboardInterrupt):
        reward_function(own_module("def judge(response, answer):\n    raise KeyboardInterrupt\n"))("r", "7")


@pytest.mark.parametrize("returned", ["None", "float('nan')", "float('inf')", "'1'", "[1]"])
def test_a_function_has_to_return_a_finite_number(own_module, returned):
    judge = reward_function(own_module(f"def judge(response, answer):\n    return {returned}\n"))
    with pytest.raises(InputError, match=r"judge returned .* for the response '#7' .* expected a finite number"):
        judge("#7", "7")


@pytest.mark.parametrize(
    "code, name, reason",
    [
        ("judge = 7", "judge", "no function 'judge'"),
        ("def judge(response, answer): ...", "other", "no function 'other'"),
        ("def judge(response): ...", "judge", "must take the response and the right answer"),
        ("def judge(a, b, c): ...", "judge", "must take the response and the right answer"),
        ("raise RuntimeError('broken')", "judge", "RuntimeError: broken"),
        ("def judge(response, answer) ...", "judge", "SyntaxError"),
    ],
)
def test_a_function_is_checked_before_the_run(own_module, code, name, reason):
    with pytest.raises(InputError, match=reason):
        reward_function(own_module(code, name))


@pytest.mark.parametrize("path", ["no.such:judge", ":judge", "module:", "os:path:join", "a b:judge", "os.path:join()"])
def test_an_import_path_that_leads_nowhere(path):
    with pytest.raises(InputError, match="reward"):
        reward_function(path)


# ── Math-Verify ──────────────────────────────────────────────────────────────────────────────────

has_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra math")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tgpo-lab\[math\]'"):
        reward_function("math_verify")


@has_math_verify
@pytest.mark.parametrize(
    "response, answer, right",
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", 1),
        (r"so it is $\boxed{\frac{1}{2}}$", r"$\frac{2}{4}$", 1),
        (r"so it is $\boxed{\frac{1}{2}}$", "2", 0),
        (r"$x+1$", r"$1+x$", 1),
        (r"\boxed{(1,3)}", r"(1,3)", 1),
        (r"\boxed{(1,3)}", r"(3,1)", 0),
        (r"first \boxed{3}, no, \boxed{4}", "3", 0),
        ("nothing of the kind", "3", 0),
        ("", "3", 0),
        ("__import__('os').system('true')", "0", 0),
    ],
)
def test_equal_mathematics_is_right(response, answer, right):
    assert math_verify(response, answer) == right


@has_math_verify
def test_an_answer_that_never_ends_is_wrong_and_the_next_one_is_judged_again():
    checker = MathChecker(seconds_per_answer=60)
    assert checker.equal(r"\boxed{7}", "7")
    checker._seconds = 0.5
    for endless in (r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{(10^{9})!}"):
        assert not checker.equal(endless, "7")
    checker._seconds = 60
    assert checker.equal(r"\boxed{7}", "7")
    child = checker._child
    child.send_signal(signal.SIGSTOP)  # as stuck as can be
    checker._seconds = 0.5
    assert not checker.equal(r"\boxed{7}", "7")
    assert child.poll() is not None
    checker._seconds = 60
    assert checker.equal(r"\boxed{7}", "7")
    checker.close()
