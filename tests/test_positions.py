"""A student's changed positions: in its rotary module, in each way through it, in its checkpoints, after a resume."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig

from tgpo_lab.config import TrainConfig
from tgpo_lab.diagnostics.logprob_noise import response_logprobs
from tgpo_lab.errors import InputError
from tgpo_lab.loop.model_card import model_card
from tgpo_lab.models.pairs import load_model, load_pair, require_room
from tgpo_lab.models.positions import set_positions
from tgpo_lab.runs import latest_checkpoint, load_run
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.training import train

THETA = 40.0
LONGER = {"student_positions": 300, "student_rope_theta": THETA}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")


def rotation_of(model, length: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines that the model's own rotary module gives: (length, head width) each."""
    cosine, sine = model.base_model.rotary_emb(torch.zeros(1), torch.arange(length).unsqueeze(0))
    return cosine[0], sine[0]


def rotates_by(model, theta: float) -> bool:
    """Whether position p and pair i of a head of width d are turned by p·θ^(−2i/d), by hand in double precision."""
    cosine, sine = rotation_of(model)
    width = cosine.shape[1]
    angles = torch.tensor([[p * theta ** (-2 * i / width) for i in range(width // 2)] for p in range(250)]).double()
    angles = torch.cat([angles, angles], -1)
    return all(
        torch.allclose(found.double(), wanted, atol=1e-4)
        for found, wanted in ((cosine, angles.cos()), (sine, angles.sin()))
    )


def positions_of(config) -> tuple[int, float]:
    return config.max_position_embeddings, config.rope_parameters["rope_theta"]


@pytest.fixture
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher, **LONGER)


# ── What is computed ─────────────────────────────────────────────────────────────────────────────


def test_the_students_rotary_module_has_the_base_and_the_teachers_does_not(pair, random_pair):
    assert positions_of(pair.student.config) == (300, THETA)
    assert rotates_by(pair.student, THETA) and not rotates_by(pair.student, 10000.0)
    assert positions_of(pair.teacher.config) == (128, 10000.0)
    assert rotates_by(pair.teacher, 10000.0)
    plain = load_pair(random_pair.student, random_pair.teacher)
    assert rotates_by(plain.student, 10000.0) and positions_of(plain.student.config) == (128, 10000.0)


def test_logits_are_those_of_a_model_made_with_that_base(pair, random_pair):
    config = AutoConfig.from_pretrained(random_pair.student)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    made = AutoModelForCausalLM.from_config(config).eval()
    plain = load_model(random_pair.student, torch.float32, "cpu")
    made.load_state_dict(plain.state_dict())
    tokens = torch.randint(40, 2000, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted, before = (model(tokens).logits for model in (pair.student, made, plain))
    torch.testing.assert_close(found, wanted)
    assert (found - before).abs().max() > 0.1


def test_sampling_and_update_compute_with_it(pair):
    with OwnEngine(pair.student).load_weights():
        rollouts = OwnEngine(pair.student).sample(
            pair.encode(["47+85+36=", "7+8="]), 100, [1], 0, samples_per_prompt=3,
            generator=torch.Generator().manual_seed(0), vocabulary_size=pair.vocabulary_size,
        )  # fmt: skip
    wanted = response_logprobs(pair.student, rollouts, 1.0, pair.vocabulary_size, 4096)
    torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=1e-4)


def test_vllm_gets_them(random_pair, tmp_path, monkeypatch):
    from tgpo_lab.parallel.processes import ALONE
    from tgpo_lab.sampling.engine import make_engine

    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_in_vllm")))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    model = load_model(random_pair.student, torch.float32, "cpu")
    model.config.tie_word_embeddings = False  # others cannot be had on a CPU
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(random_pair.student).save_pretrained(tmp_path)
    pair = load_pair(tmp_path, random_pair.teacher, **LONGER)
    config = TrainConfig(engine="vllm", max_new_tokens=160, **LONGER)  # longer than the folder's 128 positions
    engine = make_engine(config, pair, ["47+85+36="], ALONE)
    sys.modules.pop("vllm")
    with engine.load_weights():
        rollouts = engine.sample(
            pair.encode(["47+85+36="]), 40, [1], 0, samples_per_prompt=4, generator=torch.Generator().manual_seed(0)
        )
    wanted = response_logprobs(pair.student, rollouts, 1.0, pair.vocabulary_size, 4096)
    torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=1e-4)


# ── Runs and checkpoints ─────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_loads_as_it_was_trained(tiny_config, tmp_path, random_pair, command):
    run = train(tiny_config(tmp_path, **LONGER), show_progress=False)
    checkpoint = latest_checkpoint(run.directory)
    for model in (run.student, AutoModelForCausalLM.from_pretrained(checkpoint), load_run(run.directory).student):
        assert positions_of(model.config) == (300, THETA) and rotates_by(model, THETA)
    assert positions_of(AutoConfig.from_pretrained(random_pair.student)) == (128, 10000.0)  # the source is as it was


def test_evaluating_a_run_keeps_them(tiny_config, tmp_path, command, monkeypatch):
    from tgpo_lab.cli import evaluate as cli

    run = train(tiny_config(tmp_path, **LONGER), show_progress=False)
    seen, real = [], cli.evaluate

    def evaluate(pair, model, **options):
        seen.extend([pair.student, model])
        return real(pair, model, **options)

    monkeypatch.setattr(cli, "evaluate", evaluate)
    status, printed, _ = command("evaluate", "--run", run.directory, "--count", 2)
    assert status == 0 and "accuracy" in printed
    assert len(seen) == 2 and all(rotates_by(model, THETA) for model in seen)


@pytest.mark.parametrize("lora", [0, pytest.param(4, marks=needs_peft)])
def test_a_resumed_run_ends_with_the_same_weights(tiny_config, tmp_path, lora):
    settings = {**LONGER, "lora_rank": lora, "checkpoint_every": 2}
    whole = train(tiny_config(tmp_path / "whole", steps=4, **settings), show_progress=False)
    train(tiny_config(tmp_path, steps=2, **settings), show_progress=False)
    resumed = train(tiny_config(tmp_path, steps=4, **settings), resume=True, show_progress=False)
    assert rotates_by(resumed.student, THETA)
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, resumed.student.state_dict()[name]), name
    with pytest.raises(InputError, match=r"student_rope_theta=40\.0, not 50\.0"):
        train(tiny_config(tmp_path, steps=5, **{**settings, "student_rope_theta": 50.0}), resume=True)


@needs_peft
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_come_with_the_positions_that_they_were_trained_with(tiny_config, tmp_path, merged):
    config = tiny_config(tmp_path, lora_rank=4, learning_rate=0.01, lora_merged=merged, **LONGER)
    run = train(config, show_progress=False)
    checkpoint = latest_checkpoint(run.directory)
    tokens = torch.randint(40, 2000, (1, 60), generator=torch.Generator().manual_seed(0))
    if merged:
        models = [AutoModelForCausalLM.from_pretrained(checkpoint)]
    else:  # as the card says
        card = (checkpoint / "README.md").read_text()
        assert 'from_pretrained(folder, config=AutoConfig.from_pretrained(folder + "/configuration"))' in card
        own = AutoConfig.from_pretrained(checkpoint / "configuration")
        models = [AutoModelForCausalLM.from_pretrained(checkpoint, config=own)]
    models.append(load_run(run.directory).student)
    for model in models:
        assert positions_of(model.config) == (300, THETA) and rotates_by(model, THETA)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(tokens).logits, run.student(tokens).logits, atol=1e-5, rtol=1e-4)


