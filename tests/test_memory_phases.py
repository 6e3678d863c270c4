"""The estimate's phases, engines and processes: each value worked out by hand for a made-up model."""

from dataclasses import replace

import pytest

from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.memory_estimate import estimate_memory
from tgpo_lab.doctor.model_shape import Shape
from tgpo_lab.methods import make_method

# One token's keys and values are 100 numbers each in one layer; a decoder layer has (10⁹ − 3·10⁸) / 10 = 7·10⁷ weights.
# With 2¹⁷ tokens 1,024 positions are projected at once on a GPU, which are 2²⁹ bytes of logits.
MODEL = Shape(
    weights=10**9, layers=10, hidden=1000, kept=10_000, keys_and_values=200, vocabulary=2**17, linear=10**6,
    outside=3 * 10**8, largest=2 * 10**8,
)  # fmt: skip
TEACHER = Shape(
    weights=4 * 10**9, layers=20, hidden=2000, kept=20_000, keys_and_values=400, vocabulary=2**17, linear=10**6,
    outside=6 * 10**8, largest=5 * 10**8,
)  # fmt: skip
LOGITS = 3 * 2**17 * 4  # of one row, three times in float32
STEP = {"prompts_per_step": 64, "group_size": 8, "max_new_tokens": 1488}  # 2,000 tokens with a prompt of 512
LONG = {"max_new_tokens": 9488, "gradient_checkpointing": True}  # 10,000


def estimate(device="cuda", *, processes=1, sharded=False, card=100 * 10**9, **changes) -> dict[str, int]:
    config = TrainConfig(**{**STEP, **changes})
    return estimate_memory(config, MODEL, TEACHER, device=device, processes=processes, sharded=sharded, card=card).parts


def test_all_weights_in_float32():
    parts = estimate()
    assert parts == {
        "student": 4 * 10**9,
        "gradients": 4 * 10**9,
        "AdamW": 8 * 10**9,
        "teacher": 16 * 10**9,
        "sampling": 512 * (2000 * 200 * 4 * 11 + LOGITS),  # ten layers, and one while rows are moved
        "context": 2**30,
        "fragments": parts["fragments"],
    }
    rest = sum(size for name, size in parts.items() if name != "fragments")
    assert parts["fragments"] == pytest.approx(rest / 10, abs=1)


def test_in_bfloat16_keys_and_values_take_two_bytes_beside_a_copy_of_the_weights():
    parts = estimate(precision="bfloat16", gradient_checkpointing=True, micro_batch_tokens=1)
    assert parts["sampling"] == 512 * (2000 * 200 * 2 * 11 + LOGITS)
    assert parts["copy in bfloat16"] == 2 * 10**9 and parts["teacher"] == 8 * 10**9
    # Frozen weights are bfloat16 already, and nothing is converted. T = 8·10⁶.
    parts = estimate(precision="bfloat16", lora_rank=8)
    assert parts["sampling"] == 512 * (2000 * 200 * 2 * 11 + LOGITS) and "copy in bfloat16" not in parts
    assert (parts["adapters"], parts["gradients"], parts["AdamW"]) == (32_000_000, 32_000_000, 64_000_000)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({}, 512),
        ({"sampling_rows": 256}, 256),
        ({"sampling_rows": 300}, 300 // 8 * 8),  # whole groups
        ({"sampling_rows": 131, "group_size": 64}, 128),  # two groups, and as many held-out prompts
        ({"prompts_per_step": 1}, 128),  # held-out prompts are the most
        ({"prompts_per_step": 1, "evaluation_prompts": 100}, 100),
        ({"prompts_per_step": 1, "evaluation_prompts": 1000}, 128),  # 128 at once
    ],
)
def test_rows_are_those_written_at_once(changes, rows):
    # Float32, so that keys and values take the most among the phases even for few rows.
    changes = {"max_new_tokens": 3488, "gradient_checkpointing": True, "micro_batch_tokens": 1, **changes}
    parts = estimate(device="cpu", **changes)
    assert parts["sampling"] == rows * (4000 * 200 * 4 * 11 + LOGITS)


def test_a_bound_of_one_group_leaves_the_update_the_largest():
    parts = estimate(sampling_rows=8, gradient_checkpointing=True, device="cpu")
    # 4,096 tokens: the stream between all layers, and one layer's own; on a CPU 256 positions of logits, and what they
    # add to the gradient of 2¹⁷ rows of 1,000.
    own = 4096 * (1000 * 4 * 10 + 1000 * 2 * 4 + 10_000 * 4) + 5 * 256 * 2**17 * 4
    assert parts["update"] == own + 2**17 * 1000 * 4
    assert "sampling" not in parts


