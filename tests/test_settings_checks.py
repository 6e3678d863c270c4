"""Settings that do not suit their student: the doctor and ``train`` say so, with what to change."""

import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tgpo_lab.cli.doctor import parse_launch
from tgpo_lab.cli.train import parse_training
from tgpo_lab.config import PRESETS, TrainConfig
from tgpo_lab.doctor import settings_checks
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.doctor.settings_checks import LARGE, MIDDLE_WEIGHT, settings_to_change, warn_of_settings
from tgpo_lab.errors import InputError
from tgpo_lab.methods import GRPO, ReverseKLPolicyGradient, make_method
from tgpo_lab.models.pairs import DATA, load_pair

REAL = {"student": "Qwen/Qwen2.5-Math-1.5B", "teacher": "Qwen/Qwen3-4B", "dataset": "openai/gsm8k"}
WEIGHTS = 1_543_714_304
# Attention's four matrices, three of the feed-forward, two norms; embeddings, which are the output layer; last norm.
OF_THE_FOLDER = 16 * (4 * 1536**2 + 3 * 1536 * 6144 + 2 * 1536) + 2048 * 1536 + 1536
FITTING = {"reward": "last_number", "max_new_tokens": 1024, "learning_rate": 1e-6}


def said(config: TrainConfig, weights: int | None = WEIGHTS, width: int | None = 1536) -> str:
    return "\n".join(" ".join(finding) for finding in settings_to_change(config, weights, width))


def test_the_tiny_worlds_settings_for_a_real_student_are_all_named():
    text = said(TrainConfig(**REAL))
    for part in ("learning_rate is 0.0003 for all 1,544 million weights", "the paper's is 1e-06",
                 "--lora-rank 32 --learning-rate 1e-05", "reward marked_answer (the integer after the last #)",
                 "max_new_tokens 80", "LinearDecay(initial=0.02, rate=0.0002, floor=0.0)",
                 "--preset gpu-24gb (Qwen/Qwen2.5-Math-1.5B taught by Qwen/Qwen3-4B)", "--preset gpu-80gb",
                 "--preset paper"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("method", ["tgpo", "kdrl", "rkl", "sft"])
def test_of_a_presets_own_settings_nothing_is_said(preset, method):
    assert said(TrainConfig.preset(preset, method), 10**5 if preset == "tiny" else WEIGHTS, 3584) == ""


def test_the_tiny_world_holds_no_large_student():
    for folder in (DATA / "models").iterdir():
        if (folder / "config.json").exists():
            assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() < LARGE / 10


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"learning_rate": 2e-5}, "learning_rate is 2e-05 for all"),
        ({"learning_rate": 1e-5}, None),
        ({"lora_rank": 32, "learning_rate": 1e-3}, None),
        ({"lora_rank": 32, "learning_rate": 2e-3}, "1e-05 in gpu-24gb, 1e-05 in gpu-80gb"),
        ({"lora_rank": 32, "learning_rate": 2e-3, "max_new_tokens": 80}, "max_new_tokens 80"),
        ({"reward": "marked_answer"}, "reward marked_answer"),
        ({"lora_rank": 1537, "learning_rate": 1e-5}, "Lower lora_rank to 1536 or less"),
        ({"lora_rank": 1536, "learning_rate": 1e-5}, None),
    ],
)
def test_each_setting_has_a_limit(changes, part):
    text = said(TrainConfig(**{**REAL, **FITTING, **changes}))
    assert (part in text) if part else text == ""


def test_a_method_with_the_papers_weight_is_not_named():
    config = TrainConfig(**REAL, method=make_method("tgpo"))
    assert "max_new_tokens 80" in said(config) and "LinearDecay" not in said(config)


def test_a_rate_as_large_as_the_weights_is_warned_about_with_any_student(tmp_path):
    config = TrainConfig.preset("tiny", learning_rate=1e30, output=str(tmp_path / "run"))
    found = diagnose(config, prompts=2, card_tokens=4, device="cpu")
    (finding,) = [f for f in found.findings if f.subject == "settings"]
    assert finding.level == "warning" and "learning_rate is 1e+30" in finding.text and "0.0003" in finding.change
    assert said(TrainConfig(learning_rate=0.1), None, None) == ""
    for name in ("near", "mid", "far"):
        weights = torch.cat([p.detach().abs().flatten() for p in load_pair(name).student.parameters()])
        assert MIDDLE_WEIGHT - 0.01 < float(weights.median()) < MIDDLE_WEIGHT


