"""The examination before training: every warning and refusal is caused on a small pair."""

import importlib.util
import json
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tgpo_lab.config import TrainConfig
from tgpo_lab.diagnostics import logprob_noise
from tgpo_lab.doctor import diagnose as doctor
from tgpo_lab.doctor import numeric_checks, pair_checks, room_checks
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.errors import InputError
from tgpo_lab.loop import requirements
from tgpo_lab.methods.tgpo import TGPO
from tgpo_lab.training import train

FINE = {"tokenizers", "chat template", "memory", "disk", "vocabulary", "end tokens", "prompts", "opening",
        "self-distillation", "sampling noise", "divergence"}  # fmt: skip


@pytest.fixture
def examine(tiny_config, tmp_path):
    """A function that examines the random pair with some settings changed; nothing is written."""

    def run(device="cpu", available_memory=None, processes=1, sharded=False, **changes):
        before = sorted(tmp_path.rglob("*"))
        found = diagnose(
            tiny_config(tmp_path, **changes), prompts=4, device=device, available_memory=available_memory,
            processes=processes, sharded=sharded,
        )  # fmt: skip
        assert sorted(tmp_path.rglob("*")) == before
        return found

    return run


def texts(found, level: str, subject: str) -> str:
    return "\n".join(f"{f.text} {f.change}" for f in found.findings if (f.level, f.subject) == (level, subject))


@pytest.fixture
def altered(random_pair, tmp_path):
    """A function that copies a model of the random pair and lets ``change(model, tokenizer)`` alter it."""

    def make(role: str, change) -> str:
        folder = Path(shutil.copytree(getattr(random_pair, role), tmp_path / f"altered-{role}"))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        change(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def more_tokens(*tokens: str, rows: int = 2176, loud: bool = False):
    def change(model, tokenizer):
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tokens])
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
        weight = model.get_output_embeddings().weight.data
        weight[2048:] = 0
        if loud:  # one of the two is the most probable token, whatever the hidden state
            weight[2048] = 100 * weight[7]
            weight[2049] = -weight[2048]

    return change


# ── All is well ──────────────────────────────────────────────────────────────────────────────────


def test_a_pair_that_works_is_looked_at_from_all_sides(examine):
    found = examine(max_new_tokens=12)
    assert {f.subject for f in found.findings if f.level == "ok"} == FINE
    assert not [f for f in found.findings if f.level != "ok" and f.subject != "divergence"]
    assert found.card is not None and found.card.prompts == 4
    assert json.loads(json.dumps(found.as_dict()))["status"] == found.status


def test_what_the_doctor_passes_can_be_trained(examine, tiny_config, tmp_path):
    assert examine().status < 2
    assert train(tiny_config(tmp_path), show_progress=False).completed


def unknown_architecture(folder: Path, random_pair) -> str:
    """A GPT-2 with the random pair's tokenizer: neither compiled decoding nor Liger knows its layers."""
    tokenizer = AutoTokenizer.from_pretrained(random_pair.student)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 2048}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


REFUSED_BY_TRAINING = {
    "no vLLM": ({"engine": "vllm"}, "vLLM is not installed"),
    "vLLM on a CPU": ({"engine": "vllm"}, "tied to the embeddings"),
    "compiled decoding": ({"compile_decoding": True, "student": "GPT-2"}, "the student is a GPT2LMHeadModel"),
    "fused kernels": ({"fused_kernels": True, "student": "GPT-2"}, "whose architecture is gpt2"),
    "guiding tokens": ({"method": TGPO(guidance="top_k", guidance_top_k=100_000)}, "(100000) cannot exceed the tokens"),
    "a run in the folder": ({"output": "taken"}, "already holds a run"),
    "a folder below a file": ({"output": "file/run"}, "Cannot write to the folder"),
    "a cache below a file": ({"teacher_cache": "file/cache", "method": "sft"}, "teacher_cache: Cannot write"),
    "no prompts": ({"dataset": None}, "brings no prompts"),
}


@pytest.mark.parametrize("what", REFUSED_BY_TRAINING)
def test_what_training_refuses_the_doctor_refuses_with_the_same_sentence(
    what, tiny_config, tmp_path, random_pair, monkeypatch
):
    changes, said = REFUSED_BY_TRAINING[what]
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").touch()
    changes = {key: str(tmp_path / v) if key in ("output", "teacher_cache") else v for key, v in changes.items()}
    if changes.get("student") == "GPT-2":
        changes["student"] = unknown_architecture(tmp_path / "gpt2", random_pair)
    if what == "no vLLM":
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    elif what == "vLLM on a CPU":  # one that is installed
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in_vllm"))
        monkeypatch.delitem(sys.modules, "vllm", raising=False)
    elif what == "fused kernels":  # as if there were a GPU
        pytest.importorskip("liger_kernel")
        monkeypatch.setattr(requirements, "require_fused_kernels", lambda device: None)
    config = tiny_config(tmp_path, **changes)
    before = sorted(tmp_path.rglob("*"))
    found = diagnose(config, prompts=2, card_tokens=4, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match=re.escape(said)) as refusal:
        train(config, show_progress=False)
    assert [f.text for f in found.findings if f.level == "refused"] == [str(refusal.value)]
    sys.modules.pop("vllm", None)


