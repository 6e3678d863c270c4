"""What the doctor advises where memory does not suffice: it helps, the most first, and is not set yet."""

import re

import pytest
from published_models import QWEN

from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.doctor.memory_advice import memory_advice
from tgpo_lab.doctor.memory_estimate import USUAL_PROMPT, MemoryEstimate, estimate_memory
from tgpo_lab.doctor.model_shape import shape_of
from tgpo_lab.methods import make_method

SHAPES = {name: shape_of(QWEN[name]) for name in ("Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen3-4B")}
WHOLE = {"student": "Qwen/Qwen2.5-Math-1.5B", "teacher": "Qwen/Qwen3-4B", "dataset": "some/data"}
SMALL_STEP = {"prompts_per_step": 1, "evaluation_prompts": 1, "micro_batch_tokens": 512, "max_new_tokens": 64,
              "gradient_checkpointing": True}  # fmt: skip
MANY = {"prompts_per_step": 64, "group_size": 16, "max_new_tokens": 2048}
ADAPTED = {"precision": "bfloat16", "lora_rank": 16}
BATCH = ["--prompts-per-step", "--group-size", "--max-new-tokens"]


def advised(device="cuda", processes=1, sharded=False, **changes):
    config = TrainConfig(**{**WHOLE, **changes})

    def estimate(config: TrainConfig, processes: int, sharded: bool) -> MemoryEstimate:
        return estimate_memory(config, *SHAPES.values(), device=device, processes=processes, sharded=sharded)

    advice = memory_advice(
        config, estimate, longest=USUAL_PROMPT + config.max_new_tokens, cuda=device == "cuda", processes=processes,
        sharded=sharded,
    )  # fmt: skip
    return config, advice, estimate(config, processes, sharded)


def options(advice) -> list[str]:
    """Names of the options, without their values."""
    return [a.text.split(" --num_processes")[0] if "accelerate" in a.text else a.text.split(" ")[0] for a in advice]


def as_written(config: TrainConfig, text: str) -> TrainConfig:
    """The run of someone who adds these words to the command line."""
    changes: dict[str, object] = {}
    for name, value in re.findall(r"--([a-z-]+)(?: ([^- ]\S*))?", text):
        field = name.removeprefix("no-").replace("-", "_")
        value = {"": not name.startswith("no-"), "ADDRESS": "http://host:8000/v1"}.get(value, value)
        kind = type(getattr(config, field))
        changes[field] = kind(value) if kind in (int, float) else value
    return config.with_changes(**changes)


