"""Presets bring all that a run needs, and fit the cards that they are for."""

from pathlib import Path

import pytest
from published_models import QWEN

from tgpo_lab.cli.train import parse_training
from tgpo_lab.config import PRESETS, TrainConfig
from tgpo_lab.doctor.diagnose import USUAL_PROMPT
from tgpo_lab.doctor.memory_estimate import estimate_memory, machine_bytes
from tgpo_lab.doctor.model_shape import shape_of
from tgpo_lab.errors import InputError
from tgpo_lab.methods import make_method, method_entries
from tgpo_lab.models.positions import set_positions
from tgpo_lab.tasks.prompt_format import PLAIN
from tgpo_lab.tasks.rewards import reward_function

LARGE = sorted(set(PRESETS) - {"tiny"})
PROMPT = 512
# As the presets' comments say: eight processes under FSDP for the paper's, one for the others.
CARDS = {"gpu-24gb": (24e9, {}), "gpu-80gb": (80e9, {}), "paper": (80e9, {"processes": 8, "sharded": True})}


def estimated(config: TrainConfig, card: float = 80e9, **launch: object):
    shapes = [shape_of(QWEN[name]) for name in (config.student, config.teacher)]
    return estimate_memory(config, *shapes, card=int(card), **launch)


def test_the_published_positions_are_what_they_are_known_to_be():
    known = {name: config.max_position_embeddings for name, config in QWEN.items()}
    assert known == {
        "Qwen/Qwen2.5-Math-1.5B": 4096,
        "Qwen/Qwen2.5-Math-7B": 4096,
        "Qwen/Qwen3-4B": 40960,
        "Qwen/Qwen3-8B": 40960,
        "Qwen/Qwen3-30B-A3B": 40960,
    }


@pytest.mark.parametrize("preset", LARGE)
def test_the_longest_response_fits_the_positions_of_both(preset):
    config = TrainConfig.preset(preset)
    student = type(QWEN[config.student])(**QWEN[config.student].to_dict())
    if any(config.position_options.values()):
        set_positions(student, *config.position_options.values(), config.student)
    assert config.max_new_tokens + PROMPT <= student.max_position_embeddings
    assert config.max_new_tokens + PROMPT <= QWEN[config.teacher].max_position_embeddings


def test_the_papers_student_would_be_too_short_as_published():
    config = TrainConfig.preset("paper")
    assert config.max_new_tokens > QWEN[config.student].max_position_embeddings
    student = type(QWEN[config.student])(**QWEN[config.student].to_dict())
    set_positions(student, *config.position_options.values(), config.student)
    assert (student.max_position_embeddings, student.rope_parameters["rope_theta"]) == (16384, 40000.0)


@pytest.mark.parametrize("preset", LARGE)
def test_all_that_training_needs_is_there(preset):
    config = TrainConfig.preset(preset)
    assert config.teacher is not None and config.dataset is not None
    assert all(config.prompt_options[name] for name in ("prompt_column", "answer_column", "train_split"))
    assert config.prompt_format != PLAIN and "\\boxed{}" in config.prompt_template  # the form that the answer takes
    # Numbers are looked for, with or without a box around them: both data sets have them for answers.
    assert reward_function(config.reward)("So it is \\boxed{34}.", "34") == 1.0
    assert reward_function(config.reward)("So it is \\boxed{33}.", "34") == 0.0


@pytest.mark.parametrize("method", [entry.name for entry in method_entries()])
def test_the_papers_setting_fits_with_every_method(method):
    """Those that let the teacher write do so a group at a time."""
    config = TrainConfig.preset("paper", method)
    assert config.method == make_method(method) and estimated(config, processes=8, sharded=True).total < 0.95 * 80e9


@pytest.mark.parametrize("preset", LARGE)
def test_presets_fit_their_cards(preset):
    config = TrainConfig.preset(preset)
    card, launch = CARDS[preset]
    assert estimated(config, card, **launch).total <= 0.95 * card
    # With all responses at once they would be nearly full, or need more than there is.
    at_once = config.with_changes(sampling_rows=0, engine="own", vllm_sleep=False)
    assert estimated(at_once, card, **launch).total > 0.85 * card


