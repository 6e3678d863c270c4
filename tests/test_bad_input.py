"""Bad input ends a command with status 2, one sentence that helps, no traceback and nothing half-written."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tgpo_lab.config import TrainConfig
from tgpo_lab.methods import method_entries
from tgpo_lab.training import train

ROOT = Path(__file__).resolve().parent.parent


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: path → bytes, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Run a command in ``tmp_path`` that has to refuse; gives the sentence. The folder stays as it was."""
    monkeypatch.chdir(tmp_path)  # default output folders are relative

    def run(*arguments: object, names: tuple[str, ...] = ()) -> str:
        before = contents(tmp_path)
        status, printed, error = command(*arguments)
        assert status == 2, f"status {status}, printed {printed!r}, error {error!r}"
        assert printed == ""
        assert error.startswith("tgpo-lab: ") and error.count("\n") == 1 and error.endswith("\n")
        for name in names:
            assert name in error
        assert contents(tmp_path) == before
        return error

    return run


@pytest.fixture
def refused_training(refused, random_pair):
    """The same for ``train`` on the random pair, with some flags changed or added."""

    def run(*flags: object, names: tuple[str, ...] = (), **changed: object) -> str:
        usual = {
            "student": random_pair.student,
            "teacher": random_pair.teacher,
            "dataset": random_pair.prompts,
            "output": "run",
            "steps": 1,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_new_tokens": 4,
            "evaluation_prompts": 4,
        }
        given = [f"--{name.replace('_', '-')}={value}" for name, value in {**usual, **changed}.items()]
        return refused("train", "--quiet", *given, *flags, names=names)

    return run


# ── Settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["nonsense"], ("'nonsense'", "train", "evaluate", "pairs", "demo")),
        (["train", "--preset", "huge"], ("'huge'", "tiny", "paper")),
        (["train", "--method", "tpgo"], ("'tpgo'", "tgpo", "grpo", "rkl")),
        (["train", "--reward", "vibes"], ("'vibes'", "marked_answer", "exact_match")),
        (["train", "--student", "fra"], ("'fra'", "near", "path")),
        (["evaluate", "--student", "fra"], ("'fra'", "near", "path")),
        (["pairs", "measure", "fra"], ("'fra'", "near", "path")),
        (["pairs", "build", "fra", "--output", "out"], ("'fra'", "near", "far-fragile")),
        (["demo", "--pair", "fra", "--output", "out"], ("'fra'", "near")),
        (["demo", "--steps", "0", "--output", "out"], ("steps", "0")),
        (["pairs", "build", "far", "--threads", "0", "--output", "out"], ("threads", "0")),
        (["pairs", "build", "far", "--opening-logprob=-31", "--rename=x"], ("opening_logprob", "−30 to 0", "-31")),
        (["pairs", "build", "far", "--rival-margin=nan", "--rename=x"], ("rival_margin", "−10 to 10", "nan")),
        (["pairs", "build", "far", "--reliability=1.5", "--rename=x"], ("reliability", "0 to 1", "1.5")),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(refused, arguments, names):
    refused(*arguments, names=names)


@pytest.mark.parametrize("dial", ["--opening-logprob=-11", "--rival-margin=0", "--reliability=0.5"])
def test_a_pair_with_a_dial_turned_needs_a_name_of_its_own(refused, dial):
    refused("pairs", "build", "far", dial, names=("'far'", "--rename"))
    for name in ("near", "far"):
        refused("pairs", "build", "far", dial, "--rename", name, names=("rename", f"'{name}'", "shipped"))


@pytest.mark.parametrize("name", ["", ".", "..", "../far", "a/b", "/tmp/x", ".hidden", "two words", "x" * 300, "mid"])
def test_a_pair_is_renamed_to_a_folder_of_its_own(refused, name):
    refused("pairs", "build", "far", f"--rename={name}", names=("rename", f"'{name}'"))


def test_an_output_folder_is_not_made_for_a_pair_that_does_not_exist(refused):
    refused("pairs", "measure", "fra", "--output", "out", names=("'fra'",))


@pytest.mark.parametrize("method", ["grpo", "grpo++", "tgpo", "luffy", "kdrl"])
def test_group_advantages_need_groups(refused_training, method):
    refused_training("--method", method, group_size=1, names=("group_size", "2 or more", "1"))


