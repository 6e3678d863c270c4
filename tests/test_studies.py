"""Studies: cells are run once, survive stops and failures, and their stored tables say what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

import tgpo_lab
from tgpo_lab.cli import main
from tgpo_lab.errors import InputError
from tgpo_lab.schedules import Constant
from tgpo_lab.studies import catalog, headline, runner, tables
from tgpo_lab.studies.findings import _scale, findings_page
from tgpo_lab.studies.plan import Cell, Study, Variant
from tgpo_lab.studies.report import study_page
from tgpo_lab.studies.results import RESULTS, StudyResults, finished_fingerprints, gather, load_results, run_row
from tgpo_lab.studies.runner import is_finished, result_file, run_cell, run_study
from tgpo_lab.studies.settings import SEEDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
SETTINGS = {
    "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 12, "evaluate_every": 1,
    "evaluation_prompts": 6, "measured_positions": 8, "gradient_terms_every": 0, "checkpoint_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs_folder(random_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    entry = {
        "student": str(random_pair.student),
        "teacher": str(random_pair.teacher),
        "prompts": str(random_pair.prompts),
    }
    (folder / "pairs" / "random").mkdir(parents=True)
    (folder / "pairs" / "random" / "pair.json").write_text(json.dumps(entry))
    return folder


def study_of(*variants: Variant, seeds: tuple[int, ...] = (0, 1), **settings: object) -> Study:
    variants = variants or (Variant("grpo", "grpo"), Variant("TGPO, w 0.1", "tgpo", {"weight": Constant(0.1)}))
    return Study("trial", "Does it run?", ("random",), variants, seeds, {**SETTINGS, **settings})


@pytest.fixture(scope="module")
def finished(pairs_folder, tmp_path_factory):
    """A study whose cells have all been run, and its folder."""
    output = tmp_path_factory.mktemp("trial")
    study = study_of()
    for cell in study.cells():
        assert run_cell(cell, output, pairs_folder)
    return study, output


def test_cells_are_every_combination_with_seeds_outermost():
    cells = study_of(seeds=(3, 4)).cells()
    assert [(cell.variant.label, cell.seed) for cell in cells] == [
        ("grpo", 3), ("TGPO, w 0.1", 3), ("grpo", 4), ("TGPO, w 0.1", 4),
    ]  # fmt: skip
    assert [cell.name for cell in cells[:2]] == ["random/grpo/seed-3", "random/tgpo-w-0.1/seed-3"]


def test_fingerprints_change_with_everything_that_decides_a_run():
    cell = study_of().cells()[1]
    others = [
        replace(cell, recipe="another"),
        replace(cell, seed=7),
        replace(cell, pair="far"),
        replace(cell, settings={**SETTINGS, "steps": 3}),
        replace(cell, variant=replace(cell.variant, options={"weight": Constant(0.2)})),
        replace(cell, variant=replace(cell.variant, settings={"learning_rate": 1e-4})),
    ]
    assert len({other.fingerprint for other in [cell, *others]}) == 7
    assert replace(cell, variant=replace(cell.variant, label="another name")).fingerprint == cell.fingerprint


def test_options_of_a_variant_reach_the_run(pairs_folder, tmp_path):
    config = study_of().cells()[1].config(tmp_path, pairs_folder)
    assert config.method.weight == Constant(0.1)
    assert config.steps == 2 and config.seed == 0
    assert config.student != "random"


def test_a_choice_for_one_pair_replaces_the_variant_there_alone():
    tuned = Variant("grpo", "grpo", settings={"learning_rate": 1e-4})
    study = replace(study_of(Variant("grpo", "grpo")), pairs=("random", "far"), choices={"far": {"grpo": tuned}})
    rates = {cell.pair: dict(cell.variant.settings).get("learning_rate") for cell in study.cells()}
    assert rates == {"random": None, "far": 1e-4}


def test_a_finished_cell_holds_what_was_measured_and_leaves_nothing_else(finished):
    study, output = finished
    for cell in study.cells():
        content = json.loads(result_file(cell, output).read_text())
        assert is_finished(cell, output)
        assert [row["step"] for row in content["steps"]] == [0, 1, 2]
        assert 0 <= content["test_accuracy"] <= 1 and content["failure"] is None
        assert content["config"]["student"] == "random" and content["made_by"]["versions"]["torch"]
        assert str(output) not in json.dumps(content)  # no path of this machine
    assert not [path for path in (output / "working").rglob("*") if path.is_file()]


def test_a_finished_study_is_not_run_again_and_another_configuration_is_not_finished(finished, pairs_folder):
    study, output = finished
    before = {cell.name: result_file(cell, output).stat().st_mtime_ns for cell in study.cells()}
    assert run_study(study, output, pairs_folder, 1, frozenset())  # would start processes for cells to do
    assert before == {cell.name: result_file(cell, output).stat().st_mtime_ns for cell in study.cells()}
    assert not any(is_finished(cell, output) for cell in study_of(steps=3).cells())


def test_a_damaged_result_counts_as_unfinished(finished, tmp_path):
    study, _ = finished
    cell = study.cells()[0]
    file = result_file(cell, tmp_path)
    file.parent.mkdir(parents=True)
    for text in ("", "{", "[]", '{"fingerprint": "other"}'):
        file.write_text(text)
        assert not is_finished(cell, tmp_path)


def test_a_run_that_diverges_is_a_result(pairs_folder, tmp_path):
    cell = study_of(Variant("sft", "sft", settings={"learning_rate": 1e30}), seeds=(0,), steps=4).cells()[0]
    assert run_cell(cell, tmp_path, pairs_folder)
    content = json.loads(result_file(cell, tmp_path).read_text())
    assert "not finite" in content["failure"] and content["test_accuracy"] is None
    row = run_row(content)
    assert row["collapsed"] and row["test_accuracy"] == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_student_is_tested_in_the_precision_that_it_learned_in(pairs_folder, tmp_path, monkeypatch, precision):
    products = []

    def evaluate(pair, model, **options):
        products.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return tgpo_lab.evaluate(pair, model, **options)

    monkeypatch.setattr(runner, "evaluate", evaluate)
    cell = study_of(Variant("grpo", "grpo"), seeds=(0,), precision=precision).cells()[0]
    assert run_cell(cell, tmp_path, pairs_folder)
    assert products == [getattr(torch, precision)]
    content = json.loads(result_file(cell, tmp_path).read_text())
    assert content["config"]["precision"] == precision and content["made_by"]["device"] == "CPU"


def test_gathered_tables_say_what_the_cells_say(finished, tmp_path):
    study, output = finished
    results = gather(study, output, tmp_path)
    stored = load_results("trial", tmp_path)
    pd.testing.assert_frame_equal(results.runs, stored.runs, check_dtype=False)
    pd.testing.assert_frame_equal(results.steps, stored.steps, check_dtype=False)
    assert len(stored.runs) == 4 and len(stored.steps) == 12
    assert stored.about["runs_finished"] == stored.about["runs_planned"] == 4 and stored.about["seeds"] == [0, 1]
    for cell in study.cells():
        content = json.loads(result_file(cell, output).read_text())
        row = stored.runs.set_index("cell").loc[cell.name]
        assert row["test_accuracy"] == content["test_accuracy"] and row["fingerprint"] == cell.fingerprint
        steps = stored.steps[stored.steps["cell"] == cell.name]
        expected = [step["accuracy"] for step in content["steps"]]
        assert steps["accuracy"].tolist() == pytest.approx(expected, abs=1e-6)


def test_what_was_looked_at_in_checkpoints_is_stored(pairs_folder, tmp_path):
    for look, column in (("premise", "teacher_right"), ("gradient", "mean_policy_gradient_second_moment")):
        settings = {"checkpoint_every": 1, "keep_checkpoints": 0}
        study = replace(study_of(Variant("tgpo", "tgpo"), seeds=(0,), **settings), name=look, look=look)
        assert run_cell(study.cells()[0], tmp_path, pairs_folder)
        looks = gather(study, tmp_path, tmp_path / "results").looks
        assert sorted(set(looks["step"])) == [0, 1, 2] and set(looks["cell"]) == {study.cells()[0].name}
        assert looks[column].notna().all() and (looks[column] >= 0).all()
        stored = load_results(look, tmp_path / "results").looks
        pd.testing.assert_frame_equal(looks, stored, check_dtype=False)
        if look == "premise":
            whole = looks.groupby(["step", "depth"])["prefixes"].sum().unstack("depth")
            assert (whole[0] == 6).all()  # all six test prompts at depth 0
            assert (whole.diff(axis=1).fillna(0) <= 0).all(axis=None)  # deeper prefixes are fewer


def test_stored_runs_count_as_finished_and_stay_when_more_are_gathered(finished, tmp_path):
    study, output = finished
    only_first = replace(study, seeds=(0,))
    gather(only_first, output, tmp_path)
    assert finished_fingerprints("trial", tmp_path) == {cell.fingerprint for cell in only_first.cells()}
    # The second time there is no folder with the first seed's cells any more: they come from the stored table.
    elsewhere = tmp_path / "cells-of-seed-1"
    for cell in replace(study, seeds=(1,)).cells():
        target = result_file(cell, elsewhere)
        target.parent.mkdir(parents=True)
        target.write_text(result_file(cell, output).read_text())
    results = gather(study, elsewhere, tmp_path)
    assert sorted(results.runs["seed"]) == [0, 0, 1, 1]
    assert len(results.steps) == 12


def test_runs_under_an_old_configuration_are_not_dropped_without_a_word(finished, tmp_path):
    study, output = finished
    gather(study, output, tmp_path)
    changed = study_of(steps=3)
    with pytest.raises(InputError, match=r"4 of 4 runs stored .* another configuration .* --discard-old"):
        gather(changed, output, tmp_path)
    with pytest.raises(InputError, match="No run of the study 'trial' is finished"):
        gather(changed, output, tmp_path, discard_old=True)
    assert len(load_results("trial", tmp_path).runs) == 4  # what was stored is still there


def test_runs_from_different_models_are_never_put_together(finished, tmp_path):
    study, output = finished
    elsewhere = tmp_path / "cells"
    for number, cell in enumerate(study.cells()):
        content = json.loads(result_file(cell, output).read_text())
        assert len(content["pair_digest"]) == 16
        if number == 3:
            content["pair_digest"] = "another"
        target = result_file(cell, elsewhere)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content))
    with pytest.raises(InputError, match="'random' started from different models"):
        gather(study, elsewhere, tmp_path / "results")
    assert not (tmp_path / "results" / "trial").exists()


def content_of(accuracies, test_accuracy, *, truncated=0.0, failure=None, every=5):
    steps = [
        {
            "step": step,
            "reward": 0.1,
            "truncated": truncated,
            "length": 8.0 + step,
            "entropy": 0.5,
            "gradient_norm": 1.0 + step,
        }
        for step in range(every * (len(accuracies) - 1) + 1)
    ]
    for number, accuracy in enumerate(accuracies):
        steps[every * number]["accuracy"] = accuracy
    return {
        "cell": "far/x/seed-0", "pair": "far", "label": "x", "seed": 0, "fingerprint": "f", "dials": {},
        "config": {"steps": every * (len(accuracies) - 1), "evaluate_every": every},
        "looks": [],
        "pair_digest": "d", "failure": failure, "test_accuracy": test_accuracy, "seconds": 1.0, "steps": steps,
    }  # fmt: skip


def test_a_row_about_a_run_by_hand():
    row = run_row(content_of([0.0, 0.4, 0.8, 1.0], 0.97))
    assert row["area"] == pytest.approx((0.2 * 5 + 0.6 * 5 + 0.9 * 5) / 15)
    assert (row["steps_to_50"], row["steps_to_80"]) == (10, 10)
    assert row["largest_gradient_norm"] == 16 and row["last_length"] == pytest.approx(8 + np.mean([11, 12, 13, 14, 15]))
    assert not row["collapsed"]


@pytest.mark.parametrize(
    "content, collapsed",
    [
        (content_of([0.8, 0.9, 0.46], 0.46), False),
        (content_of([0.8, 0.9, 0.45], 0.45), True),  # half of its maximum
        (content_of([0.04, 0.95, 0.0], 0.0), True),  # learned, then lost
        (content_of([0.1, 0.19, 0.0], 0.0), False),  # there was nothing to lose
        (content_of([0.1, 0.1], 0.1, truncated=0.5), True),
        (content_of([0.1, 0.1], 0.1, truncated=0.49), False),
        (content_of([0.8, 0.8], None, failure="Step 3: loss_teacher is not finite."), True),
    ],
)
def test_what_counts_as_collapsed(content, collapsed):
    assert run_row(content)["collapsed"] is collapsed


def test_a_failed_run_has_no_accuracy_from_its_failure_on():
    content = content_of([0.8, 0.8, 0.8, 0.8, 0.8], None, failure="Step 7: the gradient is not finite.")
    content["steps"] = content["steps"][:7]  # of 20; accuracy at 0 and 5
    row = run_row(content)
    assert row["area"] == pytest.approx((0.8 * 5 + 0.4 * 5) / 20)
    content["steps"] = []  # it failed before the first row was written
    assert run_row(content)["area"] == 0 and run_row(content)["accuracy_before"] == 0


def test_tables_are_made_of_the_stored_numbers():
    runs = pd.DataFrame(
        run_row({**content_of([0.0, value, value], value), "label": label, "seed": seed})
        for label, values in {"tgpo": [0.9, 0.8, 1.0], "rkl": [0.1, 0.2, 0.0]}.items()
        for seed, value in enumerate(values)
    )
    table = tables.summary(runs).set_index("method")
    assert table.loc["tgpo", "test accuracy"].startswith("90.0 % (")
    assert table.loc["tgpo", "steps to 50 %"] == "5" and table.loc["rkl", "steps to 50 %"] == "never"
    assert table.loc["tgpo", "collapsed"] == "0 of 3"
    compared = tables.comparison(runs, "tgpo").iloc[0]
    assert compared["tgpo against"] == "rkl" and compared["seeds won"] == "3 of 3" and compared["p"] == "0.25"
    assert tables.summary(runs[runs["seed"] == 0]).set_index("method").loc["tgpo", "test accuracy"] == "90.0 %"
    text = tables.markdown(tables.summary(runs))
    assert text.count("\n") == 4 and "| far | rkl | 3 |" in text
    assert tables.steps_text(pd.Series([5, None, 15])) == "15 (1 of 3 never)"
    assert tables.steps_text(pd.Series([5, None, None])) == "never (2 of 3 never)"
    assert tables.steps_text(pd.Series([5, 15])) == "10" and tables.steps_text(pd.Series([None, None])) == "never"


def test_every_named_study_is_made_of_runs_that_can_be(tmp_path):
    store_tuning(tmp_path)
    store_tuning(tmp_path, headline.LARGER)
    store_tuning(tmp_path, headline.LARGER_LONGER)
    for name in catalog.STUDIES:
        study = catalog.make_study(name, tmp_path)
        cells = study.cells()
        assert len({cell.name for cell in cells}) == len({cell.fingerprint for cell in cells}) == len(cells)
        assert name.startswith("tuning") or set(study.references) <= {cell.variant.label for cell in cells}


@pytest.mark.parametrize("plan", headline.HEADLINES.values(), ids=lambda plan: plan.name)
def test_every_method_is_tuned_with_as_many_configurations(plan, tmp_path):
    counts = {method: headline.configurations(method, plan) for method in plan.methods}
    assert {len(found) for found in counts.values()} == {len(plan.rates)}
    labels = [variant.label for found in counts.values() for variant in found]
    assert len(set(labels)) == len(labels)
    store_tuning(tmp_path, plan)
    used = {name: {cell.seed for cell in catalog.make_study(name, tmp_path).cells()} for name in
            (plan.tuning, plan.name)}  # fmt: skip
    assert used == {plan.tuning: set(plan.tuning_seeds), plan.name: set(plan.seeds)}
    assert not used[plan.tuning] & {seed for other in headline.HEADLINES.values() for seed in other.seeds}


def test_the_longer_larger_headline_has_its_own_seeds_and_twice_the_steps(tmp_path):
    store_tuning(tmp_path, headline.LARGER_LONGER)
    cells = catalog.make_study("headline-larger-longer", tmp_path).cells()
    assert not {cell.seed for cell in cells} & set(SEEDS)
    tgpo = next(cell for cell in cells if cell.variant.label == "tgpo")
    weight = tgpo.variant.options["weight"]
    assert weight(0) == 0.02 and weight(39) > 0 and weight(40) == 0 and tgpo.settings["steps"] == 60


def test_the_larger_headline_is_about_the_larger_pair_alone_and_learns_from_bfloat16_products(tmp_path):
    store_tuning(tmp_path, headline.LARGER)
    study = catalog.make_study("headline-larger", tmp_path)
    assert {"rkl", "grpo", "tgpo", "sft"} <= {cell.variant.label for cell in study.cells()}
    assert {cell.pair for cell in study.cells()} == {"far-larger"} == set(study.recipes)
    assert all(cell.settings["precision"] == "bfloat16" for cell in study.cells())
    tgpo = next(cell for cell in study.cells() if cell.variant.label == "tgpo")
    assert dict(tgpo.variant.settings) == {"learning_rate": headline.LARGER.rates[-1]}
    weight = tgpo.variant.options["weight"]
    assert weight(0) == 0.02 and weight(19) > 0 and weight(20) == 0 and tgpo.settings["steps"] == 30
    # A response has room, even one that is worked out after a terse start.
    task = study.recipes["far-larger"].student.task
    assert task.name == "3x4" and tgpo.settings["max_new_tokens"] >= 101 + 12


def store_tuning(folder: Path, plan: headline.Headline = headline.USUAL) -> None:
    """A made-up tuning in which the last configuration is best on far pairs and all are alike near."""
    study = catalog.make_study(plan.tuning, folder)
    for cell in study.cells():
        is_last = cell.variant.label == headline.configurations(cell.variant.method, plan)[-1].label
        value = 0.9 if is_last and cell.pair.startswith("far") else 0.3
        content = {**content_of([0.0, value, value], value), "cell": cell.name, "pair": cell.pair, "seed": cell.seed,
                   "label": cell.variant.label, "fingerprint": cell.fingerprint,
                   "made_by": {"time": "2026-01-01T00:00:00+00:00"}}  # fmt: skip
        file = result_file(cell, folder / f"cells-of-{plan.tuning}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    gather(study, folder / f"cells-of-{plan.tuning}", folder)


def test_the_headline_takes_the_best_tuned_configuration_of_each_pair(tmp_path):
    with pytest.raises(InputError, match="study 'tuning'"):
        catalog.make_study("headline", tmp_path)
    store_tuning(tmp_path)
    for cell in catalog.make_study("headline", tmp_path).cells():
        first, *_, last = headline.configurations(cell.variant.method)
        expected = last if cell.pair == "far" else first
        assert (dict(cell.variant.options), dict(cell.variant.settings)) == (
            dict(expected.options), dict(expected.settings),
        )  # fmt: skip
        assert cell.variant.label == cell.variant.method


def test_a_tuning_under_other_settings_is_not_taken(tmp_path, monkeypatch):
    store_tuning(tmp_path)
    monkeypatch.setitem(headline.SETTINGS, "steps", 61)
    with pytest.raises(InputError, match="not complete"):
        catalog.make_study("headline", tmp_path)


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_studies import study_of
from tgpo_lab.studies.settings import SEEDS, TUNING_SEEDS
from tgpo_lab.studies.runner import run_study

if __name__ == "__main__":
    sys.exit(0 if run_study(study_of(steps=40), Path(sys.argv[1]), Path(sys.argv[2]), 1, frozenset()) else 130)
"""


