"""The trainer inside TRL takes the step of this package's own loop, and guides where and as much as it should."""

import hashlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl", reason="needs the extra trl")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func, by which these tests choose the completions

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tgpo_lab import training
from tgpo_lab.errors import InputError
from tgpo_lab.integrations.trl import SUPPORTED_SERIES, TGPOConfig, TGPOTrainer, require_trl
from tgpo_lab.integrations.trl.batch_teacher import answer_in_forward, ask_about_batch
from tgpo_lab.methods.tgpo import TGPO
from tgpo_lab.randomness import rows_of_step
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.schedules import Constant, LinearDecay
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.teacher import ask_teacher

ROOT = Path(__file__).parent.parent
GROUP, LONGEST, END = 4, 12, 1


def completion(prompt: list[int], number: int) -> list[int]:
    """What the student is said to have written: 2 to 11 random tokens, most of them then "#7" or "#8" and the end."""
    chance = random.Random(hashlib.sha256(f"{prompt}/{number}".encode()).digest())
    tokens = [chance.randrange(40, 2048) for _ in range(chance.randrange(2, 10))]
    if number % GROUP == GROUP - 1:
        return (tokens * 6)[:LONGEST]  # cut at the limit
    return [*tokens[: LONGEST - 3], MARK, SEVEN + chance.randrange(2), END]


@pytest.fixture(autouse=True)
def token_ids(tokenizer):
    global MARK, SEVEN
    MARK, SEVEN, eight, end = tokenizer.convert_tokens_to_ids(["#", "7", "8", tokenizer.eos_token])
    assert eight == SEVEN + 1 and end == END


@pytest.fixture
def prompts(random_pair) -> list[str]:
    """The prompts that this package's loop takes in its first steps, two a step."""
    rows = load_prompts(random_pair.prompts)["train"]
    return [rows["prompt"][i] for step in range(4) for i in rows_of_step(0, step, 2, len(rows))]


def options(folder: Path, **changes) -> dict:
    """Options of TRL that make it do what the loop does: 8 rows and one update of plain SGD a step."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "max_steps": 3,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.7,
        "scale_rewards": "none",
        "shuffle_dataset": False,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        **changes,
    }


def write_completions(prompts: list[str], trainer) -> dict:
    """A rollout function of TRL that writes :func:`completion`."""
    ids = trainer.processing_class(prompts)["input_ids"]
    numbers = [i % GROUP for i in range(len(ids))]
    return {
        "prompt_ids": ids,
        "completion_ids": [completion(p, n) for p, n in zip(ids, numbers, strict=True)],
        "logprobs": None,
    }


def judge(completion_ids, **_) -> list[float]:
    """What the loop's marked_answer gives these completions."""
    return [float(ids[-3:] == [MARK, SEVEN, END]) for ids in completion_ids]


def make_trainer(pair, folder: Path, prompts: list[str], sgd: bool = True, teacher=None, **changes) -> TGPOTrainer:
    extra = {k: changes.pop(k) for k in ("eval_dataset", "teacher_processing_class", "peft_config") if k in changes}
    student = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    args = TGPOConfig(**options(folder, **changes))
    if sgd:
        optimizer = torch.optim.SGD(student.parameters(), args.learning_rate)
        extra["optimizers"] = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    return TGPOTrainer(
        student,
        str(pair.teacher) if teacher is None else teacher,
        judge,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        rollout_func=write_completions,
        **extra,
    )


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(ours: dict, theirs: dict, start: dict, tolerance: float = 2e-4) -> None:
    """Both moved from ``start`` by the same way, to a tolerance relative to its length."""
    assert ours.keys() == theirs.keys() == start.keys()
    for name in start:
        way = ours[name] - start[name]
        assert way.norm() > 0, name
        assert (ours[name] - theirs[name]).norm() <= tolerance * way.norm(), name