def test_a_group_of_one_is_enough_for_reverse_kl(command, tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, method="rkl", group_size=1, steps=1), show_progress=False)
    assert run.completed and run.metrics["tokens"][0] > 0


@pytest.mark.parametrize("temperature", ["0", "-1", "nan", "inf"])
def test_training_needs_a_temperature_above_zero(refused_training, temperature):
    refused_training(temperature=temperature, names=("temperature", temperature))


@pytest.mark.parametrize(
    "schedule",
    [
        "-0.5",
        "Constant(-0.1)",
        "LinearDecay(-0.02, 0.0002)",
        "LinearDecay(0.02, -0.0002)",
        "LinearDecay(0.02, 0.0002, floor=-1)",
        "Trapezoid(-0.02, 50, 100)",
        "Trapezoid(0.02, 50, 100, floor=-0.01)",
        "UntilAgreement(-0.02)",
    ],
)
def test_guidance_never_has_a_negative_weight(refused_training, schedule):
    refused_training(f"--method.weight={schedule}", names=("0 or more", "-"))


@pytest.mark.parametrize("schedule", ["nan", "Constant(nan)", "Constant(1e999)", "Falling(1)", "0.02 0.1", "()", ""])
def test_what_is_not_a_schedule_of_finite_numbers(refused_training, schedule):
    refused_training(f"--method.weight={schedule}")


CONFIG_FLOATS = [f.name for f in fields(TrainConfig) if f.type == "float"]
CONFIG_INTEGERS = [f.name for f in fields(TrainConfig) if f.type == "int"]
# One method for each class; a gate of TGPO, because without one its threshold is not read.
METHODS = {type(entry.method): entry.name for entry in method_entries() if entry.name != "tgpo-unconditioned"}
METHOD_FLOATS = [(m, f.name) for method, m in METHODS.items() for f in fields(method) if f.type == "float"]


def test_the_numbers_below_are_all_there():
    assert {"learning_rate", "weight_decay", "adam_beta1"} <= set(CONFIG_FLOATS)
    assert {"steps", "seed", "mini_batches"} <= set(CONFIG_INTEGERS)
    assert {("luffy", "gamma"), ("forward-kl", "beta"), ("tgpo-soft-horizon", "doubt_memory")} <= set(METHOD_FLOATS)


@pytest.mark.parametrize("name", CONFIG_FLOATS)
def test_no_setting_takes_nan(refused_training, name):
    refused_training(**{name: "nan"}, names=(name, "nan"))


@pytest.mark.parametrize("method, name", METHOD_FLOATS)
def test_no_option_of_a_method_takes_nan(refused_training, method, name):
    refused_training("--method", method, f"--method.{name.replace('_', '-')}=nan", names=(name, "nan"))


@pytest.mark.parametrize("name", CONFIG_INTEGERS)
def test_no_number_of_things_is_negative(refused_training, name):
    refused_training(**{name: -1}, names=(name, "-1"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("prompts_per_step", 0),
        ("max_new_tokens", 0),
        ("mini_batches", 0),
        ("passes", 0),
        ("checkpoint_every", 0),
        ("evaluation_prompts", 0),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", "inf"),
        ("weight_decay", "inf"),
        ("weight_decay", -0.1),
        ("max_gradient_norm", 0),
        ("adam_beta1", 1.5),
        ("adam_beta1", -0.1),
        ("adam_beta2", 1.0),
    ],
)
def test_values_that_cannot_work(refused_training, name, value):
    refused_training(**{name: value}, names=(name, str(value)))


def test_a_mini_batch_holds_whole_groups(refused_training):
    refused_training(mini_batches=3, names=("mini_batches", "3", "prompts_per_step", "2"))


@pytest.mark.parametrize("k", [0, 2049])
def test_the_teachers_best_tokens_are_at_most_the_vocabulary(refused_training, k):
    refused_training("--method", "tgpo-top-k", f"--method.guidance-top-k={k}", names=("guidance_top_k", str(k)))