def test_a_run_that_goes_on_is_examined_as_one(tiny_config, tmp_path, command):
    train(tiny_config(tmp_path), show_progress=False)
    longer = tiny_config(tmp_path, steps=5)
    assert diagnose(longer, prompts=2, device="cpu", resume=True).status < 2
    found = diagnose(longer.with_changes(learning_rate=1.0), prompts=2, device="cpu", resume=True)
    assert "was made with learning_rate" in texts(found, "refused", "output")
    status, printed, error = command("doctor", "--resume", tmp_path / "run", "--steps", 5)
    assert status < 2 and not error, printed


def test_the_folders_that_a_run_would_make_are_made_to_see_and_removed(examine, tmp_path):
    found = examine(output=str(tmp_path / "a" / "b" / "run"), teacher_cache=str(tmp_path / "c" / "d"), method="sft")
    assert found.status < 2


def test_the_command_takes_the_options_of_training(command, random_pair, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--student", random_pair.student, "--teacher", random_pair.teacher, "--dataset", random_pair.prompts]
    flags += ["--max-new-tokens=12", "--evaluation-prompts=4", "--prompts-per-step=2"]
    status, printed, error = command("doctor", *flags)
    assert status in (0, 1) and error == "" and "This run can start" in printed
    for subject in FINE:
        assert re.search(rf"^ok +{subject} ", printed, re.MULTILINE), subject
    status, printed, _ = command("doctor", *flags, "--max-new-tokens=128")
    assert status == 2 and re.search(r"^refused .*128", printed, re.MULTILINE) and "This run cannot work" in printed
    assert not list(tmp_path.iterdir())


def test_a_pair_that_is_not_there(command):
    status, printed, _ = command("doctor", "--student", "nobody/a", "--teacher", "nobody/b")
    assert status == 2 and "nobody/a" in printed and "Traceback" not in printed


# ── Tokenizers and ends ──────────────────────────────────────────────────────────────────────────


def test_tokens_that_only_one_has_are_named(examine, altered):
    found = examine(teacher=altered("teacher", more_tokens("<a>", "<b>")))
    said = texts(found, "warning", "tokenizers")
    assert "2 tokens" in said and "'<a>' (2048), '<b>' (2049)" in said and "cut from both" in said
    assert "Student 2048 rows, teacher 2176, shared tokens 2048. Those above are cut." in texts(
        found, "ok", "vocabulary"
    )
    assert found.status == 1


def test_tokenizers_that_do_not_fit_are_refused(examine, random_pair, tmp_path):
    folder = Path(shutil.copytree(random_pair.teacher, tmp_path / "swapped"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('" pebble"', '" pebbIe"') if '" pebble"' in text else
                                           text.replace('"+"', '"±"', 1))  # fmt: skip
    found = examine(teacher=str(folder))
    assert found.status == 2
    (refusal,) = [f for f in found.findings if f.level == "refused"]
    assert str(random_pair.student) in refusal.text and str(folder) in refusal.text


def test_a_token_before_every_text_in_one_of_the_two(examine, altered):
    def change(model, tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
        )

    found = examine(teacher=altered("teacher", change))
    assert "puts nothing around a text" in texts(found, "warning", "tokenizers")
    assert "['<eos>']" in texts(found, "warning", "tokenizers")


def test_ends_that_differ_are_told(examine, altered, tokenizer):
    def change(model, tokenizer):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("</think>")]

    teacher = altered("teacher", change)
    said = texts(examine(teacher=teacher), "ok", "end tokens")
    assert "The student ends with '<eos>', the teacher with '<eos>', '</think>'" in said
    assert "any of '<eos>', '</think>' ends a response" in said


def test_an_end_that_the_student_lacks_is_refused(examine, altered, random_pair):
    def change(model, tokenizer):
        more_tokens("<end>")(model, tokenizer)
        tokenizer.eos_token = "<end>"
        model.generation_config.eos_token_id = 2048

    teacher = altered("teacher", change)
    found = examine(teacher=teacher)
    refusal = next(f for f in found.findings if f.level == "refused")
    assert found.status == 2
    assert all(part in refusal.text for part in ("'<end>'", teacher, str(random_pair.student)))


def test_a_teacher_that_opens_with_a_foreign_token(examine, altered, random_pair):
    found = examine(teacher=altered("teacher", more_tokens("<a>", "<b>", rows=2050, loud=True)))
    said = texts(found, "warning", "opening")
    assert re.search(r"On [1-4] of 4 prompts the teacher .* would open with .*'<[ab]>'", said)
    assert str(random_pair.student) in said and "lacks" in said


# ── Chat templates ───────────────────────────────────────────────────────────────────────────────

TEMPLATE = "{% for m in messages %}?{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def templated(template: str):
    def change(model, tokenizer):
        tokenizer.chat_template = template

    return change


def test_chat_templates_are_compared(examine, altered, random_pair, tmp_path):
    student = altered("student", templated(TEMPLATE))
    assert "template of the student; chat_template would use it" in texts(
        examine(student=student), "ok", "chat template"
    )
    found = examine(student=student, chat_template=True)
    assert "; the teacher has none" in texts(found, "warning", "chat template")
    same = altered("teacher", templated(TEMPLATE))
    found = examine(student=student, teacher=same, chat_template=True)
    assert texts(found, "ok", "chat template").startswith("Both write '?…;:'")
    found = examine(student=student, teacher=same, chat_template=True, chat_template_options=("thinking=false",))
    assert texts(found, "warning", "chat template").startswith("The student's writes the same without thinking=false")
    shutil.rmtree(same)
    other = altered("teacher", templated(TEMPLATE.replace("?", "*")))
    found = examine(student=student, teacher=other, chat_template=True)
    assert "writes '?…;:', the teacher's '*…;:'" in texts(found, "warning", "chat template")


def test_a_chat_without_a_template_is_refused(examine):
    found = examine(chat_template=True)
    assert found.status == 2 and "has no chat template" in found.findings[-1].text


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────


def test_prompts_that_leave_no_room_are_refused(examine):
    found = examine(max_new_tokens=125)
    assert found.status == 2 and "made for at most 128" in found.findings[-1].text


def test_without_prompts_nothing_can_be_trained(examine):
    assert "brings no prompts" in examine(dataset=None).findings[-1].text


def test_answers_that_the_reward_cannot_read_are_refused(examine, tmp_path):
    rows = [{"prompt": f"1+{n % 9}=", "answer": "seven"} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = examine(dataset=str(tmp_path), reward="last_number")
    assert found.status == 2 and "'seven' has none" in found.findings[-1].text


def test_too_few_prompts_for_a_step_are_warned_about(examine):
    assert "One step takes 30 prompts, but there are 24" in texts(examine(prompts_per_step=30), "warning", "prompts")


def test_prompts_longer_than_the_memory_was_estimated_for(examine, monkeypatch):
    monkeypatch.setattr(doctor, "USUAL_PROMPT", 5)
    assert "The longest prompt has 6 tokens; the memory was estimated for 5" in texts(examine(), "warning", "prompts")


# ── Numerics ─────────────────────────────────────────────────────────────────────────────────────


def rough(model, tokenizer):
    """Large random weights: their rounding in bfloat16 shows in the log-probabilities."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.6 if "layers" in name else 0.2)
    model.model.norm.weight.data.fill_(1.5)


def test_rounding_that_matters_is_warned_about(examine, altered, monkeypatch):
    student = altered("student", rough)
    monkeypatch.setattr(numeric_checks, "NOISE_WARNED", 0.001)
    exact, rounded = examine(student=student), examine(student=student, precision="bfloat16")
    for subject in ("self-distillation", "sampling noise"):
        assert texts(exact, "ok", subject) and not texts(exact, "warning", subject)
        assert "Set precision float32" in texts(rounded, "warning", subject)
    assert rounded.status == 1
    monkeypatch.undo()
    assert texts(examine(student=student, precision="bfloat16"), "warning", "self-distillation")


def test_a_teachers_pass_that_computes_something_else_is_refused(examine, monkeypatch):
    asked = logprob_noise.ask_teacher

    def next_token_instead(model, rollouts, **options):
        shifted = replace(rollouts, responses=rollouts.responses.roll(1, -1))
        return asked(model, shifted, **options)

    monkeypatch.setattr(logprob_noise, "ask_teacher", next_token_instead)
    found = examine()
    assert texts(found, "refused", "self-distillation") and texts(found, "ok", "sampling noise")


# ── Divergence ───────────────────────────────────────────────────────────────────────────────────


def test_a_teacher_that_is_no_better_is_warned_about(examine, random_pair):
    found = examine(teacher=str(random_pair.student))
    said = texts(found, "warning", "divergence")
    assert "The teacher is right in" in said
    assert found.card.reverse_kl == pytest.approx(0, abs=1e-5)


def test_a_measurement_that_cuts_the_teachers_answers_says_so_and_nothing_of_right_answers(tmp_path):
    config = TrainConfig.preset("tiny", "tgpo", student="far", output=str(tmp_path / "run"))
    short, whole = (diagnose(config, prompts=4, card_tokens=tokens, device="cpu") for tokens in (12, 80))
    told = [finding for finding in short.findings if finding.subject == "divergence"]
    assert "responses cut after 12 tokens" in told[0].text
    assert "1.00 of the teacher's answers are longer than the 12 tokens after which this measurement" in told[1].text
    assert "--card-tokens 80" in told[1].change
    for findings in (short.findings, whole.findings):
        assert not any("right in" in finding.text or "goes on to a right" in finding.text for finding in findings)
    assert not any("cut after" in finding.text or "longer than" in finding.text for finding in whole.findings)


@pytest.mark.parametrize(
    "limit, value, said",
    [("RELIABLE", 1.1, "goes on to a right answer from"), ("FAR_OPENING", 1.0, "is hardly ever sampled"),
     ("OFTEN_REJECTED", -1.0, "of the student's tokens")],
)  # fmt: skip
def test_figures_beyond_their_limits_are_warned_about(examine, monkeypatch, limit, value, said):
    monkeypatch.setattr(pair_checks, limit, value)
    assert said in " ".join(texts(examine(method="rkl"), "warning", "divergence").split())


@pytest.mark.parametrize("limit, value", [("FAR_OPENING", 1.0), ("OFTEN_REJECTED", -1.0)])
def test_tgpo_is_proposed_to_other_methods_alone(examine, monkeypatch, limit, value):
    monkeypatch.setattr(pair_checks, limit, value)
    assert "Prefer tgpo" in texts(examine(method="rkl"), "warning", "divergence")
    assert not texts(examine(method="tgpo-trust-horizon"), "warning", "divergence")


def test_a_card_that_cannot_be_measured_is_a_warning(examine):
    found = examine(max_new_tokens=100)  # fits the prompts, but not the prefixes that the card goes on from
    assert "It was not measured" in texts(found, "warning", "divergence") and found.status == 1


# ── Memory and disk ──────────────────────────────────────────────────────────────────────────────


def test_memory_that_does_not_suffice_is_refused_before_anything_is_loaded(examine):
    needed = examine().memory.total
    found = examine(available_memory=needed - 1)
    assert found.status == 2 and found.card is None and "Any of --" in texts(found, "refused", "memory")
    assert texts(examine(available_memory=int(needed / 0.95)), "warning", "memory")
    assert texts(examine(available_memory=2 * needed), "ok", "memory")


def test_a_machine_too_small_for_its_offloaded_teachers_is_refused(examine, random_pair, monkeypatch):
    """As on a machine with four GPUs."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        for folder in (random_pair.student, random_pair.teacher)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    large = {"device": "cuda", "available_memory": 10**12}
    memory = namedtuple("memory", "total")

    def level(total: int, **changes) -> list[str]:
        monkeypatch.setattr(room_checks.psutil, "virtual_memory", lambda: memory(total))
        findings = examine(**large, **changes).findings
        return [f.level for f in findings if f.subject == "machine's memory"]

    # Four bytes a weight of the teacher; of eight processes four are here. Under FSDP twelve a weight of the student.
    assert level(4 * teacher - 1, teacher_offload=True) == ["refused"]
    assert level(4 * teacher, teacher_offload=True) == ["warning"]
    assert level(5 * teacher, teacher_offload=True) == ["ok"]
    assert level(4 * 4 * teacher - 1, teacher_offload=True, processes=8) == ["refused"]
    assert level(4 * 4 * teacher, teacher_offload=True, processes=8) == ["warning"]
    shared = {"teacher_offload": True, "processes": 4, "sharded": True}
    assert level(4 * 4 * teacher + 12 * student - 1, **shared) == ["refused"]
    assert level(4 * 4 * teacher + 12 * student, **shared) == ["warning"]
    assert level(12 * student - 1, processes=4, sharded=True) == ["refused"]
    assert level(1) == []


def test_a_disk_that_is_too_small_is_refused(examine, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room_checks.shutil, "disk_usage", lambda folder: usage(10**9, 0, 10**5))
    found = examine()
    assert found.status == 2 and "keep_checkpoints" in texts(found, "refused", "disk")
