"""The shipped pairs are what their cards say, and what the lab needs them to be."""

import json

import pytest
import torch

import tgpo_lab
from tgpo_lab.diagnostics.pair_card import PairCard, card_markdown, measure_pair
from tgpo_lab.evaluation import pair_prompts
from tgpo_lab.models.pairs import DATA, load_pair, shipped_pairs
from tgpo_lab.tiny_world.recipes import PAIR_RECIPES

NAMES = ("near", "mid", "far", "far-fragile")


def card_of(name):
    return json.loads((DATA / "pairs" / name / "card.json").read_text())


def test_the_pairs_are_there_and_small():
    assert set(NAMES) <= set(shipped_pairs())
    size = sum(file.stat().st_size for file in (DATA / "models").rglob("*") if file.is_file())
    assert size <= 12e6


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_recipe_is_the_one_in_the_code(name):
    stored = json.loads((DATA / "pairs" / name / "pair.json").read_text())["recipe"]
    assert stored == json.loads(json.dumps(PAIR_RECIPES[name].as_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_measured_again_on_fewer_prompts(name):
    card, again = card_of(name), measure_pair(load_pair(name), count=32)
    assert again.opening == card["opening"]
    for field, tolerance in [
        ("opening_logprob", 0.3), ("student_accuracy", 0.15), ("teacher_accuracy", 0.1), ("reliability", 0.15),
        ("forced_opening_accuracy", 0.1), ("reverse_kl", 1.0), ("agreement", 0.1), ("rejected", 0.15),
    ]:  # fmt: skip
        assert getattr(again, field) == pytest.approx(card[field], abs=tolerance), field


@pytest.mark.parametrize("name", NAMES)
def test_the_readable_card_is_made_from_the_stored_one(name):
    card = card_of(name)
    known = {field: card[field] for field in PairCard.__dataclass_fields__ if field in card}
    text = card_markdown(PairCard(**known), PAIR_RECIPES[name].summary)
    assert (DATA / "pairs" / name / "README.md").read_text() == text


def test_far_is_the_papers_situation():
    card = card_of("far")
    assert card["opening_logprob"] <= -8
    assert card["forced_opening_accuracy"] >= 0.95
    assert card["teacher_accuracy"] >= 0.97
    assert card["reliability"] >= 0.9
    assert card["student_accuracy"] <= 0.2


def test_far_fragile_breaks_the_premise():
    card = card_of("far-fragile")
    assert card["reliability"] <= 0.5
    assert card["teacher_accuracy"] >= 0.97
    assert card["opening_logprob"] == pytest.approx(card_of("far")["opening_logprob"], abs=1e-6)


def test_divergence_grows_from_near_to_far():
    openings = [card_of(name)["opening_logprob"] for name in ("near", "mid", "far")]
    assert openings == sorted(openings, reverse=True)


def test_reliability_is_that_of_the_teachers_own_continuations():
    """Measured again without the library's sampling: transformers' generate from a student's prefix."""
    pair = load_pair("far-fragile")
    prompts = pair_prompts(pair, "test").select(range(12))
    right = 0
    for prompt, answer in zip(prompts["prompt"], prompts["answer"], strict=True):
        tokens = torch.tensor(pair.encode([prompt + " the sum"]))
        out = pair.teacher.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=80, do_sample=False, pad_token_id=0
        )
        right += pair.tokenizer.decode(out[0], skip_special_tokens=True).rpartition("#")[2].strip() == answer
    stored = card_of("far-fragile")["reliability_by_depth"]["2"]  # every student prefix of two tokens is " the sum"
    assert right / 12 == pytest.approx(stored, abs=0.25)


def test_on_the_far_pair_tgpo_learns_where_reverse_kl_does_not(tmp_path):
    final = {}
    for name in ("tgpo", "rkl"):
        config = tgpo_lab.TrainConfig.preset(
            "tiny", name, student="far", steps=24, evaluate_every=0, gradient_terms_every=0, measured_positions=64,
            checkpoint_every=24, output=str(tmp_path / name),
        )  # fmt: skip
        final[name] = tgpo_lab.train(config, show_progress=False).metrics["accuracy"].iloc[-1]
    assert final["tgpo"] >= 0.5
    assert final["tgpo"] >= 3 * final["rkl"]


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_shows_the_measured_figures(name):
    card = card_of(name)
    row = (
        f"| [{name}](data/pairs/{name}/README.md) "
        f"| {card['student_accuracy_sampled']:.2f} → {card['teacher_accuracy']:.2f} "
        f"| {card['opening_logprob']:.1f} nats | {card['reverse_kl']:.2f} nats | {card['agreement']:.2f} "
        f"| {card['reliability']:.2f} |"
    )
    assert row in (DATA.parent / "README.md").read_text()