@pytest.mark.parametrize("name, value", [("gate_threshold", 0), ("doubt_memory", 1.5), ("doubt_memory", -1)])
def test_a_trust_horizon_that_cannot_work(refused_training, name, value):
    flag = f"--method.{name.replace('_', '-')}={value}"
    refused_training("--method", "tgpo-recovering-horizon", flag, names=(name, str(value)))


def test_an_option_of_the_trust_horizon_is_not_passed_over_without_one(refused_training):
    refused_training("--method", "tgpo", "--method.soft-horizon", names=("soft_horizon", "trust_horizon", "none"))


@pytest.mark.parametrize(
    "flag, value", [("--steps", "many"), ("--precision", "float16"), ("--stepz", "3"), ("--method.beta", "1")]
)
def test_the_parser_names_the_flag_that_it_does_not_take(command, flag, value):
    status, printed, error = command("train", flag, value)
    assert (status, printed) == (2, "")
    assert flag in error and "Traceback" not in error


@pytest.mark.parametrize(
    "flag, value",
    [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("count", "0"),
        ("samples-per-prompt", "0"),
        ("max-new-tokens", "0"),
    ],
)
def test_evaluating_with_values_that_cannot_work(refused, random_pair, flag, value):
    pair = ("--student", random_pair.student, "--teacher", random_pair.teacher, "--dataset", random_pair.prompts)
    refused("evaluate", *pair, f"--{flag}={value}", names=(flag.replace("-", "_"), value))


@pytest.mark.parametrize("flag, value", [("count", "0"), ("count", "-3"), ("max-new-tokens", "0"), ("reward", "vibes")])
def test_measuring_with_values_that_cannot_work(refused, random_pair, flag, value):
    refused(
        *("pairs", "measure", random_pair.student, random_pair.teacher, "--dataset", random_pair.prompts),
        f"--{flag}={value}",
        names=(flag.replace("-", "_"), value),
    )


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────

GOOD = "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(20))


def two_good_lines_and(line: str) -> str:
    return "\n".join([*GOOD.splitlines()[:2], line, ""])


@pytest.mark.parametrize(
    "text, names",
    [
        ("", ("no prompts", "JSON object")),
        ("\n \n", ("no prompts", "JSON object")),
        (two_good_lines_and('{"prompt": "1+1=", "answer": "2"'), ("line 3",)),
        (two_good_lines_and("{'prompt': '1+1=', 'answer': '2'}"), ("line 3",)),
        (two_good_lines_and("1+1=2"), ("line 3",)),
        (two_good_lines_and('["1+1=", "2"]'), ("line 3", "list")),
        (two_good_lines_and('"1+1="'), ("line 3", "str")),
        (two_good_lines_and('{"prompt": "1+1="}'), ("line 3", "'answer'", "['prompt']")),
        (two_good_lines_and('{"question": "1+1=", "answer": "2"}'), ("line 3", "'prompt'", "'question'")),
        (two_good_lines_and('{"prompt": "1+1=", "answer": 2.5}'), ("line 3", "'answer'", "2.5", "as text")),
        (
            two_good_lines_and('{"prompt": [{"role": "system", "content": "1+1="}], "answer": "2"}'),
            ("line 3", "'prompt'", "one message of the user", "['system']"),
        ),
        (two_good_lines_and('{"prompt": "1+1=", "answer": null}'), ("line 3", "'answer'", "None")),
        (two_good_lines_and('{"prompt": "1+1=", "answer": true}'), ("line 3", "'answer'", "True")),
        (two_good_lines_and('{"prompt": ["1+1="], "answer": "2"}'), ("line 3", "'prompt'", "['1+1=']")),
        (two_good_lines_and('{"prompt": "  ", "answer": "2"}'), ("line 3", "'prompt'")),
        (two_good_lines_and('{"prompt": "1+1=", "answer": NaN}'), ("line 3", "'answer'", "nan")),
        (two_good_lines_and('{"prompt": "1+1=", "answer": ' + "1" * 5000 + "}"), ("line 3",)),
        (two_good_lines_and("[" * 50_000), ("line 3",)),
        (two_good_lines_and('{"prompt": "\\ud800", "answer": "2"}'), ("line 3",)),
    ],
)
def test_a_malformed_prompt_file_is_refused_with_file_and_line(refused_training, tmp_path, text, names):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    refused_training(dataset=file, names=(str(file), *names))