@pytest.fixture
def loop(tiny_config, tmp_path, monkeypatch):
    """A function that runs this package's own loop on the same completions with SGD: its log and its student."""

    def sample(processes, model, prompts, *_, samples_per_prompt, **__):
        written = [(p, completion(p, n)) for p in prompts for n in range(samples_per_prompt)]
        width = max(len(ids) for _, ids in written)
        lengths = torch.tensor([len(ids) for _, ids in written])
        return Rollouts(
            prompts=[p for p, _ in written],
            responses=torch.tensor([ids + [0] * (width - len(ids)) for _, ids in written]),
            mask=torch.arange(width) < lengths.unsqueeze(-1),
            finished=torch.tensor([ids[-1] == END for _, ids in written]),
            pad_token=0,
        )

    def run(name: str = "loop", **changes):
        monkeypatch.setattr(training, "sample_divided", sample)
        monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, *_, **__: torch.optim.SGD(parameters, lr))
        values = {"steps": 3, "learning_rate": 0.5, "max_gradient_norm": 0.7, "evaluate_every": 0, "warmup_steps": 0}
        config = tiny_config(tmp_path / name, **{**values, **changes})
        result = training.train(config, show_progress=False)
        monkeypatch.undo()
        return result

    return run


# ── The same step as the loop ────────────────────────────────────────────────────────────────────

GUIDANCE = {
    "argmax": {},
    "top_k": {"guidance": "top_k", "guidance_top_k": 3},
    "first_departure": {"gate": "first_departure"},
    "confidence": {"gate": "confidence", "gate_threshold": 0.7},
    "trust_horizon": {"gate": "trust_horizon", "gate_threshold": 12.0, "doubt": "sum", "doubt_memory": 0.9},
    "soft_horizon": {"gate": "trust_horizon", "gate_threshold": 9.0, "soft_horizon": True},
}


@pytest.mark.parametrize("choice", GUIDANCE)
def test_it_takes_the_same_steps_as_the_loop(choice, random_pair, prompts, loop, tmp_path):
    method = TGPO(weight=LinearDecay(0.9, 0.3), normalize_std=False, **GUIDANCE[choice])
    ours = loop(method=method)
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="LinearDecay(0.9, 0.3)", **GUIDANCE[choice])
    start = weights(trainer.model)
    trainer.train()
    assert_same(weights(ours.student), weights(trainer.model), start)
    metrics = ours.metrics.iloc[:3]
    assert 0 < metrics["reward"].mean() < 1  # so that the reward term had a gradient as well
    for name, theirs in (("weight", "weight"), ("guided", "guided"), ("loss_teacher", "loss_teacher"),
                         ("agreement", "agreement"), ("gradient_norm", "grad_norm")):  # fmt: skip
        assert logged(trainer, theirs) == pytest.approx(metrics[name].tolist(), rel=2e-4), name
    if choice not in ("argmax", "top_k"):
        assert all(0.05 < share < 0.95 for share in logged(trainer, "guided"))  # the gate was neither open nor shut


def test_one_step_of_adamw_is_the_same(random_pair, prompts, tiny_config, loop, tmp_path, monkeypatch):
    adam = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: adam(parameters, lr, (0.9, 0.99), weight_decay=0.1))
    ours = loop(steps=1, learning_rate=1e-3, method=TGPO(weight=Constant(0.5), normalize_std=False))
    trainer = make_trainer(
        random_pair, tmp_path, prompts, sgd=False, max_steps=1, learning_rate=1e-3, weight="0.5",
        adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.1,
    )  # fmt: skip
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1  # TRL spares norms, the loop spares nothing
    start = weights(trainer.model)
    trainer.train()
    assert_same(weights(ours.student), weights(trainer.model), start, tolerance=2e-2)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_accumulation_changes_nothing_but_rounding(loss_type, random_pair, prompts, tmp_path):
    """Guidance is normalised by the tokens of the whole batch, whatever TRL divides its own term by."""
    # With these two the reward term itself depends on how the batch is split, so only guidance is left on.
    alone = {"reward_weights": [0.0]} if loss_type in ("grpo", "bnpo") else {}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_teacher_batch_size": 3}
    moved, losses = [], []
    for number, changes in enumerate([{}, split]):
        trainer = make_trainer(
            random_pair, tmp_path / str(number), prompts, weight="0.5", loss_type=loss_type, **alone, **changes
        )
        start = weights(trainer.model)
        trainer.train()
        moved.append(weights(trainer.model))
        losses.append(logged(trainer, "loss_teacher"))
    assert_same(*moved, start)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_answers_stay_with_the_batch(random_pair, prompts, tmp_path):
    """One generation serves two optimizer steps and two passes: the teacher is asked about it once."""
    changes = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8}
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", sgd=False, learning_rate=0.0, **changes)
    trainer.train()
    assert len(logged(trainer, "seconds_teacher")) == 2
    losses = logged(trainer, "loss_teacher")
    assert losses[:2] == pytest.approx(losses[2:4]) and losses[4:6] == pytest.approx(losses[6:])
    assert len({round(x, 5) for x in losses}) == 4