@pytest.fixture
def real_student(tmp_path, random_pair):
    """The configuration of a student of 605 million weights, with a tokenizer and without the weights."""
    folder = tmp_path / "real"
    LlamaConfig(
        vocab_size=2048, hidden_size=1536, intermediate_size=6144, num_hidden_layers=16, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(random_pair.student).save_pretrained(folder)
    return folder


def test_the_doctor_warns_before_anything_is_loaded(real_student, random_pair, tiny_config, tmp_path):
    config = tiny_config(tmp_path, student=str(real_student), max_new_tokens=80)
    found = diagnose(config, device="cpu", available_memory=10**9)
    settings = [f for f in found.findings if f.subject == "settings"]
    assert [f.level for f in settings] == ["warning", "warning"]
    assert [(f.text, f.change) for f in settings] == settings_to_change(config, OF_THE_FOLDER, 1536)


def test_training_says_the_same_once_on_the_error_stream(real_student, random_pair, tiny_config, tmp_path, capsys,
                                                         monkeypatch):  # fmt: skip
    config = tiny_config(tmp_path, student=str(real_student))
    warn_of_settings(config)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"tgpo-lab: {text} {change}" for text, change in settings_to_change(config, OF_THE_FOLDER, 1536)]
    assert len(lines) == 2
    monkeypatch.setenv("RANK", "1")
    warn_of_settings(config)
    assert capsys.readouterr().err == ""


def test_the_command_warns_and_goes_on(command, random_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--student", random_pair.student, "--teacher", random_pair.teacher, "--dataset", random_pair.prompts]
    flags += ["--steps=1", "--max-new-tokens=12", "--evaluation-prompts=4", "--prompts-per-step=2", "--group-size=2"]
    status, _, error = command("train", *flags, "--quiet")
    assert status == 0 and error == ""
    monkeypatch.setattr(settings_checks, "LARGE", 1000)
    status, _, error = command("train", *flags, "--quiet", "--output=run")
    assert status == 0 and error.count("learning_rate is 0.0003") == 1 and error.count("\n") == 2
    status, _, error = command("train", "--resume=run", "--quiet")
    assert status == 0 and error == ""


# ── Values that are none ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", [GRPO, ReverseKLPolicyGradient])
def test_the_lower_clip_is_a_share_or_none(method):
    for value in (0.0, 0.2, 1.0, float("inf")):
        assert method(clip_low=value).clip_low == value
    for value in (-0.1, 1.01, 5.0, float("nan")):
        with pytest.raises(InputError, match="clip_low must be from 0 to 1, or inf"):
            method(clip_low=value)
    with pytest.raises(InputError, match="clip_high must be 0 or more"):
        method(clip_high=-0.1)


@pytest.mark.parametrize("name", ["student", "teacher", "dataset"])
def test_an_empty_name_is_refused_in_one_sentence(command, name):
    for words in (["doctor"], ["train"]):
        status, printed, error = command(*words, f"--{name}=", *(["--teacher=x"] if name == "student" else []))
        assert status == 2 and printed == "" and error.count("\n") == 1 and f"{name} is empty" in error


def test_a_preset_takes_a_pair_of_ones_own():
    """As the warning advises."""
    _, config = parse_training(["--preset=gpu-24gb", "--student=a", "--teacher=b", "--dataset=c"])
    assert (config.student, config.teacher, config.dataset) == ("a", "b", "c")
    assert config.learning_rate == PRESETS["gpu-24gb"]["learning_rate"] and config.method == make_method("tgpo")


def commands_of_the_readme() -> list[list[str]]:
    """Words after ``tgpo-lab``, or ``-m tgpo_lab``, of every command that trains or examines."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    starts = ("tgpo-lab ", "accelerate launch ", "torchrun ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(starts)]
    places = [(line, i + 1) for line in lines for i, word in enumerate(line) if word in ("tgpo-lab", "tgpo_lab")]
    return [line[i:] for line, i in places if line[i : i + 1] in (["train"], ["doctor"]) and "--resume" not in line]


@pytest.mark.parametrize("words", commands_of_the_readme(), ids=" ".join)
def test_the_readmes_commands_are_read_and_suit_their_students(words):
    if "tensorboard" in words:
        pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    choice, config = parse_training(parse_launch(words[1:])[1] if words[0] == "doctor" else words[1:], words[0])
    assert (choice.preset == "tiny") == (config.teacher is None)
    if config.teacher is not None:
        assert said(config) == ""


def test_the_readme_has_such_commands():
    assert len(commands_of_the_readme()) >= 10
