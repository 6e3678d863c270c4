"""Pairs whose tokenizers are not quite the same: what is shared, what is cut, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tgpo_lab.diagnostics.pair_card import measure_pair
from tgpo_lab.errors import InputError
from tgpo_lab.evaluation import evaluate
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.models.policy import project_to_vocabulary
from tgpo_lab.models.shared_vocabulary import share_vocabulary
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.training import train

LETTERS = [chr(c) for c in range(97, 123)]


def word_pieces(*merges: str, normalizer=None, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over letters with merges such as "a b", in that order of importance.

    The vocabulary holds the merged tokens in alphabetical order, so that the order of merges does not show in it.
    """
    tokens = ["<unk>", *LETTERS, *sorted(m.replace(" ", "") for m in merges)]
    pairs = [tuple(m.split()) for m in merges]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(extra))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def altered(random_pair, tmp_path):
    """A function that copies a model of the random pair, adds tokens to its tokenizer and gives the folder."""

    def make(role: str, *tokens: str, rows: int = 2176) -> Path:
        folder = Path(shutil.copytree(getattr(random_pair, role), tmp_path / role))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tokens])
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.resize_token_embeddings(rows, mean_resizing=False)
            # Padded rows and foreign tokens are the most probable ones: were they not cut, they would show.
            model.get_output_embeddings().weight.data[2048:] *= 100
        model.save_pretrained(folder)
        return folder

    return make


# ── Comparing tokenizers ─────────────────────────────────────────────────────────────────────────


def test_the_shared_range_ends_at_the_first_id_that_only_one_has(tokenizer):
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    assert share_vocabulary(tokenizer, teacher, "S", "T").size == 2048
    teacher.add_tokens(["<a>", "<b>"])
    shared = share_vocabulary(tokenizer, teacher, "S", "T")
    assert (shared.size, shared.only_student, shared.beyond) == (2048, {}, {})
    assert shared.only_teacher == {"<a>": 2048, "<b>": 2049}
    assert share_vocabulary(teacher, tokenizer, "S", "T").only_student == {"<a>": 2048, "<b>": 2049}


