"""The teacher's responses on disk: written once, read afterwards, mended when damaged."""

import errno
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tgpo_lab
from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.teachers.trace_cache import TraceCache, teacher_identity
from tgpo_lab.training import train

PROMPTS = [[45, 46, 47], [50], [45, 50]]


@pytest.fixture
def tiny_config(tiny_config, tmp_path):
    return functools.partial(tiny_config, tmp_path)


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def limits(pair, **changes):
    values = {"max_new_tokens": 12, "end_tokens": pair.end_tokens, "vocabulary_size": pair.vocabulary_size,
              "pad_token": pair.pad_token}  # fmt: skip
    return {**values, **changes}


@pytest.fixture
def open_cache(pair, tmp_path):
    def make(seed=0, **changes):
        return TraceCache(tmp_path / "traces", pair.teacher, seed=seed, **limits(pair, **changes))

    return make


def drawing(pair, samples, seen=None):
    def draw(prompts, uniform):
        if seen is not None:
            seen.append(prompts)
        return sample_responses(pair.teacher, prompts, samples_per_prompt=samples, uniform=uniform, **limits(pair))

    return draw


def nothing_to_draw(prompts, uniform):
    raise AssertionError(f"{prompts} should have been on disk")


def rows(rollouts):
    finished = rollouts.finished.tolist()
    parts = zip(rollouts.prompts, rollouts.responses, rollouts.mask, finished, strict=True)
    return [(prompt, response[mask].tolist(), end) for prompt, response, mask, end in parts]


def test_traces_are_written_once_and_read_afterwards(pair, open_cache):
    written = open_cache().responses(PROMPTS, 4, drawing(pair, 4))
    read = open_cache().responses(PROMPTS, 4, nothing_to_draw)
    assert rows(written) == rows(read)
    assert written.prompts == [prompt for prompt in PROMPTS for _ in range(4)]
    assert len({str(row) for row in rows(written)}) > 6, "samples of a prompt differ"
    assert written.finished.any() and not written.finished.all()
    # They are what the teacher writes: a response ends with its first end token, or at the limit.
    for _, tokens, finished in rows(written):
        assert [t for t in tokens if t in pair.end_tokens] == tokens[-1:] * finished
        assert finished or len(tokens) == 12


def test_a_trace_depends_on_its_prompt_and_not_on_the_batch_it_was_drawn_in(pair, open_cache, tmp_path):
    together = rows(open_cache().responses(PROMPTS, 2, drawing(pair, 2)))
    shutil.rmtree(tmp_path / "traces")
    alone = [rows(open_cache().responses([prompt], 2, drawing(pair, 2))) for prompt in reversed(PROMPTS)]
    assert [row for part in reversed(alone) for row in part] == together


def test_only_what_is_missing_is_drawn_and_a_prompt_twice_in_a_batch_once(pair, open_cache):
    seen = []
    first = rows(open_cache().responses([PROMPTS[0]], 2, drawing(pair, 2, seen)))
    both = rows(open_cache().responses([PROMPTS[1], PROMPTS[0], PROMPTS[1]], 2, drawing(pair, 2, seen)))
    assert seen == [[PROMPTS[0]], [PROMPTS[1]]]
    assert both[2:4] == first and both[:2] == both[4:]


def test_more_samples_begin_with_those_that_are_there(pair, open_cache):
    few = rows(open_cache().responses([PROMPTS[0]], 2, drawing(pair, 2)))
    many = rows(open_cache().responses([PROMPTS[0]], 5, drawing(pair, 5)))
    assert many[:2] == few
    assert rows(open_cache().responses([PROMPTS[0]], 2, nothing_to_draw)) == few


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-9])


def one_token_changed(file):
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(bytes(data))


def emptied(file):
    file.write_bytes(b"")


def another_prompts(file):
    shutil.copy(next(f for f in file.parent.glob("*.safetensors") if f != file), file)


@pytest.mark.parametrize("damage", [cut_short, one_token_changed, emptied, another_prompts])
def test_a_damaged_file_is_written_anew_with_the_same_tokens(pair, open_cache, damage):
    whole = rows(open_cache().responses(PROMPTS, 3, drawing(pair, 3)))
    seen = []
    for file in sorted(open_cache().folder.glob("*.safetensors"))[:1]:
        damage(file)
    assert rows(open_cache().responses(PROMPTS, 3, drawing(pair, 3, seen))) == whole
    assert [len(prompts) for prompts in seen] == [1]
    assert rows(open_cache().responses(PROMPTS, 3, nothing_to_draw)) == whole


