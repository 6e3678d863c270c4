"""Building pairs: what the dials change, what is shared, and that a build can be repeated and interrupted.

The recipes are the shipped ones with models of one narrow layer and a few steps of training. They
learn nothing, but go every way that the real ones go.
"""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import DATA, load_model, load_pair
from tgpo_lab.tasks.prompts import load_prompts
from tgpo_lab.tiny_world import building, pretraining, recipes
from tgpo_lab.tiny_world.arithmetic import worked_text
from tgpo_lab.tiny_world.building import build_pair, number_of_weights, response_limit
from tgpo_lab.tiny_world.pretraining import acquaint_teacher, build_teacher, set_student_opening
from tgpo_lab.tiny_world.recipes import (
    PAIR_RECIPES,
    UNSHIPPED_RECIPES,
    PairRecipe,
    Pretraining,
    dialled,
    larger,
    longer_task,
)
from tgpo_lab.tiny_world.texts import TextBatch, TextSource

FEW_STEPS = Pretraining(steps=3, batch_size=4, learning_rate=3e-3, warmup_steps=1)
NARROW = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16}


def small(recipe: PairRecipe, **teacher: object) -> PairRecipe:
    """A recipe shrunk to well under a second, with some fields of its teacher changed."""
    return replace(
        recipe,
        student=replace(recipe.student, skill=FEW_STEPS, opening=FEW_STEPS, **NARROW),
        teacher=replace(recipe.teacher, **{"training": FEW_STEPS, "acquaintance": FEW_STEPS, **NARROW, **teacher}),
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def when_written(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


# ── Dials ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PAIR_RECIPES)
def test_a_recipe_with_no_dial_turned_is_the_recipe_itself(name):
    assert dialled(PAIR_RECIPES[name]) == PAIR_RECIPES[name]
    assert dialled(PAIR_RECIPES[name], reliability=float("fragile" not in name)) == PAIR_RECIPES[name]  # as it is


def test_divergence_changes_the_student_alone():
    far = PAIR_RECIPES["far"]
    for dials in ({"opening_logprob": -11.5}, {"rival_margin": -2.0}, {"opening_logprob": 0.0, "rival_margin": 10.0}):
        turned = dialled(far, **dials)
        assert turned.student == replace(far.student, **dials)
        opening, margin = turned.student.opening_logprob, turned.student.rival_margin
        assert turned.student_name == f"student-opening{opening:g}-margin{margin:g}"
        assert (turned.teacher, turned.teacher_name) == (far.teacher, "teacher-robust")
        assert turned.summary == f"Dials turned: {turned.student_name}, teacher-robust."


def test_reliability_changes_the_teacher_alone():
    far = PAIR_RECIPES["far"]
    for reliability, name, foreign_share in ((0, "teacher-fragile", 0.0), (0.25, "teacher-reliability0.25", 0.6)):
        turned = dialled(far, reliability=reliability)
        assert (turned.student, turned.student_name) == (far.student, "student-far")
        assert (turned.teacher_name, turned.teacher.foreign_share) == (name, foreign_share)
        assert turned.teacher.until_reliability == (reliability or None)
    # All teachers that are not robust start from the same clean texts, so they share that stage.
    assert dialled(far, reliability=0.25).teacher.training == dialled(far, reliability=0).teacher.training
    fragile = dialled(far, reliability=0)
    assert fragile == replace(PAIR_RECIPES["far-fragile"], summary=fragile.summary)
    assert dialled(PAIR_RECIPES["far-fragile"], reliability=1).teacher == far.teacher


def test_models_of_different_recipes_have_different_names():
    turned = [
        dialled(PAIR_RECIPES[pair], opening_logprob=opening, rival_margin=margin, reliability=reliability)
        for pair in ("near", "far-fragile")
        for opening in (None, -3.0, -3.25)
        for margin in (None, 0.0, -1.5)
        for reliability in (None, 0.0, 0.5, 0.75, 1.0)
    ]
    turned += [change(recipe) for recipe in PAIR_RECIPES.values() for change in (longer_task, larger)]
    for of in ("student", "teacher"):
        by_name = {}
        for recipe in turned:
            assert by_name.setdefault(getattr(recipe, f"{of}_name"), getattr(recipe, of)) == getattr(recipe, of)
        assert len(by_name) > 3


@pytest.mark.parametrize(
    "dial, values",
    [("opening_logprob", (0.1, -30.1)), ("rival_margin", (-10.1, 10.1)), ("reliability", (-0.01, 1.01))],
)
def test_a_dial_turned_too_far_is_refused(dial, values):
    for value in (*values, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InputError, match=rf"{dial}.*{value}"):
            dialled(PAIR_RECIPES["far"], **{dial: value})


# ── Building ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the pair "far", built from its small recipe."""
    output = tmp_path_factory.mktemp("built")
    assert build_pair("far", small(PAIR_RECIPES["far"]), output) == output / "pairs" / "far"
    return output


def test_a_built_pair_has_all_its_files_and_can_be_loaded(built):
    assert sorted(p.name for p in (built / "models").iterdir()) == ["student-far", "student-skill", "teacher-robust"]
    entry = json.loads((built / "pairs" / "far" / "pair.json").read_text())
    assert entry["summary"] == PAIR_RECIPES["far"].summary
    assert entry["recipe"] == json.loads(json.dumps(small(PAIR_RECIPES["far"]).as_dict()))
    assert entry["made_by"]["versions"]["torch"]
    pair = load_pair(built / entry["student"], built / entry["teacher"])
    assert pair.student.config.model_type == "llama" and pair.teacher.config.model_type == "qwen3"
    assert pair.vocabulary_size == 2048 and len(pair.tokenizer) == 2048
    splits = load_prompts(built / entry["prompts"])
    assert {name: len(rows) for name, rows in splits.items()} == building.PROMPT_COUNTS
    for model in (pair.student, pair.teacher):
        assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_a_second_pair_takes_the_models_that_are_there_and_the_first_stage_of_its_student(built, tmp_path):
    both = Path(shutil.copytree(built, tmp_path / "both"))
    before = when_written(both)
    build_pair("mid", small(PAIR_RECIPES["mid"]), both)
    after = when_written(both)
    shared = [name for name in before if name.startswith(("models/", "prompts/"))]
    assert {name: after[name] for name in shared} == {name: before[name] for name in shared}
    new = {"/".join(Path(name).parts[:2]) for name in after.keys() - before.keys()}
    assert new == {"models/student-mid", "pairs/mid"}
    # What is shared is what would have been built: the same student comes out of an empty folder.
    build_pair("mid", small(PAIR_RECIPES["mid"]), tmp_path / "alone")
    assert files_in(tmp_path / "alone" / "models" / "student-mid") == files_in(both / "models" / "student-mid")
    weights = [load_file(both / "models" / name / "model.safetensors") for name in ("student-skill", "student-mid")]
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_the_same_seed_gives_the_same_pair_bit_for_bit_and_another_seed_another(built, tmp_path):
    build_pair("far", small(PAIR_RECIPES["far"]), tmp_path / "again")
    for name in ("models/student-skill", "models/student-far", "models/teacher-robust", "prompts"):
        assert files_in(tmp_path / "again" / name) == files_in(built / name)
    recipe = small(PAIR_RECIPES["far"], training=replace(FEW_STEPS, seed=1))
    student = replace(recipe.student, skill=replace(FEW_STEPS, seed=1))
    build_pair("far", replace(recipe, student=student), tmp_path / "other")
    for name in ("student-far", "teacher-robust"):
        files = [folder / "models" / name / "model.safetensors" for folder in (built, tmp_path / "other")]
        assert files[0].read_bytes() != files[1].read_bytes()


def test_the_second_stage_pulls_the_opening_towards_what_the_recipe_wants(built, tokenizer):
    recipe = replace(small(PAIR_RECIPES["far"]).student, opening=replace(FEW_STEPS, steps=40, learning_rate=0.01))
    think = tokenizer.convert_tokens_to_ids("<think>")
    prompt = torch.tensor([tokenizer.encode("47+85+36=")])
    found = []
    for wanted in (-3.0, -15.0):
        student = load_model(built / "models" / "student-skill", torch.float32, "cpu")
        set_student_opening(student, replace(recipe, opening_logprob=wanted), tokenizer)
        assert not student.training
        found.append(float(student(prompt).logits[0, -1].log_softmax(-1)[think].detach()))
    assert found[0] == pytest.approx(-3, abs=1.5) and found[1] < -10


def test_a_longer_task_brings_models_prompts_and_errors_of_its_own(built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    long = longer_task(small(PAIR_RECIPES["far"]))
    folder = build_pair("far-long", long, tmp_path)
    places = json.loads((folder / "pair.json").read_text())
    assert {places[x].split("/")[-1] for x in ("student", "teacher", "prompts")} == {
        "student-far-4x6", "teacher-robust-4x6", "addition-4x6",
    }  # fmt: skip
    assert (tmp_path / "models" / "student-skill-4x6").is_dir()
    prompt, answer = (load_prompts(tmp_path / places["prompts"])["test"][0][x] for x in ("prompt", "answer"))
    assert [len(x) for x in prompt.rstrip("=").split("+")] == [6] * 4
    assert int(answer) == sum(map(int, prompt.rstrip("=").split("+")))
    assert long.student.answer_noise == 120_000  # as large beside sums of millions as 12 beside hundreds
    pair = load_pair(tmp_path / places["student"], tmp_path / places["teacher"])
    longest = len(pair.tokenizer.encode(worked_text((999_999,) * 4)))
    assert longest > 150 and response_limit(long.student.task, pair) > 1.3 * longest
    assert response_limit(PAIR_RECIPES["far"].student.task, pair) == 80


def test_the_larger_pair_has_the_weights_and_the_responses_that_its_recipe_says(tokenizer):
    recipe = UNSHIPPED_RECIPES["far-larger"]
    vocabulary, width, inner = 2048, 512, 1536  # by hand: attention has 4 matrices, the rest of a layer 3, and 2 norms
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    assert number_of_weights(recipe.student) == vocabulary * width + 3 * layer + width == 11_275_776
    assert number_of_weights(recipe.teacher) == vocabulary * width + 4 * (layer + 2 * 64) + width  # norms of a head
    assert 10e6 < number_of_weights(recipe.student) < number_of_weights(recipe.teacher) < 30e6
    longest = [len(tokenizer.encode(worked_text((10**r.student.task.digits - 1,) * r.student.task.operands)))
               for r in (PAIR_RECIPES["far"], recipe)]  # fmt: skip
    assert longest == [49, 101]
    assert recipe.student.opening_logprob == PAIR_RECIPES["far"].student.opening_logprob


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_weights_are_counted_as_the_shipped_models_have_them(name):
    recipe = PAIR_RECIPES["far"]
    stored = load_file(DATA / "models" / getattr(recipe, f"{name}_name") / "model.safetensors")
    assert number_of_weights(getattr(recipe, name)) == sum(weight.numel() for weight in stored.values())


def test_short_texts_go_apart_where_that_saves_and_give_the_same_loss(tokenizer, monkeypatch):
    shipped, wide = PAIR_RECIPES["far"], UNSHIPPED_RECIPES["far-larger"]
    source = TextSource(tokenizer, shipped.student.task, np.random.default_rng(0))
    # Whether they go apart changes the rounding: the shipped weights come from batches that never do.
    assert source.teacher_batch(shipped.teacher, 512).tokens.shape[1] < pretraining.LONG_TEXT
    batch = TextSource(tokenizer, wide.student.task, np.random.default_rng(0)).student_batch(wide.student, 8)
    assert batch.tokens.shape[1] >= pretraining.LONG_TEXT
    model = pretraining.untrained_student(small(wide).student, tokenizer)
    widths = []
    model.base_model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape))
    apart = pretraining._loss(model, batch, None)
    assert [rows for rows, _ in widths] == [4, 4] and widths[0][1] < 40
    monkeypatch.setattr(pretraining, "LONG_TEXT", 10_000)
    assert torch.allclose(apart, pretraining._loss(model, batch, None), atol=1e-5) and widths[2][0] == 8


def test_a_batch_goes_to_a_device_as_a_whole():
    batch = TextBatch(torch.ones(2, 3), torch.ones(2, 3).bool(), torch.ones(2), torch.ones(2, 5).bool()).to("meta")
    assert {item.device.type for item in vars(batch).values()} == {"meta"}


def test_a_task_with_too_few_sums_is_refused_before_anything_is_trained(tmp_path):
    recipe = small(PAIR_RECIPES["far"])
    task = replace(recipe.student.task, operands=2)
    with pytest.raises(InputError, match="2 operands"):
        build_pair("far", replace(recipe, student=replace(recipe.student, task=task)), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ── A teacher that learns until it is reliable ───────────────────────────────────────────────────


def test_a_teacher_that_is_reliable_enough_is_left_as_it_is(tokenizer):
    recipe = small(PAIR_RECIPES["far"], foreign_share=0.6, until_reliability=0.0).teacher
    model = build_teacher(recipe, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert acquaint_teacher(model, recipe, tokenizer) is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not model.training


def test_a_teacher_that_never_gets_reliable_is_refused_with_what_was_measured(tokenizer):
    recipe = small(PAIR_RECIPES["far"], foreign_share=0.6, until_reliability=0.9).teacher
    model = build_teacher(recipe, tokenizer)
    with pytest.raises(InputError, match=r"After 3 steps .* 0\.00 .* not 0\.9\."):
        acquaint_teacher(model, recipe, tokenizer)


def test_teachers_of_any_reliability_start_from_the_fragile_one(tmp_path):
    halfway = small(dialled(PAIR_RECIPES["far"], reliability=0.5), until_reliability=0.0)  # reached at once
    build_pair("half", halfway, tmp_path)
    before = when_written(tmp_path / "models" / "teacher-fragile")
    build_pair("fragile", small(PAIR_RECIPES["far-fragile"]), tmp_path)
    assert when_written(tmp_path / "models" / "teacher-fragile") == before
    # The second stage ended before its first step, so both are one model; and it is the fragile pair's own.
    build_pair("fragile", small(PAIR_RECIPES["far-fragile"]), tmp_path / "alone")
    fragile = files_in(tmp_path / "alone" / "models" / "teacher-fragile")
    assert files_in(tmp_path / "models" / "teacher-fragile") == fragile
    assert files_in(tmp_path / "models" / "teacher-reliability0.5") | {"recipe.json": fragile["recipe.json"]} == fragile


def test_a_teacher_that_never_gets_reliable_is_not_saved(tmp_path):
    never = small(dialled(PAIR_RECIPES["far"], reliability=0.5))
    with pytest.raises(InputError, match="After 3 steps"):
        build_pair("half", never, tmp_path)
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"student-far", "student-skill", "teacher-fragile"}
    assert not (tmp_path / "pairs").exists()


# ── Interrupted ──────────────────────────────────────────────────────────────────────────────────


def interrupt_call(patch, kind: type, method: str, number: int) -> None:
    """Ctrl-C at the end of the call with that number of a method, counted from 0."""
    original, calls = getattr(kind, method), itertools.count()

    def interrupted(*arguments, **options):
        result = original(*arguments, **options)
        if next(calls) == number:
            raise KeyboardInterrupt
        return result

    patch.setattr(kind, method, interrupted)


ORDER = ["student-skill", "student-far", "teacher-robust"]


@pytest.mark.parametrize(
    "kind, method, number, whole",
    [
        *((torch.optim.AdamW, "step", step, step // FEW_STEPS.steps) for step in range(3 * FEW_STEPS.steps)),
        *((PreTrainedTokenizerFast, "save_pretrained", model, model) for model in range(3)),  # after the weights
    ],
)
def test_an_interrupted_build_leaves_whole_models_only_and_goes_on_to_the_same_end(
    built, tmp_path, monkeypatch, kind, method, number, whole
):
    shutil.copytree(built / "prompts", tmp_path / "prompts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_call(patch, kind, method, number)
        build_pair("far", small(PAIR_RECIPES["far"]), tmp_path)
    models = tmp_path / "models"
    assert {folder.name for folder in models.glob("*")} == set(ORDER[:whole])  # the hidden ones, too
    assert all(files_in(models / name) == files_in(built / "models" / name) for name in ORDER[:whole])
    assert not (tmp_path / "pairs").exists()
    build_pair("far", small(PAIR_RECIPES["far"]), tmp_path)
    assert files_in(models) == files_in(built / "models")


def test_what_a_killed_build_was_writing_is_swept_away(built, tmp_path):
    shutil.copytree(built / "prompts", tmp_path / "prompts")
    half_written = tmp_path / "models" / ".student-far.writing"
    half_written.mkdir(parents=True)
    (half_written / "junk").write_text("not a model")
    build_pair("far", small(PAIR_RECIPES["far"]), tmp_path)
    assert files_in(tmp_path / "models") == files_in(built / "models")


# ── As a command ─────────────────────────────────────────────────────────────────────────────────


def test_the_command_builds_the_pair_and_measures_it(command, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.PAIR_RECIPES, "far", small(PAIR_RECIPES["far"]))
    dials = ["--opening-logprob", -4, "--rename", "nearer"]
    status, printed, _ = command("pairs", "build", "far", "--output", tmp_path, *dials)
    assert status == 0
    folder = tmp_path / "pairs" / "nearer"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "card.json", "pair.json"]
    entry, card = (json.loads((folder / name).read_text()) for name in ("pair.json", "card.json"))
    assert entry["recipe"]["student"]["opening_logprob"] == -4 and "student-opening-4-margin3" in entry["summary"]
    assert card["pair"] == "nearer" and card["prompts"] == 128
    assert (folder / "README.md").read_text().startswith("# Pair: nearer\n")
    assert (folder / "README.md").read_text().strip() in printed
    assert sorted(p.name for p in (tmp_path / "pairs").iterdir()) == ["nearer"]


def test_the_command_builds_the_larger_pair_on_a_device_by_name(command, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.UNSHIPPED_RECIPES, "far-larger", small(UNSHIPPED_RECIPES["far-larger"]))
    status, printed, _ = command("pairs", "build", "far-larger", "--device", "cpu", "--output", tmp_path)
    assert status == 0 and "# Pair: far-larger\n" in printed
    entry, card = (json.loads((tmp_path / "pairs" / "far-larger" / name).read_text()) for name in
                   ("pair.json", "card.json"))  # fmt: skip
    assert (
        entry["student"] == "models/student-far-larger-3x4" and entry["teacher"] == "models/teacher-robust-larger-3x4"
    )
    assert entry["made_by"]["device"] == card["made_by"]["device"] == "CPU"
    lengths = {len(row["prompt"]) for row in load_prompts(tmp_path / entry["prompts"])["test"]}
    assert lengths == {len("1234+1234+1234=")}


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_built(command, tmp_path, name):
    status, _, error = command("pairs", "build", "far", "--device", name, "--output", tmp_path / "out")
    assert status == 2 and f"There is no device '{name}' here" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dials_of_a_pair_that_is_not_shipped_are_refused(command, tmp_path):
    options = ["--opening-logprob=-9", "--rename=x", "--output", tmp_path / "out"]
    status, _, error = command("pairs", "build", "far-larger", *options)
    assert status == 2 and "Dials are for the shipped pairs near, mid, far, far-fragile" in error
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_recipe_under_the_same_name_is_refused(built, tmp_path):
    copied = tmp_path / "pairs"
    shutil.copytree(built, copied)
    recipe = small(PAIR_RECIPES["far"])
    other = replace(recipe, student_name="student-other", student=replace(recipe.student, answer_noise=1.0))
    with pytest.raises(InputError, match="student-skill was built from another recipe"):
        build_pair("other", other, copied)
    assert not (copied / "models" / "student-other").exists()
    build_pair("again", recipe, copied)  # the same recipe is welcome


def test_the_shipped_models_bring_their_recipes():
    for recipe in PAIR_RECIPES.values():
        for name, part in ((recipe.student_name, recipe.student), (recipe.teacher_name, recipe.teacher)):
            stored = json.loads((DATA / "models" / name / "recipe.json").read_text())
            assert stored == json.loads(json.dumps(asdict(part)))
