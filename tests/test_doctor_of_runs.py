"""The doctor on runs that are there, on answers that are cut, on rewards of one's own; and what its lines are about."""

import json
import re
import shutil
import sys

import pytest
import torch

from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.training import train


def told(found, level: str, subject: str) -> str:
    return "\n".join(f"{f.text} {f.change}" for f in found.findings if (f.level, f.subject) == (level, subject))


def examined(config: TrainConfig, **options):
    return diagnose(config, **{"prompts": 4, "card_tokens": 12, "device": "cpu", **options})


# ── Answers that are cut ─────────────────────────────────────────────────────────────────────────


def test_a_limit_that_cuts_every_answer_is_named_and_neither_teacher_nor_reward_is_blamed(tmp_path):
    config = TrainConfig.preset("tiny", max_new_tokens=12, output=str(tmp_path / "run"))
    found = examined(config)
    said = told(found, "warning", "divergence")
    assert "1.00 of the teacher's answers are longer than the 12 tokens after which the run cuts them" in said
    assert "--max-new-tokens 24 or more" in said
    assert "The teacher is right in" not in said and "another teacher" not in said and "the reward" not in said
    assert found.card.teacher_cut == 1.0 and found.card.teacher_length == 12
    whole = examined(config.with_changes(max_new_tokens=80), card_tokens=80)
    assert whole.card.teacher_cut == 0.0 and "longer than" not in told(whole, "warning", "divergence")
    assert "Responses that were cut, student / teacher | " in str(whole)


# ── Rewards of one's own ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def my_reward(tmp_path, monkeypatch):
    """A function that writes the module ``my_reward`` with this body of ``judge(response, answer)``."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "code").mkdir()

    def write(body: str) -> str:
        monkeypatch.delitem(sys.modules, "my_reward", raising=False)
        (tmp_path / "code" / "my_reward.py").write_text(f"def judge(response, answer):\n    {body}\n")
        return "my_reward:judge"

    yield write
    sys.modules.pop("my_reward", None)


@pytest.mark.parametrize(
    ("body", "part"),
    [("return {}['answer']", "raised KeyError"), ("return float('nan')", "returned nan"),
     ("return 1.0 if response == answer else float('nan')", "returned nan")],
)  # fmt: skip
def test_a_reward_that_training_would_refuse_is_refused(my_reward, tiny_config, tmp_path, body, part):
    found = examined(tiny_config(tmp_path, reward=my_reward(body)))
    assert part in told(found, "refused", "reward") and found.status == 2
    assert not told(found, "warning", "divergence")


def test_a_reward_that_fails_on_a_response_of_the_card_is_refused(my_reward, tiny_config, tmp_path):
    """The first eight calls, with the responses that were sampled to see, go well."""
    body = "judge.calls = getattr(judge, 'calls', 0) + 1; return 1.0 if judge.calls <= 8 else float('nan')"
    found = examined(tiny_config(tmp_path, reward=my_reward(body)))
    assert "returned nan" in told(found, "refused", "reward") and not told(found, "warning", "divergence")


def test_a_reward_that_fails_is_refused_where_no_card_can_be_measured(my_reward, tiny_config, tmp_path):
    room = {"max_new_tokens": 100, "reward": my_reward("return {}['answer']")}  # for prompts, not for their prefixes
    found = examined(tiny_config(tmp_path, **room), card_tokens=100)
    assert "raised KeyError" in told(found, "refused", "reward") and found.card is None


def test_a_reward_that_works_is_not_mentioned(my_reward, tiny_config, tmp_path):
    found = examined(tiny_config(tmp_path, reward=my_reward("return float(response == answer)")))
    assert not [f for f in found.findings if f.subject == "reward"] and found.status < 2


def test_right_answers_that_the_mark_can_never_match_are_warned_about(tiny_config, tmp_path):
    rows = [{"prompt": f"1+{n % 9}+{n % 7}=", "answer": "so #### 7" if n < 3 else "7"} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = told(examined(tiny_config(tmp_path, dataset=str(tmp_path))), "warning", "reward")
    assert "3 of 20 right answers are none, such as 'so #### 7'" in said and "--answer-after" in said
    assert not told(examined(tiny_config(tmp_path)), "warning", "reward")


def test_right_answers_that_math_verify_cannot_read_are_warned_about(tiny_config, tmp_path):
    pytest.importorskip("math_verify")
    whole = "She sold 3+4 = <<3+4=7>>7.\n#### 7"  # as in openai/gsm8k, without answer_after
    for name, answers in (("good", ["\\frac{1}{2}", "7"]), ("bad", [whole])):
        rows = [{"prompt": f"1+{n % 9}+{n % 7}=", "answer": answers[n % len(answers)]} for n in range(70)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, bad = (
        examined(tiny_config(tmp_path, dataset=str(tmp_path / f"{name}.jsonl"), reward="math_verify"))
        for name in ("good", "bad")
    )
    assert not told(good, "warning", "reward")
    said = told(bad, "warning", "reward")
    assert re.search(r"find (\d+) of \1 right answers equal to themselves", said)
    assert "'She sold" in said.replace('"', "'") and "--answer-after" in said


def test_two_models_that_are_always_right_are_no_reason_to_doubt_the_teacher(my_reward, tiny_config, tmp_path):
    found = examined(tiny_config(tmp_path, reward=my_reward("return 1.0"), max_new_tokens=40), card_tokens=40)
    assert found.card.teacher_accuracy == found.card.student_accuracy == 1
    assert "is right in" not in told(found, "warning", "divergence")


# ── Runs that are there ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4, "lora_alpha": 32.0}], ids=["all weights", "adapters"])
def test_the_student_of_a_run_that_goes_on_is_the_one_looked_at(tiny_config, tmp_path, random_pair, changes):
    if changes:
        pytest.importorskip("peft")
    config = tiny_config(tmp_path, learning_rate=0.005, **changes)
    result = train(config, show_progress=False)
    longer = config.with_changes(steps=5)
    before = examined(config.with_changes(output=str(tmp_path / "other")))
    found = examined(longer, resume=True)
    assert "step-000003" in told(found, "ok", "student") and found.status < 2
    assert not told(before, "ok", "student")
    # Its own figures, measured from the trained student as it was left in memory.
    pair = load_pair(config.student, config.teacher)
    lines = (random_pair.prompts / "validation.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:4]]
    assert found.card.reverse_kl != pytest.approx(before.card.reverse_kl, abs=0.01)
    assert found.card.opening_logprob == pytest.approx(opening(pair, result.student, prompts), abs=1e-4)


@torch.no_grad()
def opening(pair, student, prompts) -> float:
    """Mean log-probability of the teacher's first token under a student."""
    values = []
    for ids in pair.encode(prompts):
        tokens = torch.tensor([ids])
        first = pair.teacher(tokens).logits[0, -1].argmax()
        values.append(float(student(tokens).logits[0, -1].log_softmax(-1)[first]))
    return sum(values) / len(values)