def test_a_batch_shared_out_to_two_steps_is_normalised_by_its_mean_tokens_a_step(random_pair, prompts, tmp_path):
    """Two small steps, each on half of the batch, then move as far as one on all of it at twice the learning rate."""
    whole = {"learning_rate": 2e-3, "max_steps": 1}
    halves = {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    moved = []
    for number, changes in enumerate([whole, halves]):
        trainer = make_trainer(random_pair, tmp_path / str(number), prompts, weight="0.5", reward_weights=[0.0],
                               max_grad_norm=1e9, **changes)  # fmt: skip
        start = weights(trainer.model)
        trainer.train()
        moved.append(weights(trainer.model))
    assert_same(*moved, start, tolerance=0.02)


@pytest.mark.parametrize("choice", ["temperature", "adapters"])
def test_guidance_is_added_to_trls_loss(choice, random_pair, prompts, tmp_path):
    """The loss with weight and without it differ by the cross-entropy, and so do the gradients."""
    changes = {"temperature": 0.5}
    if choice == "adapters":
        changes = {"peft_config": pytest.importorskip("peft").LoraConfig(r=4, target_modules="all-linear")}
    trainer = make_trainer(random_pair, tmp_path, prompts, sgd=False, weight="0.5", **changes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._prepare_inputs([{"prompt": p} for p in prompts[:2] for _ in range(GROUP)])

    def differentiated(loss) -> tuple[float, dict[str, torch.Tensor]]:
        trainer.model.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), found

    guided, with_guidance = differentiated(trainer._compute_loss(trainer.model, batch))
    trainer._schedule = Constant(0.0)
    alone, without = differentiated(trainer._compute_loss(trainer.model, batch))
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float32)
    said = []
    for prompt, there, written, mask in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        tokens = torch.cat([prompt[there.bool()], written[mask.bool()]]).unsqueeze(0)
        places = slice(int(there.sum()) - 1, -1)
        with torch.no_grad():
            best = teacher(tokens).logits[0, places].argmax(-1, keepdim=True)
        logits = trainer.model(input_ids=tokens).logits[0, places] / trainer.temperature
        said.append(logits.log_softmax(-1).gather(-1, best))
    expected, gradients = differentiated(-0.5 * torch.cat(said).mean())
    assert guided - alone == pytest.approx(expected, rel=1e-4)
    for name, gradient in gradients.items():
        assert (with_guidance[name] - without[name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_two_processes_take_the_steps_of_one(random_pair, prompts, tmp_path):
    """With more tokens in one process than in the other, and the teacher's rows split unevenly."""
    one = make_trainer(random_pair, tmp_path / "one", prompts, weight="LinearDecay(0.5, 0.1)", gate="first_departure")
    start = weights(one.model)
    one.train()
    changes = {"weight": "LinearDecay(0.5, 0.1)", "gate": "first_departure", "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 2, "per_device_teacher_batch_size": 3}  # fmt: skip
    # accelerate launch --cpu --num_processes 2 starts one process without a word.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = [ROOT / "tests" / "trl_process.py", random_pair.student, random_pair.teacher, tmp_path / "two"]
    command = map(str, [*launch, *program, MARK, SEVEN, json.dumps(changes), *prompts])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(weights(one.model), {**start, **load_file(tmp_path / "two" / "end.safetensors")}, start)
    log = json.loads((tmp_path / "two" / "log.json").read_text())
    for name in ("weight", "grad_norm", "loss_teacher", "guided", "agreement"):
        assert [row[name] for row in log if name in row] == pytest.approx(logged(one, name), rel=1e-4)


# ── What guidance does ───────────────────────────────────────────────────────────────────────────


def test_the_gradient_is_that_of_the_cross_entropy_on_the_teachers_tokens(random_pair, prompts, tmp_path):
    """Against a naive reference row by row: no padding, no chunks, whole logits in float64."""
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", max_steps=1, learning_rate=1.0,
                           max_grad_norm=1e9, reward_weights=[0.0])  # fmt: skip
    start = weights(trainer.model)
    student = AutoModelForCausalLM.from_pretrained(random_pair.student, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float64)
    rows = [(p, completion(p, n)) for p in trainer.processing_class(prompts[:2])["input_ids"] for n in range(GROUP)]
    before = []
    for prompt, written in rows:
        tokens = torch.tensor([prompt + written])
        with torch.no_grad():
            best = teacher(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
        before.append(student(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, best.unsqueeze(-1)))
    loss = -torch.cat(before).mean()
    loss.backward()
    trainer.train()
    assert logged(trainer, "loss_teacher") == pytest.approx([loss.item()], rel=1e-5)
    for name, parameter in student.named_parameters():
        way = (weights(trainer.model)[name] - start[name]).double()
        assert (way + 0.5 * parameter.grad).norm() < 1e-4 * way.norm(), name


def test_the_teachers_tokens_become_more_probable(random_pair, prompts, tmp_path):
    trainer = make_trainer(random_pair, tmp_path, prompts[:2], weight="1", max_steps=6, learning_rate=0.05)
    trainer.train()
    losses = logged(trainer, "loss_teacher")
    assert losses[-1] < losses[0] - 0.3 and sorted(losses, reverse=True) == losses
    assert logged(trainer, "agreement")[-1] > logged(trainer, "agreement")[0]


def test_without_weight_it_is_trls_own_trainer_bit_for_bit_and_asks_nobody(random_pair, prompts, tmp_path):
    trainer = make_trainer(random_pair, tmp_path, prompts, sgd=False, weight="0")
    trainer.train()
    student = AutoModelForCausalLM.from_pretrained(random_pair.student, dtype=torch.float32)
    GRPOTrainer(student, judge, GRPOConfig(**options(tmp_path)), Dataset.from_dict({"prompt": prompts}),
                rollout_func=write_completions).train()  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), student.parameters(), strict=True))
    assert logged(trainer, "weight") == [0, 0, 0] and not logged(trainer, "seconds_teacher")