def test_the_teachers_own_responses_are_a_phase_and_bounded_alike():
    row = 2000 * 400 * 4 * 21 + LOGITS
    sft = make_method("sft")
    assert estimate(method=sft)["teacher's responses"] == 512 * row
    assert estimate(method=sft, sampling_rows=200)["teacher's responses"] == 200 * row
    assert estimate(method=sft, processes=4)["teacher's responses"] == 128 * row
    # Kept on disk, every process writes what is missing.
    assert estimate(method=sft, processes=4, teacher_cache="kept")["teacher's responses"] == 512 * row
    assert "teacher's responses" not in estimate(method=sft, teacher_device="cuda:1")
    half = estimate(method=sft, precision="bfloat16")
    assert half["teacher's responses"] == 512 * (2000 * 400 * 2 * 21 + LOGITS)
    assert half["copy in bfloat16"] == 2 * 10**9  # the context in which the student has sampled is still open


def test_compiled_decoding_keeps_its_buffers_beside_the_largest_phase():
    parts = estimate(compile_decoding=True, micro_batch_tokens=2**17, gradient_checkpointing=True)
    # 2,000 tokens become 2,048. They stay there, and the update comes on top.
    assert parts["decoding buffers"] == 512 * 2048 * 200 * 4 * 10
    own = 2**17 * (1000 * 4 * 10 + 1000 * 2 * 4 + 10_000 * 4) + 5 * 2**29
    assert parts["update"] == own + 2**17 * 1000 * 4
    parts = estimate(compile_decoding=True, gradient_checkpointing=True, micro_batch_tokens=1, lora_rank=1)
    assert parts["sampling"] == 512 * (512 * 200 * 4 * 11 + LOGITS)  # of the prompts, before the buffers take them over


def test_compiled_decoding_keeps_converted_weights_of_its_own():
    options = {"compile_decoding": True, "precision": "bfloat16", "gradient_checkpointing": True}
    # Seven of ten parts of the weights are in the layers, and 2¹⁷ rows of 1,000 are the output layer.
    copies = 2 * (7 * 10**8 + 2**17 * 1000)
    parts = estimate(**options, micro_batch_tokens=1, prompts_per_step=1024)
    assert "sampling" in parts and "copy in bfloat16" not in parts  # autocast finds nothing to convert
    assert parts["decoding buffers"] == 8192 * 2048 * 200 * 2 * 10 + copies
    parts = estimate(**options, micro_batch_tokens=2**19)
    assert "update" in parts and parts["copy in bfloat16"] == 2 * 10**9  # autocast's, beside the other
    assert parts["decoding buffers"] == 512 * 2048 * 200 * 2 * 10 + copies
    adapted = estimate(**options, lora_rank=8)
    assert adapted["decoding buffers"] == 512 * 2048 * 200 * 2 * 10


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────


def test_vllm_takes_its_share_all_the_time_or_while_it_samples():
    vllm = {"engine": "vllm", "vllm_memory_share": 0.25, "precision": "bfloat16", "gradient_checkpointing": True}
    # The update: 4,096 tokens · 68,000 bytes, five times 2²⁹ and 2¹⁷ · 6,000 of a gradient, 3.7·10⁹, and the converted
    # weights.
    update = 4096 * (1000 * 4 * 10 + 1000 * 2 * 4 + 10_000 * 2) + 5 * 2**29 + 2**17 * 1000 * 6
    awake = estimate(**vllm)
    assert awake["vLLM"] == 25 * 10**9 and "sampling" not in awake
    assert awake["update"] == update and awake["copy in bfloat16"] == 2 * 10**9
    asleep = estimate(**vllm, vllm_sleep=True)
    assert asleep["vLLM"] == 25 * 10**9 and "update" not in asleep and "copy in bfloat16" not in asleep
    assert sum(awake.values()) - sum(asleep.values()) == pytest.approx((update + 2 * 10**9) * 1.1, abs=2)
    # Of a small card the share is less than the update: then that is the largest phase, and vLLM is not counted.
    small = estimate(**vllm, vllm_sleep=True, card=10 * 10**9)
    assert small["update"] == update and "vLLM" not in small
    # Its memory is of one piece: no tenth for fragments.
    rest = sum(size for name, size in asleep.items() if name not in ("vLLM", "fragments"))
    assert asleep["fragments"] == pytest.approx(rest / 10, abs=1)