@pytest.mark.parametrize("number, whole_group", [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_a_study_that_is_stopped_goes_on_with_the_cells_that_are_missing(number, whole_group, pairs_folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=os.path.dirname(__file__)))
    output = tmp_path / "study"
    command = [sys.executable, str(program), str(output), str(pairs_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    cells = study_of(steps=40).cells()
    deadline = time.monotonic() + 120
    while not any(is_finished(cell, output) for cell in cells):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # Ctrl-C in a terminal reaches the whole group; a kill the study's own process alone.
    (os.killpg if whole_group else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=60)
    time.sleep(1)  # its processes end with it and finish nothing more
    done = {cell.name: result_file(cell, output).stat().st_mtime_ns for cell in cells if is_finished(cell, output)}
    assert 1 <= len(done) < len(cells)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "goes on with the others" in said
    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=180)
    assert again.returncode == 0 and f"{len(cells) - len(done)} of them to do" in again.stdout
    assert all(is_finished(cell, output) for cell in cells)
    assert {name: (output / "cells" / f"{name}.json").stat().st_mtime_ns for name in done} == done


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nonsense"], "Unknown study 'nonsense'"),
        (["tuning", "--processes", "0"], "processes must be 1 or more"),
        (["report", "nonsense"], "Unknown study 'nonsense'"),
        (["tuning", "--results", "/proc/nothing"], "Cannot write to the folder /proc/nothing"),
        (["headline", "--results", "nowhere"], "There are no results of a study 'tuning' in nowhere"),
        (["report", "map", "--results", "nowhere"], "There are no results of a study 'map' in nowhere"),
        (["headline-larger", "--results", "nowhere"], "There are no results of a study 'tuning-larger' in nowhere"),
        (["tuning", "--device", "cuda:99"], "There is no device 'cuda:99' here"),
        (["tuning", "--device", "gpu"], "There is no device 'gpu' here"),
    ],
)
def test_bad_input_on_the_command_line(arguments, sentence, capsys):
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_two_studies_never_share_a_folder(pairs_folder, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="Another process is running this study"):
        run_study(study_of(), tmp_path, pairs_folder, 1, frozenset())


