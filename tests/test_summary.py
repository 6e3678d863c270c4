"""The README's sentences on the findings are made from stored results, words as well as numbers."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tgpo_lab.errors import InputError
from tgpo_lab.studies.results import RESULTS
from tgpo_lab.studies.summary import BEGIN, END, summary, with_summary

README = Path(__file__).parent.parent / "README.md"

SETTINGS = {"steps": 45, "prompts_per_step": 8, "evaluate_every": 5}


def store(folder, study: str, accuracies: dict[tuple[str, str], float], planned: int | None = None, **areas) -> Path:
    rows = [
        {"cell": f"{pair}/{label}/{seed}", "pair": pair, "label": label, "seed": seed, "accuracy_before": 0.04,
         "test_accuracy": mean + 0.001 * (seed - 4.5), "area": areas.get(label, 0.5),
         "config": '{"learning_rate": 0.0003}', "steps_to_50": 100 if label == "rkl" else 20}
        for (pair, label), mean in accuracies.items() for seed in range(10)
    ]  # fmt: skip
    place = folder / study
    place.mkdir()
    pd.DataFrame(rows).to_parquet(place / "runs.parquet")
    for table in ("steps", "looks"):
        pd.DataFrame({"cell": []}).to_parquet(place / f"{table}.parquet")
    about = {"runs_finished": len(rows), "runs_planned": planned or len(rows), "settings": SETTINGS}
    (place / "study.json").write_text(json.dumps(about))
    return folder


def headline(tgpo: float, sft: float) -> dict[tuple[str, str], float]:
    far = {("far", "tgpo"): tgpo, ("far", "sft"): sft, ("far", "rkl"): 0.05, ("far", "grpo"): 0.03}
    return {**far, ("near", "tgpo"): 0.98, ("near", "rkl"): 0.98}


@pytest.mark.parametrize(
    ("tgpo", "sft", "words"),
    [(0.9, 0.8, "(after the run TGPO is ahead of SFT)"), (0.7, 0.8, "(after the run TGPO is behind SFT)")],
)
def test_words_follow_the_numbers(tmp_path, tgpo, sft, words):
    text = summary(store(tmp_path, "headline", headline(tgpo, sft)))
    assert words in text and f"from 4 % to {100 * tgpo:.1f} %" in text and "reverse KL ends at 5.0 %" in text
    assert "(between TGPO and reverse KL no difference is shown after the run)." in text  # near: the same accuracies
    assert "trust horizon" not in text


def test_who_is_sooner_is_told_beside_who_ends_higher(tmp_path):
    text = summary(store(tmp_path, "headline", headline(0.8, 0.8), tgpo=0.4, sft=0.625, rkl=0.3))
    far, near = text.splitlines()
    assert "no difference is shown after the run; SFT is sooner, with 22.5 points more on average over the run)" in far
    assert "no difference is shown after the run; TGPO is sooner, with 10.0 points more" in near


def test_the_horizon_is_told_once_its_study_is_complete(tmp_path):
    accuracies = {("far-fragile", "no gate"): 0.01, ("far-fragile", "worst token > 4"): 0.97,
                  ("far", "no gate"): 0.88, ("far", "worst token > 4"): 0.93}  # fmt: skip
    assert summary(store(tmp_path, "horizon", accuracies, planned=500)) == "No study is complete yet."
    (tmp_path / "b").mkdir()
    text = summary(store(tmp_path / "b", "horizon", accuracies))
    fragile, robust = text.split("with the robust teacher")
    assert "learning rate 0.0003" in fragile and "TGPO ends at 1.0 %" in fragile and "alone at 97.0 %" in fragile
    assert "TGPO ends at 88.0 %" in robust and "alone at 93.0 %" in robust
    assert "(+96.0 % (+96.0 to +96.0), shown)" in fragile and "(+5.0 % (+5.0 to +5.0), shown)" in robust


def test_more_steps_are_told_with_their_number_and_with_when_half_was_right(tmp_path):
    accuracies = {("far", "rkl"): 0.96, ("far", "tgpo"): 0.95, ("far", "grpo"): 0.05}
    text = summary(store(tmp_path, "longer", accuracies))
    assert "in 45 steps of 8 prompts reverse KL ends at 96.0 % (" in text
    assert "TGPO at 95.0 % (" in text and "GRPO at 5.0 % (" in text
    assert "at step 100 with reverse KL and at step 20 with TGPO" in text and "every 5 steps" in text


def test_the_larger_pair_is_told_once_its_study_is_complete(tmp_path):
    accuracies = {key: value for key, value in headline(0.9, 0.8).items() if key[0] == "far"}
    larger = {("far-larger", label): value for (_, label), value in accuracies.items()}
    assert summary(store(tmp_path, "headline-larger", larger, planned=500)) == "No study is complete yet."
    (tmp_path / "b").mkdir()
    text = summary(store(tmp_path / "b", "headline-larger", larger))
    assert text.startswith("- **Far, with 11 million weights and responses of twice the length:** TGPO takes")
    assert "to 90.0 %" in text and "in 45 steps" in text and "(after the run TGPO is ahead of SFT)." in text
    both = summary(store(tmp_path / "b", "headline-larger-longer", larger | {("far-larger", "tgpo"): 0.95}))
    assert both.startswith(text.removesuffix(".") + "; tuned anew, on other seeds, TGPO takes") and "to 95.0 %" in both


def test_the_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert text == with_summary(text, RESULTS), "Make it again: tgpo-lab study findings"


def test_only_what_stands_between_the_markers_changes(tmp_path):
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_summary(text, tmp_path) == f"before\n{BEGIN}\nNo study is complete yet.\n{END}\nafter\n"
    with pytest.raises(InputError, match="put them back"):
        with_summary("no markers", tmp_path)