@pytest.mark.parametrize("launch", [{}, {"processes": 4, "sharded": True}, {"processes": 8}])
def test_the_papers_setting_needs_eight_cards_and_fsdp(launch):
    assert estimated(TrainConfig.preset("paper"), **launch).total > 80e9


def test_the_papers_setting_can_do_without_vllm_in_small_parts():
    config = TrainConfig.preset("paper", engine="own", vllm_sleep=False)
    assert estimated(config, processes=8, sharded=True).total < 80e9
    assert estimated(config.with_changes(sampling_rows=24), processes=8, sharded=True).total > 80e9


def test_the_papers_machine_needs_what_the_readme_says():
    config = TrainConfig.preset("paper")
    shapes = [shape_of(QWEN[name]) for name in (config.student, config.teacher)]
    parts = machine_bytes(config, *shapes, processes=8, sharded=True)
    assert [round(size / 1e9, 1) for size in parts.values()] == [488.5, 91.4]


def test_the_papers_teacher_can_be_put_behind_a_server_instead():
    with pytest.raises(InputError, match="teacher_offload is for a teacher in this process"):
        TrainConfig.preset("paper", teacher_server="http://host:8000/v1")
    config = TrainConfig.preset("paper", teacher_server="http://host:8000/v1", teacher_offload=False)
    assert "teacher" not in estimated(config, processes=8, sharded=True).parts


def test_what_the_readme_starts_under_fsdp_fits_eight_cards():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line.split("#")[0].split() for line in text.splitlines() if line.startswith("accelerate launch --use_fsdp")
    ]
    assert len(lines) == 2
    for words in lines:
        assert words[words.index("--num_processes") + 1] == "8"
        _, config = parse_training(words[words.index("train") + 1 :])
        assert config.student == "Qwen/Qwen2.5-Math-7B" and not config.lora_rank
        assert estimated(config, processes=8, sharded=True).total <= 0.95 * 80e9


# ── The sums in the comments, by hand ────────────────────────────────────────────────────────────

# Published numbers of weights, in 10⁹; inputs and outputs of the linear layers of a decoder layer.
ADAPTED_1B = 28 * 32 * ((1536 + 1536) * 2 + (1536 + 256) * 2 + (1536 + 8960) * 3)
ADAPTED_7B = 28 * 64 * ((3584 + 3584) * 2 + (3584 + 512) * 2 + (3584 + 18944) * 3)


def billions(preset: str) -> dict[str, float]:
    card, launch = CARDS[preset]
    estimate = estimated(TrainConfig.preset(preset), card, **launch)
    return {name: size / 1e9 for name, size in estimate.parts.items()} | {"total": estimate.total / 1e9}


def test_the_sum_for_24_gb():
    assert USUAL_PROMPT == PROMPT
    # 4,096 tokens: the stream between 28 layers in bfloat16, one layer's own two, and what one layer keeps:
    # 2·1536 + 3·1536 + 3·256 + 4·8960 numbers, and its two norms 1536 each in float32. Logits of 2²⁷ / 151,936 = 883
    # positions, five times.
    update = 4096 * 2 * (28 * 1536 + 2 * 1536 + 5 * 1536 + 3 * 256 + 4 * 8960) + 5 * 883 * 151936 * 4
    update += 4096 * 4 * 2 * 1536
    parts = {
        "student": 1.544 * 2, "adapters": ADAPTED_1B * 4e-9, "gradients": ADAPTED_1B * 4e-9,
        "AdamW": ADAPTED_1B * 8e-9, "teacher": 4.022 * 2, "update": update / 1e9, "context": 2**30 / 1e9,
    }  # fmt: skip
    parts["fragments"] = sum(parts.values()) / 10
    assert billions("gpu-24gb") == pytest.approx({**parts, "total": sum(parts.values())}, rel=1e-3)
    assert round(sum(parts.values()), 1) == 17.9