def test_the_teacher_is_asked_until_the_weight_is_zero(random_pair, prompts, tmp_path):
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="LinearDecay(0.5, 0.25)", max_steps=4)
    trainer.train()
    assert logged(trainer, "weight") == [0.5, 0.25, 0, 0]
    assert len(logged(trainer, "loss_teacher")) == 2


def test_drawn_tokens_are_the_teachers_and_differ_from_batch_to_batch(random_pair, prompts, tmp_path):
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", guidance="sampled", max_steps=1)
    batch = trainer._prepare_inputs([{"prompt": p} for p in prompts[:2] for _ in range(GROUP)])
    # In whatever order TRL has shuffled the rows: as many as the loop would draw, and they are likely ones.
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float32)
    prompt = [ids[m.bool()].tolist() for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    mask = batch["completion_mask"].bool()
    rollouts = Rollouts(prompt, batch["completion_ids"], mask, mask.any(-1), 0)
    answers = ask_teacher(teacher, rollouts, vocabulary_size=2048, micro_batch_tokens=10**6, top_k=2048,
                          sampling_seed=1)  # fmt: skip
    drawn = batch["teacher_tokens"]
    chance = torch.zeros_like(answers.top_logprobs).scatter(-1, answers.top_tokens, answers.top_logprobs)
    likely = chance.gather(-1, drawn).squeeze(-1)[mask].mean()
    entropy = (answers.top_logprobs.exp() * answers.top_logprobs).sum(-1)[mask].mean()
    assert likely == pytest.approx(entropy.item(), abs=0.6)  # the mean log-probability of a draw is −entropy
    assert (drawn.squeeze(-1) != answers.tokens)[mask].any()
    trainer.state.global_step = 1
    trainer._buffered_inputs = None
    again = trainer._prepare_inputs([{"prompt": p} for p in prompts[:2] for _ in range(GROUP)])
    assert sorted(map(tuple, again["completion_ids"].tolist())) == sorted(map(tuple, batch["completion_ids"].tolist()))
    assert sorted(map(str, again["teacher_tokens"].tolist())) != sorted(map(str, drawn.tolist()))
    trainer.train()
    assert not logged(trainer, "agreement") and logged(trainer, "loss_teacher")


@pytest.mark.parametrize("gate", ["first_departure", "trust_horizon"])
def test_tokens_of_a_tool_shut_no_gate(gate, random_pair):
    """The student writes what the teacher would, but the third and fourth token come from a tool, most improbably."""
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float32)
    tokens = [5, 9, 12]
    with torch.no_grad():
        for step in range(6):
            logits = teacher(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmin() if step in (2, 3) else logits.argmax()))
    written = torch.tensor([tokens[3:]])
    batch = {"prompt_ids": torch.tensor([tokens[:3]]), "prompt_mask": torch.ones(1, 3), "completion_ids": written,
             "completion_mask": torch.ones_like(written)}  # fmt: skip
    answer_in_forward(teacher)
    guided = [
        ask_about_batch(teacher, asked, TGPO(gate=gate, gate_threshold=8.0), vocabulary_size=2048, rows_at_once=1,
                        sampling_seed=None)["guidance_weights"].tolist()
        for asked in (batch, batch | {"tool_mask": torch.tensor([[1, 1, 0, 0, 1, 1]])})
    ]  # fmt: skip
    assert guided == [[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 1]]]