def test_other_prompts_and_another_teacher_are_refused_to_a_run_that_goes_on(tiny_config, tmp_path, random_pair):
    folders = {name: shutil.copytree(getattr(random_pair, name), tmp_path / name) for name in ("prompts", "teacher")}
    config = tiny_config(tmp_path, dataset=str(folders["prompts"]), teacher=str(folders["teacher"]))
    train(config, show_progress=False)
    assert "other" not in told(examined(config.with_changes(steps=9), resume=True), "refused", "output")
    file = folders["prompts"] / "train.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::-1]))
    found = examined(config.with_changes(steps=9), resume=True)
    assert f"{folders['prompts']} has other prompts or answers" in told(found, "refused", "output")
    assert found.card is not None  # the pair is looked at all the same
    shutil.copytree(random_pair.student, folders["teacher"], dirs_exist_ok=True)
    file.write_text("".join(lines))
    found = examined(config.with_changes(steps=9), resume=True)
    assert f"{folders['teacher']} has other weights than when" in told(found, "refused", "output")


def test_a_finished_run_is_said_to_be_finished(tiny_config, tmp_path, command):
    config = tiny_config(tmp_path)
    train(config, show_progress=False)
    found = examined(config, resume=True)
    assert "is finished: its newest checkpoint is of step 3 of 3" in told(found, "warning", "output")
    assert "This run is finished." in str(found) and "can start" not in str(found)
    longer = examined(config.with_changes(steps=4), resume=True)
    assert not told(longer, "warning", "output") and "This run can start" in str(longer)
    status, printed, _ = command("doctor", "--resume", tmp_path / "run")
    assert status == 1 and "This run is finished." in printed


def test_a_folder_that_holds_a_run_does_not_end_the_examination(tiny_config, tmp_path):
    config = tiny_config(tmp_path)
    train(config, show_progress=False)
    found = examined(config)
    assert "already holds a run" in told(found, "refused", "output") and found.status == 2
    assert found.card is not None and told(found, "ok", "prompts") and told(found, "ok", "sampling noise")
    other = examined(config.with_changes(seed=1), resume=True)
    assert "was made with seed=0" in told(other, "refused", "output") and other.card is not None
    assert "as it was before the run" in told(other, "ok", "student")


# ── What a line is about, and options of the command ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "options", "subject"),
    [
        ({}, {"processes": 0}, "processes"),
        ({}, {"prompts": 0}, "measurement"),
        ({}, {"card_tokens": 0}, "measurement"),
        ({"dataset": None}, {}, "prompts"),
        ({"engine": "vllm"}, {}, "engine"),
        ({"fused_kernels": True}, {}, "fused_kernels"),
        ({"teacher": "nobody/b"}, {}, "pair"),
        ({"chat_template": True}, {}, "chat template"),
        ({"max_new_tokens": 125}, {}, "prompts"),
    ],
)
def test_a_refusal_names_what_it_is_about(tiny_config, tmp_path, changes, options, subject):
    found = examined(tiny_config(tmp_path, **changes), **options)
    assert [f.subject for f in found.findings if f.level == "refused"] == [subject]


def test_how_much_is_measured_is_chosen_on_the_command_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, _ = command("doctor", "--prompts", 3, "--card-tokens", 10)
    assert status == 1 and "On 3 prompts, responses cut after 10 tokens" in printed and "--card-tokens 80" in printed
    status, printed, error = command("doctor", "--prompts=0")
    assert status == 2 and "prompts must be 1 or more, but is 0" in printed and not error


def test_a_resume_is_examined_as_training_takes_it(tiny_config, tmp_path):
    """A run that was killed before its first checkpoint begins again; fewer steps than are made are refused."""
    config = tiny_config(tmp_path, steps=2)
    train(config, show_progress=False)
    fewer = examined(config.with_changes(steps=1), resume=True)
    assert "has made 2 steps" in told(fewer, "refused", "output")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    anew = examined(config, resume=True)
    assert not [f for f in anew.findings if f.level == "refused"] and not anew.run_finished
