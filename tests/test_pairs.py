"""Pairs: what their models have room for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import utils as hub
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from tgpo_lab.diagnostics.pair_card import measure_pair
from tgpo_lab.errors import InputError
from tgpo_lab.evaluation import evaluate
from tgpo_lab.models.pairs import load_model, load_pair, require_room
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.training import train

PROMPTS = ["1+2=", "1+2+3+4=", "1+2+3="]  # 4, 8 and 6 tokens
SMALL = {"vocab_size": 2048, "n_layer": 1, "n_head": 2}


@pytest.fixture
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


@pytest.fixture
def limits(pair, monkeypatch):
    """A function that sets the longest sequence of student and teacher; −1 is how some configurations say "any"."""

    def set_limits(student: int, teacher: int) -> None:
        for model, limit in ((pair.student, student), (pair.teacher, teacher)):
            monkeypatch.setattr(model.config, "max_position_embeddings", limit)

    return set_limits


def test_prompt_and_response_may_fill_the_sequence_but_not_exceed_it(pair, limits):
    limits(20, 20)
    require_room(pair, PROMPTS, 12)
    with pytest.raises(InputError, match=r"\(8 tokens\).*\(13\) make 21, .* at most 20\. Lower max_new_tokens"):
        require_room(pair, PROMPTS, 13)
    require_room(pair, PROMPTS[:1], 13, prefix=3)
    with pytest.raises(InputError, match=r"\(4 tokens\), a prefix of up to 4 tokens and max_new_tokens \(13\) make 21"):
        require_room(pair, PROMPTS[:1], 13, prefix=4)


@pytest.mark.parametrize("student, teacher, named", [(20, 30, "student"), (30, 20, "teacher"), (-1, 20, "teacher")])
def test_the_smaller_of_the_two_models_decides(pair, limits, student, teacher, named):
    limits(student, teacher)
    require_room(pair, PROMPTS, 12)
    with pytest.raises(InputError, match=rf"the {named} was made for at most 20\."):
        require_room(pair, PROMPTS, 13)


def test_only_the_model_that_answers_has_to_have_room(pair, limits):
    limits(20, 1000)
    require_room(pair, PROMPTS, 500, model=pair.teacher)
    with pytest.raises(InputError, match="the student was made for at most 20"):
        require_room(pair, PROMPTS, 500, model=pair.student)


def test_other_architectures_are_asked_in_their_own_words_and_those_without_a_limit_have_room(pair, limits):
    limits(-1, -1)
    require_room(pair, PROMPTS, 10**9)
    pair.student = GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=8, n_positions=20, bos_token_id=1, eos_token_id=1))
    with pytest.raises(InputError, match="at most 20"):
        require_room(pair, PROMPTS, 13)
    pair.student = BloomForCausalLM(BloomConfig(**SMALL, hidden_size=8))
    require_room(pair, PROMPTS, 10**9)


def test_training_is_refused_before_it_starts_whichever_model_lacks_room(tiny_config, tmp_path, random_pair):
    config = tiny_config(tmp_path, max_new_tokens=123)  # 6 + 123 > 128
    with pytest.raises(InputError, match=r"\(6 tokens\).*\(123\) make 129"):
        train(config, show_progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluating_and_measuring_are_refused_before_they_start(pair, limits, random_pair):
    prompts = load_prompts(random_pair.prompts)["test"]
    limits(20, 16)
    assert evaluate(pair, prompts=prompts, max_new_tokens=14).rewards.shape == (6,)
    with pytest.raises(InputError, match=r"\(6 tokens\).*\(15\) make 21, but the student"):
        evaluate(pair, prompts=prompts, max_new_tokens=15)
    with pytest.raises(InputError, match=r"\(11\) make 17, but the teacher"):
        evaluate(pair, pair.teacher, prompts=prompts, max_new_tokens=11)
    # Measuring continues prefixes of the responses, by up to max_new_tokens more.
    assert measure_pair(pair, prompts, max_new_tokens=5).prompts == 6
    with pytest.raises(InputError, match=r"prefix of up to 6 tokens.*\(6\) make 18, but the teacher"):
        measure_pair(pair, prompts, max_new_tokens=6)


@pytest.mark.parametrize("do_sample", [None, False, True])
def test_flags_of_sampling_in_a_students_generation_config_do_not_stop_its_checkpoints(
    random_pair, tmp_path, do_sample
):
    folders = {
        name: Path(shutil.copytree(getattr(random_pair, name), tmp_path / name)) for name in ("student", "teacher")
    }
    flags = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7}
    (folders["student"] / "generation_config.json").write_text(json.dumps(flags | {"do_sample": do_sample}))
    (folders["teacher"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    pair = load_pair(folders["student"], folders["teacher"])
    pair.student.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 5] and saved["max_new_tokens"] == 7
    # Without do_sample they have no effect; with it they are the author's.
    assert [saved.get(name) for name in ("temperature", "top_p", "top_k")] == (
        [0.6, 0.9, 20] if do_sample else [None] * 3
    )


def test_loading_shows_no_bar_but_downloads_keep_theirs(random_pair, capsys):
    hub.enable_progress_bars()
    load_model(random_pair.student, torch.float32, None)
    assert capsys.readouterr().err == ""
    list(hub.tqdm([1], desc="Downloading"))
    assert "Downloading" in capsys.readouterr().err
    hub.disable_progress_bars()
    try:
        load_model(random_pair.student, torch.float32, None)
        assert hub.are_progress_bars_disabled()  # as someone wanted it
    finally:
        hub.enable_progress_bars()
