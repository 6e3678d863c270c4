"""The command line: what it offers, how it reads it, and what its commands print."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import huggingface_hub.utils
import pytest
import torch

from tgpo_lab.cli import COMMANDS
from tgpo_lab.cli.evaluate import EvaluateOptions
from tgpo_lab.cli.train import parse_training
from tgpo_lab.config import PRESETS, TrainConfig
from tgpo_lab.diagnostics.pair_card import measure_pair
from tgpo_lab.evaluation import evaluate
from tgpo_lab.methods import TGPO, make_method, method_entries
from tgpo_lab.models.pairs import load_pair, shipped_pairs
from tgpo_lab.schedules import Constant, LinearDecay, Trapezoid, UntilAgreement
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.training import train

ROOT = Path(__file__).resolve().parent.parent
METHODS = [entry.name for entry in method_entries()]
OWN_FLAGS = {"preset", "method", "resume", "quiet"}  # of the train command itself


@pytest.fixture(autouse=True)
def in_a_wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def flags_in(text: str) -> set[str]:
    """Every ``--flag`` in a help text."""
    return set(re.findall(r"(?<![\w-])--([a-z][a-z0-9.-]*)", text))


# ── Help ─────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_command_all_commands_are_listed(command):
    status, printed, error = command("--help")
    assert (status, error) == (0, "")
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", printed, re.MULTILINE)
    assert command("-h") == command("help") == (0, printed, "")
    assert command() == (2, printed, "")


@pytest.mark.parametrize(
    "words", [[name] for name in COMMANDS] + [["pairs", name] for name in ("list", "measure", "build")], ids=" ".join
)
def test_every_command_explains_itself(command, words):
    status, printed, error = command(*words, "--help")
    assert (status, error) == (0, "")
    assert printed.startswith(f"usage: tgpo-lab {' '.join(words)}")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are other things there")
@pytest.mark.parametrize("words", [["train", "--help"], ["pairs", "list"], ["--help"]])
def test_a_pipe_that_is_read_no_further_ends_a_command_without_a_word(words):
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run([sys.executable, "-m", "tgpo_lab", *words], stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_run_goes_on_when_its_progress_is_read_no_further(tiny_config, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert train(tiny_config(tmp_path)).completed


def test_the_help_of_evaluate_names_every_option(command):
    _, printed, _ = command("evaluate", "--help")
    assert flags_in(printed) == {"help"} | {f.name.replace("_", "-") for f in fields(EvaluateOptions)}


def test_the_help_of_measure_names_every_option(command):
    _, printed, _ = command("pairs", "measure", "--help")
    assert flags_in(printed) == {
        "help", "dataset", "dataset-config", "prompt-column", "answer-column", "answer-after", "prompt-template",
        "chat-template", "chat-template-options", "system-prompt", "count", "max-new-tokens", "reward", "seed",
        "device", "precision", "output",
    }  # fmt: skip
    assert "STUDENT" in printed.upper() and "TEACHER" in printed.upper()


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_train_names_every_setting_and_every_option_of_the_method(command, method):
    status, printed, _ = command("train", "--method", method, "--help")
    assert status == 0
    expected = {"help", *OWN_FLAGS} | {f.name for f in fields(TrainConfig) if f.name != "method"}
    for option in fields(make_method(method)):
        expected.add(f"method.{option.name}")
    found = {flag.replace("-", "_") for flag in flags_in(printed)}
    switches = {f for f in found if re.match(r"(.*\.)?no_", f)}
    assert found - switches == expected
    for switch in switches:  # --no-x stands for a --x that is there
        assert re.sub(r"(^|\.)no_", r"\1", switch) in expected
    assert f"(now: {method})" in printed


def test_the_help_of_train_names_every_method_and_preset(command):
    _, printed, _ = command("train", "--help")
    for entry in method_entries():
        assert re.search(rf"^  {re.escape(entry.name)} +{re.escape(entry.summary)}", printed, re.MULTILINE)
    for preset in PRESETS:
        assert preset in printed


def test_help_does_not_wait_for_torch():
    code = "import sys, tgpo_lab.cli as cli; cli.main(['--help']); print([m in sys.modules for m in ('torch', 'tyro')])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("[False, False]\n"), done.stderr


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", [*METHODS, "jsd", "op-distill"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_can_be_chosen_in_every_preset(preset, method):
    _, config = parse_training(["--preset", preset, "--method", method])
    assert config.method == make_method(method, tiny=preset == "tiny")
    assert config.with_changes(output="") == TrainConfig.preset(preset, method, output="")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_json(preset, method):
    config = TrainConfig.preset(preset, method, learning_rate=1 / 3, seed=12)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert type(again.method) is type(config.method)
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize(
    "schedule",
    [Constant(1 / 3), LinearDecay(0.1, 1e-17, 1e-5), Trapezoid(0.5, 3, 9, 0.1), UntilAgreement(0.2, 0.5, 2, 7)],
    ids=lambda s: type(s).__name__,
)
def test_every_schedule_survives_json(schedule):
    config = TrainConfig(method=TGPO(weight=schedule, guidance="top_k", guidance_top_k=3, normalize_std=False))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("0.25", Constant(0.25)),
        ("Constant(0.25)", Constant(0.25)),
        ("LinearDecay(0.02, 0.0002)", LinearDecay(0.02, 0.0002)),
        ("LinearDecay(0.02, rate=2e-4, floor=0.01)", LinearDecay(0.02, 0.0002, 0.01)),
        ("Trapezoid(0.02, 50, 100)", Trapezoid(0.02, 50, 100)),
        ("UntilAgreement(0.02, patience=5)", UntilAgreement(0.02, patience=5)),
        (str(UntilAgreement(0.02, ramp=4)), UntilAgreement(0.02, ramp=4)),
    ],
)
@pytest.mark.parametrize("method", ["tgpo", "kdrl", "tgpo-constant"])
def test_schedules_are_read_from_the_command_line(method, text, schedule):
    for arguments in (["--method.weight", text], [f"--method.weight={text}"]):
        _, config = parse_training(["--method", method, *arguments])
        assert config.method.weight == schedule
        assert type(config.method.weight) is type(schedule)


def test_flags_change_what_they_name_and_nothing_else():
    choice, config = parse_training(
        [
            *("--steps", "7", "--method=kdrl", "--learning-rate", "1e-5", "--gradient-checkpointing", "--quiet"),
            *("--method.distil-on", "wrong_groups", "--method.no-normalize-std", "--output", "here"),
            *("--preset", "paper", "--dataset", "some/data", "--precision=float32"),
        ]
    )
    method = make_method("kdrl", distil_on="wrong_groups", normalize_std=False)
    assert config == TrainConfig.preset("paper", "kdrl", dataset="some/data").with_changes(
        method=method, steps=7, learning_rate=1e-5, output="here", precision="float32"
    )
    assert (choice.quiet, choice.resume) == (True, None)


def test_the_output_folder_is_named_after_method_and_student():
    assert parse_training(["--method", "rkl"])[1].output == "runs/rkl-far"
    assert parse_training(["--method", "rkl", "--student", "near"])[1].output == "runs/rkl-near"
    assert parse_training(["--student", "models/my-student", "--teacher", "x"])[1].output == "runs/tgpo-my-student"
    assert parse_training(["--student", "near", "--output=elsewhere"])[1].output == "elsewhere"


def test_a_resumed_run_brings_its_own_settings(tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, method="gkd", steps=1, seed=3), show_progress=False)
    moved = run.directory.rename(tmp_path / "moved")
    _, config = parse_training(["--resume", str(moved), "--steps", "2"])
    assert config == run.config.with_changes(output=str(moved), steps=2)


# ── Doing ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pair_flags(random_pair) -> list[str]:
    pair = ["--student", str(random_pair.student), "--teacher", str(random_pair.teacher)]
    return [*pair, "--dataset", str(random_pair.prompts)]


@pytest.fixture(scope="module")
def loaded(random_pair):
    return load_pair(random_pair.student, random_pair.teacher), load_prompts(random_pair.prompts)


def test_train_then_evaluate_then_resume(command, pair_flags, loaded, tmp_path):
    small = ["--steps=2", "--prompts-per-step=4", "--group-size=4", "--max-new-tokens=12", "--evaluation-prompts=6"]
    sets = [*small, "--learning-rate=0.05", "--evaluate-every=1", "--method=rkl", "--quiet"]
    status, printed, error = command("train", *pair_flags, *sets, "--output=run")
    assert (status, error) == (0, "")
    before, after = re.fullmatch(r"Held-out accuracy (\S+) → (\S+)\. The run is in run\.\n", printed).groups()
    pair, prompts = loaded
    first = evaluate(pair, prompts=prompts["validation"], max_new_tokens=12)
    assert before == f"{first.accuracy:.3f}"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and after == f"{rows[-1]['accuracy']:.3f}"

    at_twelve = ["--max-new-tokens=12", "--dataset", pair_flags[-1]]
    base = command("evaluate", *pair_flags[:4], *at_twelve)
    trained = command("evaluate", "--run", "run", *at_twelve)
    assert base[0] == trained[0] == 0
    assert trained[1] != base[1]  # the trained student answers
    validation = command("evaluate", "--run", "run", *at_twelve, "--split=validation")
    assert validation[1].startswith(f"accuracy {rows[-1]['accuracy']:.4f} ")
    assert command("evaluate", "--run", "run", "--split=validation") == validation  # the run's own data and length

    status, printed, _ = command("train", "--resume", "run", "--steps", "3")  # without --quiet
    assert status == 0
    assert "step 3/3" in printed and "step 2/3" not in printed
    assert printed.endswith("The run is in run.\n")


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_hides_how_far_downloads_have_come(command, pair_flags, monkeypatch, quiet):
    def downloading(name, config):
        for bar in (datasets.utils.tqdm, huggingface_hub.utils.tqdm):
            list(bar([1], desc="Downloading"))
        raise ConnectionError("gone")

    monkeypatch.setattr("tgpo_lab.tasks.prompts.load_dataset", downloading)
    try:
        flags = ["--quiet"] if quiet else []
        status, _, error = command("train", *flags, *pair_flags[:4], "--dataset=some/name", "--output=run")
    finally:
        datasets.enable_progress_bars()
        huggingface_hub.utils.enable_progress_bars()
    assert status == 2 and error.count("Downloading") == (0 if quiet else 4)  # each bar at its beginning and end


def test_evaluate_of_a_run_without_a_validation_split_asks_what_the_run_held_out(command, pair_flags, loaded, tmp_path):
    rows = loaded[1]["train"].to_list()
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ["--steps=1", "--prompts-per-step=4", "--group-size=4", "--max-new-tokens=12", "--evaluation-prompts=6"]
    status, _, error = command("train", *pair_flags[:4], "--dataset=mine.jsonl", *sets, "--quiet", "--output=run")
    assert (status, error) == (0, "")
    accuracy = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["accuracy"]
    for flags, name in (([], "test"), (["--split=validation"], "validation")):
        status, printed, error = command("evaluate", "--run", "run", "--show=99", *flags)
        assert (status, error) == (0, "")
        said, figures, *shown = printed.splitlines()
        assert said == f"mine.jsonl has no {name} split: these are the 6 prompts that the run held out."
        assert figures.startswith(f"accuracy {accuracy:.4f} ")
        assert len(shown) == 6 and all(s.startswith(row["prompt"]) for s, row in zip(shown, rows[-6:], strict=True))
    shown = command("evaluate", "--run", "run", "--show=99", "--split=train")[1].splitlines()[1:]
    assert len(shown) == len(rows) - 6
    assert all(s.startswith(row["prompt"]) for s, row in zip(shown, rows[:-6], strict=True))
    status, _, error = command("evaluate", "--run", "run", "--split=test")
    assert status == 2 and "has no split 'test': it has train. Choose one with --split" in error


def test_evaluate_of_a_run_with_the_teacher_does_not_show_the_student(command, tiny_config, tmp_path, pair_flags):
    train(tiny_config(tmp_path, steps=1), show_progress=False)
    flags = ["--max-new-tokens=12", "--temperature=1", "--dataset", pair_flags[-1]]
    status, printed, _ = command("evaluate", "--run", tmp_path / "run", "--model", "teacher", *flags)
    teacher = command("evaluate", *pair_flags[:4], "--model", "teacher", *flags)
    assert status == 2 or printed == teacher[1]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--run=run", "--student=near"], "--student near"),
        (["--run=run", "--teacher=near"], "--teacher near"),
        (["--run=run", "--chat-template"], "--chat-template out"),
        (["--run=run", "--prompt-template=Q: {prompt}"], "--prompt-template Q: {prompt}"),
        (["--run=run", "--system-prompt=Be brief."], "--system-prompt Be brief."),
        (["--run=run", "--chat-template-options", "a=1", "b=2"], "--chat-template-options a=1 b=2"),
        (["--run=run", "--answer-after=####"], "--answer-after ####"),
        (["--prompt-column=question"], "--prompt-column question"),
        (["--dataset-config=main"], "--dataset-config main"),
    ],
)
def test_evaluate_refuses_what_would_change_nothing(command, flags, named):
    status, printed, error = command("evaluate", *flags)
    assert (status, printed) == (2, "") and f"leave {named}" in error


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_evaluate_prints_accuracy_length_and_truncation(command, pair_flags, loaded, model):
    pair, prompts = loaded
    found = evaluate(pair, getattr(pair, model), prompts=prompts["test"], max_new_tokens=9)
    status, printed, error = command("evaluate", *pair_flags, "--model", model, "--max-new-tokens", 9)
    assert (status, error) == (0, "")
    assert printed == f"accuracy {found.accuracy:.4f}  length {found.length:.1f}  truncated {found.truncated:.4f}\n"


def test_evaluate_in_bfloat16_loads_the_weights_so_and_no_teacher(command, pair_flags, monkeypatch):
    """Not the weights of the one that does not answer: a teacher of 30 billion would fill the memory in vain."""
    from tgpo_lab.models import pairs

    loaded = []
    load = pairs.load_model
    monkeypatch.setattr(
        pairs, "load_model", lambda path, dtype, *rest, **o: loaded.append(dtype) or load(path, dtype, *rest, **o)
    )
    status, printed, error = command("evaluate", *pair_flags, "--max-new-tokens", 9, "--precision", "bfloat16")
    assert (status, error) == (0, "") and printed.startswith("accuracy ")
    assert loaded == [torch.bfloat16]
    command("evaluate", *pair_flags, "--max-new-tokens", 9, "--model", "teacher")
    assert loaded[1:] == [torch.float32] * 2


def test_evaluate_and_measure_refuse_a_device_that_is_not_there(command, pair_flags):
    for words in (["evaluate", *pair_flags], ["pairs", "measure", *pair_flags[1:4:2], *pair_flags[4:]]):
        status, printed, error = command(*words, "--device", "cuda:99")
        assert status == 2 and "There is no device 'cuda:99' here" in printed + error


def test_measure_reads_prompts_as_training_does(command, pair_flags, tmp_path):
    """gsm8k's form: other columns, the answer after a mark, text around the prompt."""
    rows = [{"question": f"w{i} w{i + 1}", "solution": f"because #### {i}"} for i in range(2, 5)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", tmp_path / "asked.jsonl", "--prompt-column", "question", "--answer-column", "solution",
               "--answer-after", "####", "--prompt-template", "w9 {prompt}", "--max-new-tokens", 4]  # fmt: skip
    status, printed, error = command("pairs", "measure", *pair_flags[1:4:2], *options, "--precision", "bfloat16")
    assert (status, error) == (0, "") and "3 held-out prompts" in printed