@pytest.mark.parametrize("line", [0, 3])
def test_a_prompt_file_that_is_not_utf8(refused_training, tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    lines = GOOD.encode().splitlines(keepends=True)
    lines.insert(line, '{"prompt": "½+½=", "answer": "1"}\n'.encode("latin-1"))
    file.write_bytes(b"".join(lines))
    refused_training(dataset=file, names=(str(file), f"line {line + 1}"))


def test_a_column_that_is_not_there_is_named(refused_training):
    refused_training("--answer-column=solution", names=("train.jsonl, line 1", "'solution'", "'answer'"))


def test_a_prompt_may_stand_in_one_split_only(refused_training, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "train.jsonl").write_text(GOOD)
    (folder / "validation.jsonl").write_text('{"prompt": "5+1=", "answer": "6"}\n')
    refused_training(dataset=folder, names=(str(folder), "'5+1='", "train", "validation"))


def test_prompts_that_are_not_there(refused_training, tmp_path):
    refused_training(dataset=tmp_path / "none.jsonl", names=(str(tmp_path / "none.jsonl"),))
    refused_training(dataset=tmp_path / "none", names=(str(tmp_path / "none"),))
    refused_training(dataset="nobody/nothing", names=("'nobody/nothing'", "train.jsonl"))


def test_a_folder_without_training_prompts(refused_training, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "test.jsonl").write_text(GOOD)
    refused_training(dataset=folder, names=(str(folder), "train.jsonl"))
    (folder / "train.jsonl").mkdir()
    refused_training(dataset=folder, names=(str(folder), "train.jsonl"))


def test_too_few_prompts_to_hold_some_out(refused_training, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(GOOD.splitlines(keepends=True)[:7]))
    refused_training(dataset=file, evaluation_prompts=4, names=("7", "4", "validation.jsonl", "evaluation_prompts"))


def test_options_that_are_empty(refused_training, refused, random_pair):
    refused_training(dataset="", names=("dataset is empty", "train.jsonl"))
    refused("train", "--dataset", "", names=("dataset is empty", "leave dataset out"))  # not the pair's own, silently
    refused_training("--answer-after=", names=("answer_after is empty", "####"))
    pair = ("--student", random_pair.student, "--teacher", random_pair.teacher)
    refused("evaluate", *pair, "--dataset=", names=("dataset's name is empty",))
    refused("evaluate", *pair, "--dataset", random_pair.prompts, "--answer-after=", names=("answer_after is empty",))


def test_prompt_options_that_cannot_work(refused_training):
    refused_training("--answer-after=####", names=("train.jsonl, line 1", "'####'", "answer_after"))
    refused_training("--train-split=easy", names=("easy.jsonl", "train_split"))
    refused_training("--validation-split=easy", names=("'easy'", "validation_split", "one of test, train, validation"))
    refused_training("--teacher-server-model=draft", names=("teacher_server_model", "'draft'", "no teacher_server"))
    refused_training("--teacher-cache=kept", names=("teacher_cache", "tgpo", "sft, luffy or tgpo-unconditioned"))
    refused_training("--prompt-template=Solve:", names=("prompt_template", "{prompt}"))
    refused_training("--system-prompt=Be brief.", names=("system_prompt", "chat_template"))
    refused_training("--chat-template", names=("no chat template",))


@pytest.mark.parametrize(
    "option, value", [("train-split", "foo"), ("validation-split", "foo"), ("dataset-config", "main")]
)
def test_options_of_a_folder_do_not_go_with_a_single_file(refused_training, tmp_path, option, value):
    (tmp_path / "prompts.jsonl").write_text(GOOD)
    names = ("prompts.jsonl is one file", f"{option.replace('-', '_')} '{value}'", "would change nothing")
    refused_training(f"--{option}={value}", dataset=tmp_path / "prompts.jsonl", names=names)


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--reward=no.such.module:judge", ("no.such.module:judge", "ModuleNotFoundError")),
        ("--reward=math:hypotenuse", ("math:hypotenuse", "no function")),
        ("--reward=os.path:isfile", ("os.path:isfile", "must take the response and the right answer")),
        ("--trackers=paper", ("'paper'", "tensorboard, wandb, trackio")),
        ("--lora-rank=-1", ("lora_rank", "-1")),
        ("--lora-merged", ("lora_merged", "lora_rank is 0")),
        ("--lora-alpha=0", ("lora_alpha", "above 0")),
    ],
)
def test_rewards_trackers_and_adapters_that_cannot_be(refused_training, flag, names):
    refused_training(flag, names=names)