def test_the_sum_for_80_gb():
    # 128 rows of 2,048 tokens: 2 · 4 heads · 128 numbers in bfloat16 in 28 layers and one more; logits three times.
    sampling = 128 * (2048 * 2 * 4 * 128 * 2 * 29 + 3 * 152064 * 4)
    parts = {
        "student": 7.616 * 2, "adapters": ADAPTED_7B * 4e-9, "gradients": ADAPTED_7B * 4e-9,
        "AdamW": ADAPTED_7B * 8e-9, "teacher": 8.191 * 2, "sampling": sampling / 1e9, "context": 2**30 / 1e9,
    }  # fmt: skip
    parts["fragments"] = sum(parts.values()) / 10
    assert billions("gpu-80gb") == pytest.approx({**parts, "total": sum(parts.values())}, rel=1e-3)
    assert round(sum(parts.values()), 1) == 56.2


def test_the_sum_for_the_papers_eight_cards():
    # 16,384 tokens: the stream between 28 layers in float32, one layer's own two, and what one layer keeps, as above;
    # logits; what they add to the gradient of the output layer, in bfloat16 and converted.
    rows, width = 152064, 3584
    update = 16384 * (4 * (28 + 2) * width + 2 * (5 * width + 3 * 512 + 4 * 18944) + 4 * 2 * width)
    update += 5 * 883 * rows * 4 + rows * width * 6
    # Of embeddings and output layer weights and gradients, of a layer those and the next one's weights.
    layer = 2 * width * width + 2 * width * 512 + 3 * width * 18944
    parts = {
        "student": 7.616 * 4 / 8, "gradients": 7.616 * 4 / 8, "AdamW": 7.616 * 8 / 8,
        "teacher": (151936 * 2048 + 128 * 3 * 2048 * 768) * 2e-9,  # output layer, and a layer's experts
        "update": update / 1e9, "copy in bfloat16": 7.616 * 2,
        "gathered weights": (8 * 2 * rows * width + 12 * layer) / 1e9, "context": 2**30 / 1e9,
    }  # fmt: skip
    parts["fragments"] = sum(parts.values()) / 10
    assert billions("paper") == pytest.approx({**parts, "total": sum(parts.values())}, rel=1e-3)
    assert round(sum(parts.values()), 1) == 67.6
    # While vLLM samples, nothing of the update is there, but a gathered matrix.
    sampling = sum(parts[name] for name in ("student", "gradients", "AdamW", "teacher", "context"))
    assert round(1.1 * (sampling + rows * width * 4e-9) + 0.55 * 80, 1) == 66.3


def test_options_of_a_presets_dataset_do_not_apply_to_another():
    given = {"dataset": "mine", "student": "a", "teacher": "b"}
    config = TrainConfig.preset("gpu-24gb", **given)
    assert config.prompt_options == TrainConfig().prompt_options
    assert (config.reward, config.prompt_template) == ("last_number", PRESETS["gpu-24gb"]["prompt_template"])
    assert TrainConfig.preset("gpu-24gb", **given, answer_after="=").answer_after == "="
    same = TrainConfig.preset("gpu-24gb", dataset="openai/gsm8k")
    assert same == TrainConfig.preset("gpu-24gb") and same.answer_after == "####"


@pytest.mark.parametrize("words", [["--dataset", "mine"], ["--dataset=mine"]])
def test_nor_on_the_command_line(words):
    _, config = parse_training(["--preset", "gpu-80gb", *words, "--answer-column", "solution"])
    assert config.dataset == "mine" and config.answer_column == "solution"
    assert (config.dataset_config, config.prompt_column, config.answer_after) == (None, "prompt", None)
    _, same = parse_training(["--preset", "gpu-80gb", words[0].replace("mine", "openai/gsm8k"),
                              *[w.replace("mine", "openai/gsm8k") for w in words[1:]]])  # fmt: skip
    assert (same.dataset_config, same.prompt_column, same.answer_after) == ("main", "question", "####")


def test_the_papers_preset_goes_on_with_the_other_engine_alone():
    for config in (TrainConfig.preset("paper", engine="own"),
                   parse_training(["--preset", "paper", "--engine", "own"])[1]):  # fmt: skip
        assert config.engine == "own" and not config.vllm_sleep
    assert TrainConfig.preset("paper", engine="vllm").vllm_sleep
    with pytest.raises(InputError, match="Set engine to vllm, or leave vllm_sleep out"):
        parse_training(["--preset", "paper", "--engine", "own", "--vllm-sleep"])