def test_evaluate_prints_pass_at_k_and_responses(command, pair_flags, loaded):
    _, prompts = loaded
    sampled = ["--temperature=1", "--samples-per-prompt=8", "--max-new-tokens=12", "--seed=5", "--split=train"]
    status, printed, _ = command("evaluate", *pair_flags, *sampled, "--count=10", "--show=80")
    assert status == 0
    lines = printed.splitlines()
    figures, at_k, responses = lines[0], lines[1], lines[2:]
    assert len(responses) == 80
    right = [line.endswith("   [right]") for line in responses]
    for line, well in zip(responses, right, strict=True):
        assert well or line.endswith("   [wrong, the answer is 7]")
        assert not well or line.endswith("#7   [right]")
    for number, prompt in enumerate(prompts["train"]["prompt"][:10]):
        assert all(line.startswith(prompt) for line in responses[8 * number : 8 * number + 8])
    assert 0 < sum(right) < 80
    assert figures.startswith(f"accuracy {sum(right) / 80:.4f} ")

    # pass@k from its definition: the share of all choices of k samples with a right one among them
    found = dict(re.findall(r"pass@(\d) ([0-9.]+)", at_k))
    assert list(found) == ["1", "2", "4", "8"]
    groups = [right[start : start + 8] for start in range(0, 80, 8)]
    assert found["1"] == f"{sum(right) / 80:.4f}"
    assert found["8"] == f"{sum(map(any, groups)) / 10:.4f}"
    pairs = [any((g[i], g[j])) for g in groups for i in range(8) for j in range(i)]
    assert float(found["2"]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)

    assert command("evaluate", *pair_flags, *sampled, "--count=10")[1].splitlines() == [figures, at_k]  # repeatable
    assert command("evaluate", *pair_flags, *sampled, "--count=10", "--seed=6")[1].splitlines() != [figures, at_k]