def test_a_reward_that_fails_in_a_run_stops_it_with_a_sentence_and_the_run_goes_on_once_it_is_mended(
    command, random_pair, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "mended_reward.py"
    module.write_text("def judge(response, answer):\n    raise ValueError('no luck')\n")
    given = [f"--student={random_pair.student}", f"--teacher={random_pair.teacher}", "--steps=1", "--output=run"]
    given += [f"--dataset={random_pair.prompts}", "--max-new-tokens=12", "--evaluation-prompts=4", "--evaluate-every=0"]
    status, _, error = command("train", "--quiet", *given, "--reward=mended_reward:judge")
    assert status == 2 and error.count("\n") == 1
    assert all(part in error for part in ("mended_reward:judge", "ValueError: no luck", "for the response '", "'7'"))
    module.write_text("def judge(response, answer):\n    return 1.0\n")
    monkeypatch.delitem(sys.modules, "mended_reward")
    importlib.invalidate_caches()
    assert command("train", "--quiet", "--resume", "run")[0] == 0


def test_a_pair_without_prompts_needs_a_dataset(refused, random_pair):
    pair = random_pair.student, random_pair.teacher
    refused("train", "--student", pair[0], "--teacher", pair[1], names=("dataset", "train.jsonl"))
    refused("evaluate", "--student", pair[0], "--teacher", pair[1], names=("dataset", "train.jsonl"))
    refused("pairs", "measure", *pair, names=("dataset", "train.jsonl"))


@pytest.mark.parametrize(
    "command_line", [["train"], ["evaluate"], ["evaluate", "--model=teacher"], ["pairs", "measure"]]
)
def test_prompts_that_leave_no_room_for_the_response(refused, random_pair, tmp_path, command_line):
    # The random pair reads 128 tokens.
    file = tmp_path / "prompts.jsonl"
    long = json.dumps({"prompt": "1+" * 50 + "1=", "answer": "51"})
    file.write_text(GOOD + long + "\n")
    pair = [random_pair.student, random_pair.teacher]
    if command_line[0] == "pairs":
        flags = [*pair, "--output=out"]
    else:
        flags = [f"--student={pair[0]}", f"--teacher={pair[1]}"]
        flags += ["--output=out", "--evaluation-prompts=4"] if command_line == ["train"] else ["--split=train"]
    names = ("102 tokens", "(80)", "128", "max_new_tokens")
    refused(*command_line, *flags, f"--dataset={file}", "--max-new-tokens=80", names=names)


def test_a_split_that_is_not_there(refused, random_pair, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(GOOD)
    pair = ("--student", random_pair.student, "--teacher", random_pair.teacher)
    refused("evaluate", *pair, "--dataset", file, names=(str(file), "'test'", "train"))


def test_a_right_answer_that_last_number_cannot_read(refused_training, tmp_path):
    """The run would otherwise end in the step in which a response to that prompt is judged."""
    rows = [{"prompt": f"1+{n}=", "answer": "seven" if n == 3 else "7"} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused_training(dataset=tmp_path / "train.jsonl", reward="last_number", names=("last_number", "'seven' has none"))


# ── Models ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def broken(random_pair, tmp_path):
    """A copy of the random pair's student, to be damaged."""
    return Path(shutil.copytree(random_pair.student, tmp_path / "broken"))


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_tokenizers_with_other_ids_for_the_same_tokens(refused_training, random_pair, broken):
    def swap(value):
        vocabulary = value["model"]["vocab"]
        vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]

    edit_json(broken / "tokenizer.json", swap)
    names = (str(broken), str(random_pair.student), "tokenizers differ", "2 disagree", "'7'")
    refused_training(teacher=broken, student=random_pair.student, names=names)


def test_a_tokenizer_with_a_token_between_those_of_the_other(refused_training, random_pair, broken):
    def remove(value):
        value["model"]["vocab"].pop("8")

    edit_json(broken / "tokenizer.json", remove)
    names = (str(random_pair.student), str(broken), "tokenizers differ", "1 ordinary", "'8'")
    refused_training(teacher=broken, student=random_pair.student, names=names)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens(refused_training, broken, role):
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.resize_token_embeddings(2000)
    model.save_pretrained(broken)
    refused_training(**{role: broken}, names=(str(broken), "2000", "2048"))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_that_was_cut_short(refused_training, broken, name, share, role):
    file = broken / name
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused_training(**{role: broken}, names=(str(broken),))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_with_a_file_missing(refused_training, broken, name):
    (broken / name).unlink()
    refused_training(student=broken, names=(str(broken),))


def test_a_checkpoint_with_a_tensor_missing(refused_training, broken):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]  # it must not be filled with random numbers
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused_training(student=broken, names=(str(broken),))


def test_a_checkpoint_with_a_tensor_of_another_shape(refused_training, broken):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:5].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused_training(student=broken, names=(str(broken),))