def test_added_tokens_behind_a_foreign_one_are_cut_and_named():
    ours, theirs = word_pieces("a b", extra=("<x>", "<y>")), word_pieces("a b", extra=("<x>", "<y>"))
    assert share_vocabulary(ours, theirs, "S", "T").size == 30
    state = json.loads(ours.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<x>"]
    state["model"]["vocab"]["<y>"] = 29  # so that it keeps its id
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    assert without.get_vocab()["<y>"] == 29 and 28 not in without.get_vocab().values()
    shared = share_vocabulary(without, theirs, "S", "T")
    assert (shared.size, shared.only_teacher, shared.beyond) == (28, {"<x>": 28}, {"<y>": 29})


def test_an_id_with_two_meanings_is_refused():
    with pytest.raises(InputError, match=r"S has 29 tokens and T has 29; 1 disagree.*id 28 is '<x>'.*and '<y>' in"):
        share_vocabulary(word_pieces("a b", extra=("<x>",)), word_pieces("a b", extra=("<y>",)), "S", "T")


def test_ordinary_tokens_that_one_lacks_are_refused():
    with pytest.raises(InputError, match=r"T has 1 ordinary tokens that S lacks, for example 'cd' \(28\)"):
        share_vocabulary(word_pieces("a b"), word_pieces("a b", "c d"), "S", "T")


def test_other_merges_of_the_same_tokens_are_refused():
    # "the" is t+he or th+e, whichever merge comes first.
    ours, theirs = word_pieces("h e", "t h"), word_pieces("t h", "h e")
    assert ours.get_vocab() == theirs.get_vocab()
    with pytest.raises(InputError, match=r"other merges.*is 't' in S and 'th' in T"):
        share_vocabulary(ours, theirs, "S", "T")


def test_another_normalizer_is_refused():
    ours, theirs = word_pieces("h e"), word_pieces("h e", normalizer=normalizers.Lowercase())
    assert ours.get_vocab() == theirs.get_vocab()
    with pytest.raises(InputError, match=r"another normalisation.*is '<unk>' in S and 't' in T"):
        share_vocabulary(ours, theirs, "S", "T")


# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_tokens_that_only_one_has_are_cut_from_both(altered, random_pair, role):
    folders = {"student": random_pair.student, "teacher": random_pair.teacher}
    folders[role] = altered(role, "<a>", "<b>")
    pair = load_pair(*folders.values())
    assert pair.vocabulary_size == 2048 and pair.end_tokens == [1]
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    same = project_to_vocabulary(getattr(pair, role), hidden)
    assert same.shape == (3, 2176) and int(same.argmax(-1).min()) >= 2048
    assert torch.equal(project_to_vocabulary(getattr(pair, role), hidden, pair.vocabulary_size), same[:, :2048])


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_pair_with_foreign_tokens_trains_and_is_measured_as_if_they_were_not_there(
    altered, random_pair, tiny_config, tmp_path, role
):
    usual = train(tiny_config(tmp_path / "usual", method="gkd"), show_progress=False)
    folder = altered(role, "<a>", "<b>")
    same = train(tiny_config(tmp_path / "other", method="gkd", **{role: str(folder)}), show_progress=False)
    numbers = [c for c in usual.metrics.columns if not c.startswith("seconds")]
    assert same.metrics[numbers].equals(usual.metrics[numbers])
    folders = {"student": random_pair.student, "teacher": random_pair.teacher}
    prompts = load_prompts(random_pair.prompts)["test"]
    cards = [
        measure_pair(load_pair(*{**folders, **changed}.values()), prompts, max_new_tokens=8).as_dict()
        for changed in ({}, {role: folder})
    ]
    for card in cards:
        del card["pair"]
    assert cards[0] == cards[1]


def test_a_prompt_with_a_token_that_the_teacher_lacks_is_refused(altered, random_pair):
    pair = load_pair(altered("student", "<a>"), random_pair.teacher)
    assert pair.encode(["1+2="])
    with pytest.raises(InputError, match=r"'1<a>2=' becomes '<a>' among others \(2048\).*end at 2048"):
        pair.encode(["1<a>2="])


# ── Ends ─────────────────────────────────────────────────────────────────────────────────────────


def set_end(folder: Path, ids: list[int], token: str | None = None) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = ids
    model.save_pretrained(folder)
    if token is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = token
        tokenizer.save_pretrained(folder)


def test_the_ends_of_both_models_end_a_response(altered, random_pair, tokenizer):
    teacher = altered("teacher", rows=2048)
    seven = tokenizer.convert_tokens_to_ids("7")
    set_end(teacher, [seven, 1])
    pair = load_pair(random_pair.student, teacher)
    assert pair.end_tokens == [1, seven]
    # The random student ends in "#7": with the teacher's list that is one token earlier.
    prompts = load_prompts(random_pair.prompts)["test"]
    rollouts = evaluate(pair, prompts=prompts, max_new_tokens=12, temperature=1.0, samples_per_prompt=8).rollouts
    last = {row[mask][-1].item() for row, mask in zip(rollouts.responses, rollouts.mask, strict=True)}
    assert seven in last and not (rollouts.responses[:, :-1] == seven)[rollouts.mask[:, 1:]].any()
    # Whoever generates with the student afterwards has to stop there as well.
    assert set(pair.student.generation_config.eos_token_id) == {1, seven}


@pytest.mark.parametrize("role, other", [("student", "teacher"), ("teacher", "student")])
def test_an_end_that_the_other_lacks_is_refused(altered, random_pair, role, other):
    folders = {"student": random_pair.student, "teacher": random_pair.teacher}
    folders[role] = altered(role, "<end>")
    set_end(folders[role], [2048], "<end>")
    with pytest.raises(InputError) as refusal:
        load_pair(*folders.values())
    for part in (f"The {role} {folders[role]}", "'<end>'", str(folders[other]), "lacks"):
        assert part in str(refusal.value)


def test_one_shared_end_is_enough(altered, random_pair):
    teacher = altered("teacher", "<end>")
    set_end(teacher, [2048, 1])
    assert load_pair(random_pair.student, teacher).end_tokens == [1]


def test_an_end_that_is_no_token_ends_nothing(altered, random_pair):
    # So a benchmark makes every response as long as the limit.
    folders = {role: altered(role, rows=2048) for role in ("student", "teacher")}
    for folder in folders.values():
        set_end(folder, [5000], "<pad>")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
    assert load_pair(*folders.values()).end_tokens == [5000]