def test_the_teacher_still_writes_in_this_process_where_vllm_samples():
    vllm = {"engine": "vllm", "vllm_sleep": True, "vllm_memory_share": 0.1}
    parts = estimate(**vllm, method=make_method("sft"), precision="bfloat16")
    assert parts["teacher's responses"] == 512 * (2000 * 400 * 2 * 21 + LOGITS)
    assert "copy in bfloat16" not in parts  # the student itself has computed nothing


# ── Several processes ────────────────────────────────────────────────────────────────────────────


def test_processes_share_rows_and_without_fsdp_nothing_else():
    one, four = estimate(**LONG), estimate(**LONG, processes=4)
    assert four["sampling"] * 4 == one["sampling"]
    assert all(four[name] == one[name] for name in ("student", "gradients", "AdamW", "teacher"))
    # 64 prompts over 10: seven for some.
    assert estimate(**LONG, processes=10)["sampling"] == 7 * 8 * (10_000 * 200 * 4 * 11 + LOGITS)


def test_fsdp_shares_the_student_out_and_gathers_it_to_sample():
    parts = estimate(**LONG, processes=4, sharded=True, precision="bfloat16")
    assert (parts["student"], parts["gradients"], parts["AdamW"]) == (10**9, 10**9, 2 * 10**9)
    assert parts["teacher"] == 8 * 10**9  # whole on each
    assert parts["sampling"] == 128 * (10_000 * 400 * 11 + LOGITS)
    assert parts["gathered weights"] == 4 * 10**9 and parts["copy in bfloat16"] == 2 * 10**9


def test_fsdp_keeps_what_is_outside_the_layers_gathered_in_the_update():
    parts = estimate(processes=4, sharded=True, sampling_rows=8, micro_batch_tokens=2**17, gradient_checkpointing=True)
    assert parts["update"] > 10**10
    # 3·10⁸ weights with gradients; a layer's 7·10⁷ with gradients, and the next one's.
    assert parts["gathered weights"] == 3 * 10**8 * 8 + 7 * 10**7 * 12


def test_fsdp_shares_out_only_what_every_process_has_loaded_whole():
    # A hundred layers of 9.9·10⁷ weights. Of 4·10¹⁰ bytes a sixteenth stays; with as much of gradients and twice as
    # much of moments, 10¹⁰. The update gathers 8·10⁸ + 1.2·10⁹ bytes, logits are 2.7·10⁹: less than what was loaded.
    large = replace(MODEL, weights=10**10, layers=100, outside=10**8)
    config = TrainConfig(
        engine="vllm", vllm_sleep=True, vllm_memory_share=0.01, prompts_per_step=16, max_new_tokens=10,
        micro_batch_tokens=1, gradient_checkpointing=True,
    )  # fmt: skip
    parts = estimate_memory(config, large, TEACHER, processes=16, sharded=True).parts
    assert parts == {
        "student": 25 * 10**8,
        "teacher": 16 * 10**9,
        "loading": 375 * 10**8,
        "context": 2**30,
        "fragments": parts["fragments"],
    }
    assert parts["fragments"] == (25 * 10**8 + 16 * 10**9 + 375 * 10**8 + 2**30) // 10
    # Over two, gradients and moments are more than the other half; one process alone loads what it keeps.
    assert "loading" not in estimate_memory(config, large, TEACHER, processes=2, sharded=True).parts
    assert "loading" not in estimate_memory(config, large, TEACHER, processes=16).parts


def test_fsdp_hands_vllm_one_matrix_at_a_time():
    parts = estimate(processes=4, sharded=True, engine="vllm", vllm_sleep=True)
    assert parts["vLLM"] == 30 * 10**9 and parts["gathered weights"] == 2**17 * 1000 * 4


def test_adamw_takes_a_root_of_all_its_second_moments_at_once_on_a_gpu():
    few = {"prompts_per_step": 1, "measured_positions": 1, "evaluation_prompts": 1, "max_new_tokens": 10,
           "gradient_checkpointing": True, "micro_batch_tokens": 1}  # fmt: skip
    assert estimate(**few)["optimizer step"] == 4 * 10**9
    assert "optimizer step" not in estimate(**few, device="cpu")
    assert "optimizer step" not in estimate(**few, lora_rank=1)
    # Under FSDP a fourth of it, and less than the update then.
    assert "optimizer step" not in estimate(**few, processes=4, sharded=True)


# ── A teacher elsewhere ──────────────────────────────────────────────────────────────────────────


def test_an_offloaded_teacher_leaves_its_output_layer_and_its_largest_module():
    assert estimate(teacher_offload=True)["teacher"] == (2**17 * 2000 + 5 * 10**8) * 4
    assert estimate(teacher_offload=True, device="cpu")["teacher"] == 16 * 10**9  # it is where it was