def test_only_adapters_with_other_positions_have_that_sentence():
    said = [
        "configuration" in model_card(TrainConfig(**changes), [], 0).split("## Settings")[0]
        for changes in (
            {"lora_rank": 4, **LONGER},
            {"lora_rank": 4},
            LONGER,
            {"lora_rank": 4, "lora_merged": True, **LONGER},
        )
    ]
    assert said == [True, False, False, False]


# ── Room, and what is refused ────────────────────────────────────────────────────────────────────


def test_room_is_that_of_the_changed_student(random_pair):
    texts = ["1+2+4="]  # 6 tokens
    short = load_pair(random_pair.student, random_pair.teacher, student_positions=20)
    require_room(short, texts, 14)
    with pytest.raises(InputError, match=r"make 21, but the student was made for at most 20.*more student_positions"):
        require_room(short, texts, 15)
    longer = load_pair(random_pair.student, random_pair.teacher, student_positions=300)
    require_room(longer, texts, 290, model=longer.student)
    with pytest.raises(InputError, match="the teacher was made for at most 128"):
        require_room(longer, texts, 290)


def test_a_run_that_was_too_long_for_its_student_can_start(tiny_config, tmp_path, random_pair):
    folder = tmp_path / "short"
    model = load_model(random_pair.student, torch.float32, "cpu")
    model.config.max_position_embeddings = 10
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_pair.student).save_pretrained(folder)
    with pytest.raises(InputError, match="the student was made for at most 10"):
        train(tiny_config(tmp_path, student=str(folder), steps=1), show_progress=False)
    with pytest.raises(InputError, match="make 18, but the student was made for at most 17"):
        train(tiny_config(tmp_path, student=str(folder), steps=1, student_positions=17), show_progress=False)
    assert train(tiny_config(tmp_path, student=str(folder), steps=1, student_positions=18), show_progress=False)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"student_positions": 0}, r"student_positions must be above max_new_tokens \(80\).*is 0\."),
        ({"student_positions": 80}, r"student_positions must be above max_new_tokens \(80\).*is 80\."),
        ({"student_rope_theta": 0.0}, r"student_rope_theta must be a finite number above 0, but is 0\.0"),
        ({"student_rope_theta": -1.0}, r"student_rope_theta must be a finite number above 0, but is -1\.0"),
        ({"student_rope_theta": float("nan")}, "student_rope_theta must be a finite number above 0, but is nan"),
        ({"student_rope_theta": float("inf")}, "student_rope_theta must be a finite number above 0, but is inf"),
    ],
)
def test_impossible_numbers_are_one_sentence(changes, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**changes)
    assert TrainConfig(student_positions=81, student_rope_theta=0.5)


@pytest.mark.parametrize("positions, theta", [(300, None), (None, 40.0)])
def test_models_without_one_rotary_base_are_refused(positions, theta):
    with pytest.raises(InputError, match="some/gpt2 has none: more positions would need weights of their own"):
        set_positions(GPT2Config(), positions, theta, "some/gpt2")
    with pytest.raises(InputError, match="some/gemma has several kinds"):
        set_positions(Gemma3TextConfig(), positions, theta, "some/gemma")


def test_what_is_not_given_stays():
    rotary = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    config = LlamaConfig(max_position_embeddings=64, rope_parameters=rotary)
    set_positions(config, 99, None, "it")
    assert config.max_position_embeddings == 99 and config.rope_parameters["rope_theta"] == 7.0
    set_positions(config, None, 8.0, "it")
    assert config.max_position_embeddings == 99
    assert config.rope_parameters == {**rotary, "rope_theta": 8.0}