def test_pairs_list_names_the_shipped_pairs(command):
    status, printed, _ = command("pairs", "list")
    assert status == 0
    assert [line.split()[0] for line in printed.splitlines()] == shipped_pairs()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in printed.splitlines())


def test_pairs_measure_prints_the_card_and_writes_it(command, random_pair, loaded, tmp_path):
    pair, prompts = loaded
    flags = ["--dataset", random_pair.prompts, "--count", 4, "--max-new-tokens", 10, "--seed", 3]
    status, printed, error = command("pairs", "measure", random_pair.student, random_pair.teacher, *flags)
    assert (status, error) == (0, "")
    card = measure_pair(pair, prompts["test"], count=4, max_new_tokens=10, seed=3)
    assert printed.startswith(f"# Pair: {random_pair.student} + {random_pair.teacher}\n")
    table = dict(re.findall(r"^\| (.+) \| (.+) \|$", printed, re.MULTILINE))
    assert table["KL(student‖teacher) on student rollouts"] == f"{card.reverse_kl:.2f} nats per token"
    assert table["KL(teacher‖student) on student rollouts"] == f"{card.forward_kl:.2f} nats per token"
    assert table["Accuracy of the teacher, greedy"] == f"{card.teacher_accuracy:.3f}"
    assert table["Tokens rejected by the teacher"] == f"{card.rejected:.3f}"
    assert table["Teacher reliability on student prefixes"] == f"{card.reliability:.3f}"
    assert "Measured on 4 held-out prompts." in printed
    assert list(tmp_path.iterdir()) == []  # nothing is written unasked

    status, again, _ = command("pairs", "measure", random_pair.student, random_pair.teacher, *flags, "--output", "card")
    assert (status, again) == (0, printed)
    assert sorted(p.name for p in (tmp_path / "card").iterdir()) == ["README.md", "card.json"]
    assert (tmp_path / "card" / "README.md").read_text().strip() == printed.strip()
    stored = json.loads((tmp_path / "card" / "card.json").read_text())
    assert stored["seed"] == 3 and stored["made_by"]["versions"]["torch"]
    assert {name: stored[name] for name in card.as_dict()} == card.as_dict()