def test_tokens_of_a_tool_are_not_guided(random_pair, prompts, tmp_path):
    def with_tool(texts, trainer):
        """The third and fourth token of each completion come from outside."""
        written = write_completions(texts, trainer)
        return written | {"env_mask": [[n not in (2, 3) for n in range(len(c))] for c in written["completion_ids"]]}

    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", max_steps=1, learning_rate=1.0,
                           max_grad_norm=1e9, reward_weights=[0.0])  # fmt: skip
    trainer.rollout_func = with_tool
    student = AutoModelForCausalLM.from_pretrained(random_pair.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float32)
    said = []
    for prompt in trainer.processing_class(prompts[:2])["input_ids"]:
        for written in (completion(prompt, n) for n in range(GROUP)):
            tokens = torch.tensor([prompt + written])
            own = torch.tensor([n not in (2, 3) for n in range(len(written))])
            with torch.no_grad():
                best = teacher(tokens).logits[0, len(prompt) - 1 : -1].argmax(-1, keepdim=True)
                logprobs = student(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            said.append(logprobs.gather(-1, best).squeeze(-1)[own])
    trainer.train()
    assert logged(trainer, "loss_teacher") == pytest.approx([-torch.cat(said).mean().item()], rel=1e-5)
    assert logged(trainer, "guided") == [1]


def test_evaluation_reports_guidance_and_changes_nothing(random_pair, prompts, tmp_path):
    held_out = Dataset.from_dict({"prompt": prompts[:2]})
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", eval_dataset=held_out,
                           per_device_eval_batch_size=8)  # fmt: skip
    start = weights(trainer.model)
    scores = trainer.evaluate()
    again = make_trainer(random_pair, tmp_path, prompts, weight="0.5", max_steps=1)
    again.train()
    assert scores["eval_loss_teacher"] == pytest.approx(logged(again, "loss_teacher")[0], rel=1e-5)
    assert scores["eval_weight"] == 0.5 and 0 <= scores["eval_agreement"] <= 1
    assert all(torch.equal(value, start[name]) for name, value in weights(trainer.model).items())


# ── Going on ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schedule", ["LinearDecay(0.5, 0.1)", "UntilAgreement(0.5, 0.0001, 2, 4)"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(schedule, random_pair, prompts, tmp_path):
    changes = {"sgd": False, "weight": schedule, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.003}
    whole = make_trainer(random_pair, tmp_path / "whole", prompts, max_steps=4, **changes)
    whole.train()
    resumed = make_trainer(random_pair, tmp_path / "whole", prompts, max_steps=4, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "weight") == logged(whole, "weight")
    assert len(set(logged(whole, "weight")[2:])) == 2  # it was on its way down
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), resumed.model.parameters(), strict=True))