def test_results_that_cannot_be_read_are_named(finished, tmp_path):
    study, output = finished
    gather(study, output, tmp_path)
    (tmp_path / "trial" / "runs.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"the study 'trial' .* cannot be read .* Restore .*trial or remove it"):
        load_results("trial", tmp_path)


def test_a_pair_that_is_not_built_is_refused_before_anything_runs(tmp_path):
    study = replace(study_of(), pairs=("random", "absent"))
    with pytest.raises(InputError, match="'random' is neither shipped nor built"):
        run_study(study, tmp_path / "study", tmp_path, 1, frozenset())
    assert isinstance(Cell("far", Variant("x", "grpo"), 0, SETTINGS).config(tmp_path, tmp_path).student, str)


# ── Pages ────────────────────────────────────────────────────────────────────────────────────────


def results_of(
    name: str, values: dict[tuple[str, str], list[float]], dials: dict[str, dict[str, float]]
) -> StudyResults:
    contents = [
        {**content_of([0.1, value, value], value), "cell": f"{pair}/{label}/seed-{seed}", "pair": pair, "label": label,
         "seed": seed, "dials": dials.get(pair, {})}
        for (pair, label), numbers in values.items() for seed, value in enumerate(numbers)
    ]  # fmt: skip
    made_by = {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "device": "CPU"}
    about = {"study": name, "question": "Why?", "runs_finished": len(contents), "runs_planned": len(contents),
             "seeds": [0, 1], "run_minutes": 3.2, "made_by": [made_by], "references": ["tgpo"],
             "settings": {"steps": 10}}  # fmt: skip
    steps = pd.concat(
        [pd.DataFrame(content["steps"]).assign(**{key: content[key] for key in ("cell", "pair", "label", "seed")})
         for content in contents], ignore_index=True,
    )  # fmt: skip
    return StudyResults(pd.DataFrame([run_row(content) for content in contents]), steps, pd.DataFrame(), about)


def test_a_page_shows_every_method_and_its_figures(tmp_path):
    results = results_of("schedule", {("far", "a"): [0.9, 0.8, 0.7], ("far", "b"): [0.1, 0.2, 0.3]}, {})
    page = study_page(results, "figures")
    assert "| far | a | 3 | 80.0 % (" in page.text and "| far | b | 3 | 20.0 % (" in page.text
    assert "6 of 6 runs" in page.text and "not complete" not in page.text
    page.write_figures(tmp_path)
    for name in page.figures:
        assert f"(figures/{name}.png)" in page.text and (tmp_path / f"{name}.png").stat().st_size > 5000
    for figure in page.figures.values():
        for axes in figure.axes:
            assert axes.get_xlabel() and (axes.get_ylabel() or axes.get_yticklabels()[0].get_text())


def test_the_same_results_make_the_same_page(tmp_path):
    results = results_of("schedule", {("far", "a"): [0.9, 0.8, 0.7], ("far", "b"): [0.1, 0.2, 0.3]}, {})
    first, again = study_page(results, "figures"), study_page(results, "figures")
    assert first.text == again.text
    for folder, page in ((tmp_path / "first", first), (tmp_path / "again", again)):
        page.write_figures(folder)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_figure_shows_no_more_lines_than_it_bears():
    values = {("far", f"variant {number}"): [number / 20] * 2 for number in range(12)}
    results = results_of("horizon", values, {})
    results.about["references"] = ["variant 0"]
    drawn = study_page(results, "figures").figures["horizon-accuracy"].axes[0].get_lines()
    assert [line.get_label() for line in drawn] == ["variant 0", *(f"variant {number}" for number in range(11, 5, -1))]


def test_a_study_under_way_says_so():
    results = results_of("schedule", {("far", "a"): [0.9], ("far", "b"): [0.1]}, {})
    results.about["runs_planned"] = 10
    assert "The study is not complete" in study_page(results, "figures").text


@pytest.mark.parametrize("name", ["tuning-larger", "headline-larger"])
def test_pages_of_the_larger_headline_stand_while_it_is_under_way(name, tmp_path):
    plan = headline.LARGER
    label = {"tuning-larger": "tgpo 0.0001", "headline-larger": "tgpo"}[name]
    results = results_of(name, {("far-larger", label): [0.9], ("far-larger", label.replace("tgpo", "rkl")): [0.1]}, {})
    results.about.update(runs_planned=24, seeds=[0], settings=plan.settings)
    runs = results.runs.assign(config=json.dumps({"learning_rate": 1e-4}))
    page = study_page(replace(results, runs=runs), "figures")
    assert "2 of 24 runs, seed 0," in page.text and "The study is not complete" in page.text
    assert "A run: 30 steps × 4 prompts × 8 samples, in bfloat16." in page.text
    page.write_figures(tmp_path)
    if name == "headline-larger":
        assert "3 learning rates (3e-05, 0.0001, 0.0003) on each pair, one seed each" in page.text
        assert "(study tuning-larger)" in page.text and "lie beyond: none does." in page.text
        assert {"headline-larger-accuracy", "headline-larger-entropy"} <= set(page.figures)
    else:
        assert "another rate in no case." in page.text and "| tgpo | 70.0 % |" in page.text


def test_a_tuning_without_a_best_rate_says_so():
    levels = {"rkl 0.0001": 0.0, "rkl 0.0003": 0.0, "tgpo 0.0001": 0.5, "tgpo 0.0003": 0.2}
    results = results_of("tuning-larger", {("far-larger", label): [level] for label, level in levels.items()}, {})
    rates = [json.dumps({"learning_rate": float(label.split()[1])}) for label in results.runs["label"]]
    text = study_page(replace(results, runs=results.runs.assign(config=rates)), "figures").text
    assert "the same largest area, and the smallest of them was taken: rkl on far-larger.\n" in text


def test_time_on_a_gpu_is_not_called_that_of_a_core():
    results = results_of("schedule", {("far", "a"): [0.9], ("far", "b"): [0.1]}, {})
    assert "3 minutes of one core in all" in study_page(results, "figures").text
    results.about["made_by"][0]["device"] = "NVIDIA H100"
    text = study_page(results, "figures").text
    assert "3 minutes in all, of each run one after another." in text and "NVIDIA H100." in text
    assert "of one core" not in text


def test_the_page_says_on_what_and_how_large_from_what_is_stored():
    stored = {name: results_of(name, {("far", "a"): [0.9]}, {}) for name in ("schedule", "horizon")}
    assert _scale(stored) == "No study has been run on a GPU. Students have 0.24 million weights."
    stored["headline-larger"] = results_of("headline-larger", {("far-larger", "tgpo"): [0.9]}, {})
    stored["headline-larger"].about["made_by"] = [{"device": "NVIDIA H100"}]
    assert _scale(stored) == (
        "Some runs were made on NVIDIA H100. Students have 0.24 million weights, in headline-larger 11 million."
    )
    assert _scale({}) == "No study has been run on a GPU."


def test_the_map_stands_on_measured_axes():
    near, far = catalog.OPENINGS[0], catalog.OPENINGS[2]
    levels = {(near, 0.0): (-1.44, 0.29, 0.1), (far, 0.0): (-9.02, 0.0, 0.3),
              (near, 1.0): (-1.44, 0.97, 0.5), (far, 1.0): (-9.02, 0.97, 0.7)}  # fmt: skip
    named = {catalog.map_pair(*asked): measured for asked, measured in levels.items()}
    dials = {pair: {"opening_logprob": opening, "reliability": share} for pair, (opening, share, _) in named.items()}
    values = {(pair, label): [level, level] for pair, (_, _, level) in named.items() for label in ("tgpo", "rkl")}
    results = results_of("map", values, dials)
    rates = {"tgpo": 6e-4, "rkl": 3e-4}
    configs = [json.dumps({"learning_rate": rates[label]}) for label in results.runs["label"]]
    page = study_page(replace(results, runs=results.runs.assign(config=configs)), "figures")
    assert "(rkl at 0.0003, tgpo at 0.0006)" in page.text
    axes = page.figures["map-tgpo"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-1.4", "-9.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.97", "0.00 to 0.29"]
    shown = [text.get_text() for text in axes.texts]
    areas = [(0.1 + level) / 2 * 0.5 + level * 0.5 for level in (0.5, 0.7, 0.1, 0.3)]
    assert shown == [f"{area:.2f}" for area in areas]
    assert {text.get_text() for text in page.figures["map-tgpo-minus-rkl"].axes[0].texts} == {"+0.00"}


def test_digits_in_the_names_of_pairs_are_read_as_numbers():
    pairs = list(dict.fromkeys(load_results("map").runs["pair"]))
    assert pairs == list(catalog.map_recipes())


def test_prefixes_are_weighed_by_their_number():
    results = results_of("premise", {("far", "tgpo"): [0.9, 0.7]}, {})
    common = {"cell": "far/tgpo/seed-0", "pair": "far", "label": "tgpo", "seed": 0, "step": 0, "teacher_entropy": 0.5,
              "student_right_after_token": 0.0, "student_right": 0.0}  # fmt: skip
    looks = pd.DataFrame([
        {**common, "depth": 0, "believable": True, "teacher_right": 0.5, "prefixes": 50},  # the prompt
        {**common, "depth": 1, "believable": True, "teacher_right": 1.0, "prefixes": 10},
        {**common, "depth": 1, "believable": False, "teacher_right": 0.5, "prefixes": 20},
        {**common, "depth": 2, "believable": False, "teacher_right": 0.0, "prefixes": 10},
    ])  # fmt: skip
    text = study_page(replace(results, looks=looks), "figures").text
    row = next(line for line in text.splitlines() if line.startswith("| far |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "50 %"  # (10 + 10 + 0) of 40
    assert cells[5:8] == ["25 %", "58 %", "33 %"]  # inside: (25 + 10) of 60 with the prompts
    assert cells[8].startswith("80.0 % (")
    assert "- far: the teacher goes on rightly from 58 % of prefixes inside, 33 % outside; after the token" in text
    assert "| far | 25 % | 100 % | 33 % |" in text  # the same looks as those of the last step, without the prompts


def test_runs_that_are_the_same_under_several_names_are_told():
    values = {("far", "a"): [0.9, 0.8], ("far", "b"): [0.9, 0.8], ("far", "c"): [0.9, 0.7], ("near", "c"): [0.9, 0.7]}
    text = study_page(results_of("schedule", values, {}), "figures").text
    told = text.split("### The same run under several names")[1].split("###")[0]
    assert "- a, b on far\n" in told and "- c on far, near\n" in told
    assert (
        "under several names"
        not in study_page(
            results_of("schedule", {("far", "a"): [0.9, 0.8], ("far", "b"): [0.9, 0.7]}, {}), "figures"
        ).text
    )


def test_the_map_stars_what_is_shown_cell_by_cell():
    seeds = 10
    values = {}
    for pair in catalog.map_recipes():
        values[pair, "rkl"] = [0.5] * seeds
        values[pair, "tgpo"] = [0.9] * seeds if pair == catalog.map_pair(-13.0, 1.0) else [0.4, 0.6] * (seeds // 2)
    dials = {catalog.map_pair(o, r): {"opening_logprob": o, "reliability": r}
             for o in catalog.OPENINGS for r in catalog.RELIABILITIES}  # fmt: skip
    results = results_of("map", values, dials)
    runs = results.runs.assign(config=json.dumps({"learning_rate": 6e-4}))
    text = study_page(replace(results, runs=runs), "figures").text
    table = text.split("### tgpo − rkl, cell by cell")[1].split("###")[0]
    assert table.count("*") == 2  # one cell, by area and after the run
    row = next(line for line in table.splitlines() if line.startswith("| 1.00 |"))
    assert row.split("|")[5].strip().endswith("/ +40 *")


def test_teacher_tokens_are_counted_up_to_the_moment_of_the_accuracy():
    labels = ("tgpo", "sft", "tgpo-unconditioned")
    results = results_of("conditioning", {("far", label): [0.9, 0.9] for label in labels}, {})
    is_tgpo = results.steps["label"] == "tgpo"
    weight = np.where(results.steps["step"] < 8, 0.02, 0.0)  # guidance has ended at step 8
    guided = np.where(is_tgpo & (weight > 0), 0.25, np.nan)
    steps = results.steps.assign(tokens=100.0, guided=guided, weight=weight,
                                 teacher_trace_tokens=np.where(is_tgpo, 0.0, 300.0))  # fmt: skip
    page = study_page(replace(results, steps=steps), "figures")
    lines = {tuple(np.round(line.get_xdata(), 4)) for line in page.figures["conditioning-by-tokens"].axes[0].lines}
    # Accuracy at steps 0, 5 and 10, in thousands of tokens: a quarter of 100 a step, all 300, at most 100.
    assert lines == {(0.0, 0.125, 0.2), (0.0, 1.5, 3.0), (0.0, 0.5, 0.8)}
    assert "| far | 200 | tgpo | 90.0 %" in page.text  # the most that all have reached
    accuracy = 0.1 + 0.8 * 200 / 1500  # of sft, on the line from (0, 0.1) to (1500, 0.9)
    assert f"| far | 200 | sft | {100 * accuracy:.1f} %" in page.text


def test_a_long_response_is_looked_at_in_the_last_step_that_guides():
    results = results_of("long", {("far-long", "tgpo"): [0.9, 0.9]}, {})
    step = results.steps["step"]
    steps = results.steps.assign(
        weight=np.where(step < 8, 0.02, 0.0),
        guided=np.where(step == 7, np.where(results.steps["seed"] == 0, 0.25, 0.75), 1.0),
        agreement=0.9, length=150.0 + step, truncated=0.0, reward=0.125,
    )  # fmt: skip
    page = study_page(replace(results, steps=steps), "figures")
    row = next(line for line in page.text.splitlines() if line.startswith("| far-long | tgpo | 50.0 %"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("50.0 % (") and cells[3] == "90.0 % (90.0 to 90.0)"
    assert cells[4:] == ["157.0 (157.0 to 157.0)", "0.0 % (0.0 to 0.0)", "12.5 % (12.5 to 12.5)"]
    assert "samples of step 7, the last" in page.text and "long-guided" in page.figures


def test_the_findings_are_made_from_the_stored_results():
    """A number typed by hand, or a page that is older than the results, is found here."""
    page = findings_page()
    assert (DOCS / "findings.md").read_text() == page.text
    assert {file.stem for file in (DOCS / "figures").glob("*.png")} == set(page.figures)
    assert sum(file.stat().st_size for file in RESULTS.rglob("*") if file.is_file()) <= 20e6


@pytest.mark.parametrize("name", sorted(file.parent.name for file in RESULTS.glob("*/study.json")))
def test_the_committed_results_are_those_of_the_runs_that_the_study_names(name):
    # A new field of TrainConfig must not make strangers of finished runs: see ADDED_LATER.
    wanted = {cell.fingerprint for cell in catalog.make_study(name).cells()}
    stored = set(load_results(name).runs["fingerprint"])
    assert stored and stored <= wanted