def test_a_tokenizer_without_an_end_of_sequence(refused_training, random_pair, broken):
    other = shutil.copytree(broken, broken.parent / "other")
    for folder in (broken, other):
        edit_json(folder / "tokenizer_config.json", lambda value: value.pop("eos_token"))
        edit_json(folder / "config.json", lambda value: value.pop("eos_token_id"))
        (folder / "generation_config.json").unlink()
    refused_training(student=broken, teacher=other, names=(str(broken), "eos_token"))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "quantised, package",
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ],
)
def test_quantised_weights_whose_package_is_not_installed(refused_training, broken, role, quantised, package):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip("it is installed")
    edit_json(broken / "config.json", lambda value: value.update(quantization_config=quantised))
    refused_training(**{role: broken}, names=(str(broken), package, "not installed", "quantised"))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_there(refused_training, tmp_path, role):
    refused_training(**{role: tmp_path / "none"}, names=(str(tmp_path / "none"),))
    refused_training(**{role: "nobody/nothing"}, names=("nobody/nothing", "network"))


def test_a_model_that_the_hub_does_not_give_to_everybody(refused_training, monkeypatch):
    def gated(name, **options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    refused_training(student="some-org/some-model", names=("some-org/some-model", "access a gated repo", "login"))


def test_an_architecture_of_a_later_version(refused_training, broken):
    edit_json(broken / "config.json", lambda value: value.update(model_type="llama-of-tomorrow"))
    refused_training(teacher=broken, names=(str(broken), "llama-of-tomorrow", "version of Transformers is out of date"))


# ── Output ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/tgpo-lab"])
def test_output_that_cannot_be_written(refused_training, refused, random_pair, tmp_path, output):
    # As root no permission stops a writer; a file in the way and a read-only file system do.
    (tmp_path / "file").write_text("a file")
    refused_training(output=output, names=(output, "another output folder"))
    pair = (random_pair.student, random_pair.teacher, "--dataset", random_pair.prompts, "--max-new-tokens=8")
    refused("pairs", "measure", *pair, "--output", output, names=(output, "another output folder"))


@pytest.mark.parametrize("setting", ["output", "dataset", "student", "teacher"])
def test_a_path_longer_than_any_file_name(refused_training, setting):
    refused_training(**{setting: "/tmp/" + "x" * 300}, names=("x" * 300,))


def test_a_second_run_does_not_write_over_the_first(refused_training, finished_run):
    refused_training(output=finished_run, names=(str(finished_run), "already holds a run", "--resume"))


# ── Resuming ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made_run(tmp_path_factory, tiny_config):
    return train(tiny_config(tmp_path_factory.mktemp("made"), checkpoint_every=1), show_progress=False).directory


@pytest.fixture
def finished_run(made_run, tmp_path) -> Path:
    """A copy of a run of three steps with its latest two checkpoints."""
    return Path(shutil.copytree(made_run, tmp_path / "finished"))


@pytest.fixture
def refused_resume(refused, finished_run):
    def run(*flags: object, names: tuple[str, ...] = (), folder: object = finished_run) -> str:
        return refused("train", "--quiet", "--resume", folder, "--steps", 4, *flags, names=names)

    return run


def test_the_run_that_is_damaged_below_can_be_resumed(command, finished_run):
    status, printed, error = command("train", "--quiet", "--resume", finished_run, "--steps", 4)
    assert (status, error) == (0, "")
    assert str(finished_run) in printed and (finished_run / "checkpoints" / "step-000004").is_dir()


def test_there_is_no_run_to_resume(refused_resume, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    for folder in ("empty", "file", "none"):
        refused_resume(folder=folder, names=(folder, "holds no run"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"config": null}', '{"config": {"method": {"class": "X"}}}']
)
def test_a_run_whose_configuration_is_damaged(refused_resume, finished_run, text):
    (finished_run / "config.json").write_text(text)
    refused_resume()


def test_a_run_of_a_version_with_other_settings(refused_resume, refused, finished_run):
    file = finished_run / "config.json"
    edit_json(file, lambda value: value["config"].update(setting_of_tomorrow=1))
    refused_resume(names=(str(file), "setting_of_tomorrow", "Take the version of tgpo_lab that made the run"))
    refused("evaluate", "--run", finished_run, names=(str(file), "setting_of_tomorrow"))


@pytest.mark.parametrize(
    "flag, name, stored, given",
    [
        ("--seed=5", "seed", "0", "5"),
        ("--learning-rate=0.5", "learning_rate", "0.0003", "0.5"),
        ("--method.weight=Constant(0.5)", "method", "LinearDecay", "Constant"),
    ],
)
def test_a_run_goes_on_with_its_own_configuration_only(refused_resume, flag, name, stored, given):
    refused_resume(flag, names=(name, stored, given))


@pytest.mark.parametrize("flag, value", [("--method", "grpo"), ("--preset", "paper")])
def test_a_method_or_preset_given_with_a_resume_is_not_passed_over(refused_resume, flag, value):
    refused_resume(flag, value, names=(value,))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_the_newest_checkpoint_is_damaged(refused_resume, finished_run, name, share):
    file = finished_run / "checkpoints" / "step-000003" / name
    if share is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused_resume(names=(str(file), "Remove it"))


def test_the_optimizer_is_damaged_without_a_change_of_size(refused_resume, finished_run):
    file = finished_run / "checkpoints" / "step-000003" / "optimizer.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    refused_resume(names=(str(file), "damaged"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"step": 3, "schedule": {}, "file_sizes": []}'])
def test_the_state_is_damaged(refused_resume, finished_run, text):
    (finished_run / "checkpoints" / "step-000003" / "state.json").write_text(text)
    refused_resume(names=("step-000003",))


def test_a_checkpoint_without_its_state_is_passed_over(refused_resume, command, finished_run):
    checkpoints = finished_run / "checkpoints"
    (checkpoints / "step-000003" / "state.json").unlink()
    status, _, _ = command("train", "--quiet", "--resume", finished_run)
    assert status == 0  # from step 2
    for checkpoint in checkpoints.glob("*"):
        (checkpoint / "state.json").unlink(missing_ok=True)
    refused_resume(names=(str(finished_run), "no whole checkpoint"))


@pytest.mark.parametrize("lines", ["[]\n", "{}\n", '{"step": 0\n{"step": 1}\n'])
def test_the_metrics_are_damaged(refused_resume, finished_run, lines):
    (finished_run / "metrics.jsonl").write_text(lines)
    refused_resume(names=("metrics.jsonl", "line 1"))


def test_a_damaged_run_cannot_be_evaluated(refused, finished_run, tmp_path):
    refused("evaluate", "--run", "none", names=("none", "holds no run"))
    file = finished_run / "checkpoints" / "step-000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused("evaluate", "--run", finished_run, names=(str(file),))


# ── As a program ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cause", ["unknown command", "cut checkpoint"])  # more would be slow: torch is imported
def test_the_program_itself_ends_with_status_2_and_one_line(random_pair, tmp_path, broken, cause):
    if cause == "unknown command":
        arguments, expected = ["nonsense"], "'nonsense'"
    else:
        (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
        arguments = ["train", "--student", broken, "--teacher", random_pair.teacher, "--dataset", random_pair.prompts]
        expected = str(broken)
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tgpo_lab", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tgpo-lab: ") and done.stderr.count("\n") == 1 and expected in done.stderr
    assert contents(tmp_path) == before