def test_a_schedule_with_a_memory_needs_it(random_pair, prompts, tmp_path):
    changes = {"sgd": False, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(random_pair, tmp_path, prompts, weight="0.5", **changes).train()
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="UntilAgreement(0.5)", **{**changes, "max_steps": 4})
    with pytest.raises(InputError, match=r"holds no guidance_schedule\.json.*UntilAgreement"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ── Vocabularies and ends ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def altered(random_pair, tmp_path):
    """A function that copies a model of the random pair, adds tokens and rows, and gives the folder."""

    def make(role: str, *tokens: str, rows: int = 2176) -> Path:
        folder = Path(shutil.copytree(getattr(random_pair, role), tmp_path / f"altered-{role}"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tokens])
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.resize_token_embeddings(rows, mean_resizing=False)
            model.get_output_embeddings().weight.data[2048:] *= 100  # were they not cut, they would show
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("guidance", ["argmax", "top_k"])
def test_padded_rows_of_the_teacher_are_not_there(guidance, altered, random_pair, prompts, tmp_path):
    ends = []
    for teacher in (random_pair.teacher, altered("teacher", "<a>")):
        trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", teacher=str(teacher), guidance=guidance)
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_guidance_ends_at_a_token_that_the_teacher_lacks(altered, random_pair, prompts, tmp_path):
    class Pair:
        student, teacher = altered("student", "<a>"), random_pair.teacher

    def with_stranger(texts, trainer):
        written = write_completions(texts, trainer)
        written["completion_ids"][1][1] = 2048  # "<a>"
        written["prompt_ids"][2] = [2048, *written["prompt_ids"][2]]
        return written

    trainer = make_trainer(Pair, tmp_path, prompts, weight="0.5", max_steps=2)
    trainer.rollout_func = with_stranger
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts[:2] for _ in range(GROUP)])
    guided = batch["guidance_weights"]
    assert guided[1, :3].tolist() == [1, 1, 0] and not guided[1, 2:].any()  # what it would write AT the token is known
    assert not guided[2].any() and guided[[0, 3, 4, 5, 6, 7]].all()
    trainer.train()
    assert all(map(torch.isfinite, map(torch.tensor, logged(trainer, "loss_teacher"))))


def test_other_tokenizers_are_refused_in_one_sentence(altered, random_pair, prompts, tmp_path):
    folder = altered("teacher")
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    ids = state["model"]["vocab"]
    words = sorted(ids, key=ids.__getitem__)[-2:]
    ids[words[0]], ids[words[1]] = ids[words[1]], ids[words[0]]
    file.write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"The tokenizers differ: .*2 disagree.*choose a teacher with the student's"):
        make_trainer(random_pair, tmp_path, prompts, teacher=str(folder))


def test_completions_end_where_the_teacher_ends_too(altered, random_pair, prompts, tmp_path):
    folder = altered("teacher", rows=2048)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [SEVEN, END]
    model.save_pretrained(folder)
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", teacher=str(folder), max_steps=1)
    trainer.rollout_func = None  # it samples by itself
    trainer.train()
    assert trainer.eos_token_ids == trainer.model.generation_config.eos_token_id == [END, SEVEN]
    # TRL cuts what stands behind an end; it should not be written in the first place.
    assert trainer.generation_config.eos_token_id == trainer.generation_kwargs["eos_token_id"] == [END, SEVEN]
    written = trainer._logs["completion"]
    assert any(text.endswith("7") for text in written) and not any("7" in text[:-1] for text in written)