def test_other_seeds_limits_and_teachers_have_traces_of_their_own(pair, open_cache, random_pair, tmp_path):
    caches = [open_cache(), open_cache(seed=1), open_cache(max_new_tokens=13), open_cache(end_tokens=[1, 2])]
    other = shutil.copytree(random_pair.teacher, tmp_path / "other")
    model = load_pair(random_pair.student, other).teacher
    caches.append(TraceCache(tmp_path / "traces", model, seed=0, **limits(pair)))  # the same weights elsewhere
    assert caches[-1].folder == caches[0].folder
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(data))
    caches.append(TraceCache(tmp_path / "traces", model, seed=0, **limits(pair)))
    assert len({cache.folder for cache in caches}) == len(caches) - 1
    one, two = (rows(cache.responses(PROMPTS, 3, drawing(pair, 3))) for cache in caches[:2])
    assert one != two
    about = json.loads((caches[1].folder / "about.json").read_text())
    assert about["seed"] == 1 and about["teacher"].startswith("sha256:")


@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_with_adapters_has_traces_of_its_own(tiny_config, tmp_path, random_pair, offload):
    """transformers calls a model with adapters by its base's name, which is no identity."""
    pytest.importorskip("peft")
    made = train(
        tiny_config(student=str(random_pair.teacher), lora_rank=2, steps=2, checkpoint_every=1, learning_rate=0.01),
        show_progress=False,
    )  # fmt: skip
    before, after = (made.directory / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    scaled = Path(shutil.copytree(after, tmp_path / "scaled"))
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))
    elsewhere = shutil.copytree(after, tmp_path / "elsewhere")
    teachers = [random_pair.teacher, before, after, scaled, elsewhere]
    for number, teacher in enumerate(teachers):
        config = tiny_config(
            teacher=str(teacher), method="sft", teacher_cache=str(tmp_path / "traces"), teacher_offload=offload,
            output=str(tmp_path / f"run-{number}"), steps=1,
        )  # fmt: skip
        train(config, show_progress=False)
    assert len(list((tmp_path / "traces").iterdir())) == len(teachers) - 1


@pytest.mark.parametrize("name", ["some/teacher", "no/name/at all"])
def test_a_teacher_from_nowhere_cannot_be_told_from_others(pair, monkeypatch, name):
    """tests/test_hub_names.py has one from the hub."""
    monkeypatch.setattr(pair.teacher, "name_or_path", name)
    with pytest.raises(InputError, match=f"Nothing tells the weights of '{name}' from others"):
        teacher_identity(pair.teacher)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(pair, open_cache, monkeypatch):
    cache = open_cache()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"could not be kept in .*No space left on device.*teacher_cache"):
            cache.responses(PROMPTS, 2, drawing(pair, 2))
    assert [file.name for file in cache.folder.iterdir()] == ["about.json"]


def test_a_folder_that_cannot_be_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "traces", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="teacher_cache: "):
            tgpo_lab.train(tiny_config(method="sft", teacher_cache=str(folder)), show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sft", "luffy", "tgpo-unconditioned"])
def test_a_run_that_finds_its_traces_ends_like_the_one_that_wrote_them(tiny_config, tmp_path, method):
    def run(name, **changes):
        config = tiny_config(method=method, output=str(tmp_path / name), **changes)
        result = tgpo_lab.train(config, show_progress=False)
        return load_file(latest_checkpoint(result.directory) / "model.safetensors"), result.metrics

    cache = str(tmp_path / "traces")
    first, written = run("first", teacher_cache=cache)
    files = sorted((tmp_path / "traces").rglob("*.safetensors"))
    assert len(files) == 6  # 3 steps of 2 prompts
    for file in files[::2]:
        file.unlink()
    second, read = run("second", teacher_cache=cache)
    third, _ = run("third", teacher_cache=cache)
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name])
    assert written["teacher_trace_tokens"].equals(read["teacher_trace_tokens"])
    assert (written["teacher_trace_tokens"].iloc[:3] > 0).all() and (written["seconds_traces"].iloc[:3] > 0).all()
    plain, _ = run("plain")
    assert any(not torch.equal(first[name], plain[name]) for name in first), "without a cache each step draws anew"


def test_a_prompt_that_comes_again_brings_the_same_traces(tiny_config, tmp_path, random_pair):
    """Two prompts in all: the second step learns from the responses of the first."""
    few = tmp_path / "few"
    few.mkdir()
    lines = (random_pair.prompts / "train.jsonl").read_text().splitlines()[:2]
    (few / "train.jsonl").write_text("\n".join(lines) + "\n")
    (few / "validation.jsonl").write_text((random_pair.prompts / "validation.jsonl").read_text())

    def tokens(**changes):
        config = tiny_config(method="sft", dataset=str(few), **changes)
        return tgpo_lab.train(config, show_progress=False).metrics["teacher_trace_tokens"].tolist()[:3]

    assert len(set(tokens(teacher_cache=str(tmp_path / "traces"), output=str(tmp_path / "kept")))) == 1
    assert len(set(tokens(output=str(tmp_path / "plain")))) > 1