SITUATIONS = {
    "sampling": {**MANY, **ADAPTED},
    "sampling, all weights": MANY,
    "bounded already": {**MANY, **ADAPTED, "sampling_rows": 512},
    "update": {"micro_batch_tokens": 2**17, **ADAPTED, "prompts_per_step": 1},
    "moments": {**SMALL_STEP, "teacher_offload": True},
    "moments, four processes": {**SMALL_STEP, "teacher_offload": True, "processes": 4},
    "teacher": {**SMALL_STEP, **ADAPTED},
    "vLLM awake": {**SMALL_STEP, **ADAPTED, "engine": "vllm", "vllm_memory_share": 0.5},
    "buffers": {**MANY, **ADAPTED, "compile_decoding": True},
    "teacher's responses": {**MANY, **ADAPTED, "method": make_method("sft")},
    "held-out prompts": {"prompts_per_step": 1, "max_new_tokens": 8000, **ADAPTED, "gradient_checkpointing": True},
    "on a CPU": {**MANY, "device": "cpu"},
    "sharded": {**MANY, "processes": 8, "sharded": True},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_following_any_of_it_lowers_the_estimate_by_what_it_says(situation):
    changes = SITUATIONS[situation]
    config, advice, before = advised(**changes)
    assert advice, before.parts
    for one in advice:
        device = changes.get("device", "cuda")
        processes, sharded = changes.get("processes", 1), changes.get("sharded", False)
        if "accelerate" in one.text:
            followed, processes, sharded = config, int(one.text.split()[-1]), True
        else:
            followed = as_written(config, one.text)
        after = estimate_memory(followed, *SHAPES.values(), device=device, processes=processes, sharded=sharded)
        assert after.total < before.total, one.text
        assert before.total - after.total == one.saves, one.text
    same = [one.saves for one in advice if not one.another_run]
    assert same == sorted(same, reverse=True)
    assert [one.another_run for one in advice] == sorted(one.another_run for one in advice)


@pytest.mark.parametrize(
    "situation, wanted",
    [
        # Keys and values of 1,024 rows take by far the most.
        ("sampling", ["--sampling-rows", "--engine", *BATCH]),
        ("sampling, all weights", ["--sampling-rows", "--engine", "--precision", *BATCH]),
        ("bounded already", ["--sampling-rows", "--engine"]),
        ("update", ["--gradient-checkpointing", "--micro-batch-tokens"]),
        ("moments", ["--lora-rank", "accelerate launch --use_fsdp --fsdp_version 2"]),
        ("teacher", ["--teacher-device", "--teacher-server", "--teacher-offload"]),
        ("vLLM awake", ["--vllm-sleep", "--vllm-memory-share"]),
        ("buffers", ["--sampling-rows", "--engine", "--no-compile-decoding"]),
        ("teacher's responses", ["--teacher-device", "--sampling-rows"]),
        ("on a CPU", ["--sampling-rows", "--precision"]),
    ],
)
def test_what_is_largest_decides(situation, wanted):
    _, advice, before = advised(**SITUATIONS[situation])
    found = options(advice)
    assert set(wanted) <= set(found), (found, before.parts)
    if situation in ("update", "moments", "teacher", "vLLM awake"):
        assert {name for name in found if name not in BATCH} == set(wanted), before.parts
    if situation in ("sampling", "bounded already", "on a CPU"):
        assert found[0] in ("--sampling-rows", "--engine")


def test_adapters_and_smaller_batches_make_another_run():
    """Of all that is ever advised: other weights are trained, or on fewer or shorter responses."""
    another, same = set(), set()
    for changes in SITUATIONS.values():
        for one in advised(**changes)[1]:
            (another if one.another_run else same).update(options([one]))
    assert another == {"--lora-rank", *BATCH}
    assert not another & same and {"--precision", "--teacher-offload", "--sampling-rows"} <= same


def test_what_is_set_or_cannot_be_is_not_advised():
    _, advice, _ = advised(**SMALL_STEP, **ADAPTED, teacher_offload=True)
    assert not {"--teacher-offload", "--precision", "--lora-rank", "--gradient-checkpointing"} & set(options(advice))
    # A server does not suffice for whole distributions; several processes would all put theirs on the second card.
    _, advice, _ = advised(**SMALL_STEP, **ADAPTED, method=make_method("exact-rkl"), processes=4)
    assert "--teacher-offload" in options(advice)
    assert not {"--teacher-server", "--teacher-device"} & set(options(advice))
    # Adapters are not trained under FSDP, and a sharded run cannot have them.
    assert not [a for a in advice if "accelerate" in a.text]
    _, advice, _ = advised(**SMALL_STEP, processes=8, sharded=True)
    assert "--lora-rank" not in options(advice)
    # Of 20 GB of keys and values, vLLM with its 24 would make more.
    _, advice, before = advised(prompts_per_step=16, group_size=16, max_new_tokens=2048, **ADAPTED)
    assert 19e9 < before.parts["sampling"] < 21e9
    assert "--sampling-rows" in options(advice) and "--engine" not in options(advice)
    # On a CPU nothing can be moved to a card.
    _, advice, _ = advised(device="cpu", **SMALL_STEP, **ADAPTED)
    assert not {"--teacher-offload", "--teacher-device", "--engine"} & set(options(advice))


def test_the_bound_is_as_high_as_it_may_be():
    """Below it another phase needs the most, and a lower bound only takes time."""
    config, advice, _ = advised(**SITUATIONS["sampling"])
    bound = next(a.config.sampling_rows for a in advice if a.text.startswith("--sampling-rows"))
    parts = [estimate_memory(config.with_changes(sampling_rows=b), *SHAPES.values()).parts for b in (bound, 2 * bound)]
    assert "sampling" not in parts[0] and "sampling" in parts[1]


def test_the_doctor_says_it(tiny_config, tmp_path):
    config = tiny_config(tmp_path, prompts_per_step=64, sampling_rows=0, max_new_tokens=100)
    found = diagnose(config, device="cpu", available_memory=10**6)
    (finding,) = [f for f in found.findings if f.subject == "memory"]
    assert finding.level == "refused"
    assert re.search(r"^Any of --\S+.* \(\d+\.\d MB less\)", finding.change)
    assert "Or, for another run, --" in finding.change
    enough = diagnose(config, device="cpu", available_memory=10**12)
    assert not [f.change for f in enough.findings if f.subject == "memory" and f.change]


def test_the_doctor_counts_processes(tiny_config, tmp_path, command, random_pair, monkeypatch):
    config = tiny_config(
        tmp_path, prompts_per_step=512, max_new_tokens=100, evaluation_prompts=4, micro_batch_tokens=10
    )
    one, four, sharded = (
        diagnose(config, prompts=2, card_tokens=4, device="cpu", processes=n, sharded=s).memory.parts
        for n, s in ((1, False), (4, False), (4, True))
    )
    assert one["sampling"] == 4 * four["sampling"] and one["AdamW"] == four["AdamW"] == 4 * sharded["AdamW"]
    monkeypatch.chdir(tmp_path)
    flags = ["--student", random_pair.student, "--teacher", random_pair.teacher, "--dataset", random_pair.prompts,
             "--max-new-tokens=12", "--evaluation-prompts=4", "--prompts-per-step=2"]  # fmt: skip
    status, printed, error = command("doctor", *flags, "--processes", 2, "--sharded")
    assert status in (0, 1) and not error and "on each of 2 devices" in printed
    for more, said in (
        (["--processes", 0], "processes must be 1 or more, but is 0"),
        (["--sharded"], "among several processes, but there is 1"),
        (["--processes", 2, "--sharded", "--lora-rank", 4], "adapters are not trained under FSDP"),
    ):
        status, printed, _ = command("doctor", *flags, *more)
        assert status == 2 and said in printed
    assert "--processes N" in command("doctor", "--help")[1]