def test_the_pages_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), re.DOTALL)
    for asked, less in (("max_steps=60", "max_steps=1"), ("batch_size=64", "batch_size=8"), ("steps=5", "steps=1")):
        assert asked in code
        code = code.replace(asked, less)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "docs/trl.md", "exec"), names)
    assert logged(names["trainer"], "weight") == [0.02] and logged(names["trainer"], "loss_teacher")[0] > 0


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": "LinearDecay(-1, 0)"}, "initial must be"),
        ({"weight": "often"}, "'often' is not a schedule"),
        ({"guidance": "full"}, "argmax, sampled, top_k, but is 'full'"),
        ({"gate": "garden"}, "gate must be one of"),
        ({"gate": "confidence"}, "is a probability, but is 4.0"),
        ({"soft_horizon": True}, "options of the gate trust_horizon"),
        ({"guidance_top_k": 0}, "guidance_top_k must be 1 or more"),
        ({"per_device_teacher_batch_size": 0}, "per_device_teacher_batch_size must be 1 or more"),
        ({"weight": "UntilAgreement(0.5)", "guidance": "sampled"}, "UntilAgreement needs the agreement"),
        ({"teacher_model_init_kwargs": {"trust_remote_code": True}}, "own code is not run"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        TGPOConfig(**options(tmp_path, **changes))


def test_the_names_and_defaults_are_those_of_the_method(tmp_path):
    assert TGPOConfig(**options(tmp_path)).method() == TGPO()
    for schedule in (LinearDecay(0.1, 0.01), "LinearDecay(0.1, 0.01)"):
        args = TGPOConfig(**options(tmp_path, weight=schedule, gate="trust_horizon", doubt="sum", soft_horizon=True))
        assert args.method() == TGPO(
            weight=LinearDecay(0.1, 0.01), gate="trust_horizon", doubt="sum", soft_horizon=True
        )
        assert json.loads(args.to_json_string())["weight"] == str(schedule)


def test_a_teacher_that_cannot_be_used_is_refused(random_pair, prompts, tmp_path):
    shape = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    for teacher, changes, message in [
        ("nowhere", {}, "No model at nowhere"),
        (torch.nn.Linear(1, 1), {}, "but is a Linear"),
        (LlamaForCausalLM(LlamaConfig(**shape)), {}, "give it as teacher_processing_class"),
        (None, {"guidance": "top_k", "guidance_top_k": 3000}, r"guidance_top_k \(3000\) cannot exceed"),
        (None, {"teacher_model_init_kwargs": {"revison": 1}}, "could not be loaded.*revison"),
    ]:
        with pytest.raises(InputError, match=message):
            make_trainer(random_pair, tmp_path, prompts, teacher=teacher, **changes)
    with pytest.raises(InputError, match="args must be a TGPOConfig, but is a GRPOConfig"):
        TGPOTrainer(str(random_pair.student), str(random_pair.teacher), judge, GRPOConfig(**options(tmp_path)))


def test_a_nameless_teacher_brings_its_tokenizer(random_pair, prompts, tmp_path, tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(random_pair.teacher, dtype=torch.float32)
    teacher.config._name_or_path = ""
    trainer = make_trainer(random_pair, tmp_path, prompts, weight="0.5", teacher=teacher, max_steps=1,
                           teacher_processing_class=tokenizer)  # fmt: skip
    before = weights(teacher)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())
    ids = torch.tensor([[5, 9, 12]])
    assert teacher(ids).logits.shape == (1, 3, 2048)  # it is still the model that was given


# ── The extra ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("installed", ["1.15.3", "1.17.0", "2.0.0", None])
def test_another_trl_is_refused_in_one_sentence(installed, monkeypatch):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("tgpo_lab.integrations.trl.version", version)
    found = "trl is not installed" if installed is None else f"trl {installed} is installed"
    with pytest.raises(ImportError, match=rf"^{found}\. .* needs trl 1\.16: pip install 'tgpo-lab\[trl\]'\.$"):
        require_trl()


def test_the_extra_names_the_same_series():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    major, minor = SUPPORTED_SERIES.split(".")
    assert extras["trl"] == [f"trl>={major}.{minor},<{major}.{int(minor) + 1}"]


def test_the_package_itself_does_without_trl():
    files = [f for f in (ROOT / "tgpo_lab").rglob("*.py") if "integrations" not in f.relative_to(ROOT).parts]
    assert [f for f in files if re.search(r"(from|import) (\.+|tgpo_lab\.)integrations", f.read_text())] == []
