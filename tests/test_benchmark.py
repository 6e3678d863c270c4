"""The benchmark measures the real loop; its operations and bytes are counted by hand here. Times are never asserted."""

import json
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tgpo_lab import benchmark
from tgpo_lab.bandwidth import bandwidth, bytes_of_sampling
from tgpo_lab.benchmark import floor_of_sampling, in_own_process, measure_case, peak_memory, utilisation
from tgpo_lab.benchmark_cases import CASES, ENGINES, Case, require_memory_and_disk
from tgpo_lab.cli import bench
from tgpo_lab.doctor.model_shape import shape_of
from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_without_weights
from tgpo_lab.operations import PHASES, MatrixRates, Product, Work, work_of_step
from tgpo_lab.random_pair import Dimensions, RandomPair, write_random_pair

PAIR = RandomPair(Dimensions(16, 1, 2), Dimensions(32, 1, 2), vocabulary_size=64, prompt_tokens=5)
CASE = Case("test", PAIR, {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6})
# Per layer 8·8 for queries and for the output, 8·4 for keys and for values, three times 8·12: 480 and two norms of 8.
GROUPED = LlamaConfig(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


def tiny_model(layers: int = 1) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2)
    )


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes of their own take seconds to start, and so do large products."""
    monkeypatch.setattr("tgpo_lab.operations.SQUARE", 64)
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *args, **options: function(*args, **options))


# ── Operations and bytes ─────────────────────────────────────────────────────────────────────────


def test_operations_equal_a_count_by_hand():
    """3 prompts of 2 tokens, 2 samples of 3 tokens each: B = 6, P = 2, T = 3, H = 4, V = 10."""
    work = work_of_step(tiny_model(), tiny_model(layers=2), prompts=3, group_size=2, prompt=2, response=3)
    weights = 4 * (4 * 4) + 3 * (4 * 8)  # query, key, value and output; gate, up and down: 160
    output = 6 * 3 * 2 * 4 * 10  # 18 positions, H × V multiply-adds each
    # Contexts of a sequence of 4 read tokens: 1 + 2 + 3 + 4. Scores and weighted sums: 2 · 2 · width each.
    reading = 6 * 4 * 2 * weights + 6 * 4 * 4 * (1 + 2 + 3 + 4)
    # A prompt once: contexts 1 and 2. Then T − 1 = 2 tokens a row: contexts 3 and 4.
    sampling = 3 * 2 * 2 * weights + 3 * 4 * 4 * (1 + 2) + 6 * 2 * 2 * weights + 6 * 4 * 4 * (3 + 4)
    assert work["sample"].operations == sampling + output
    assert work["teacher"].operations == 2 * reading + output
    assert work["update"].operations == 3 * (reading + output)
    assert work["recomputation"].operations == reading  # the output layer is not computed twice


def test_shared_prompts_are_read_once():
    """The same step: 3 prompts of 2 tokens, contexts 1 and 2, and 6 rows of T − 1 = 2 tokens, contexts 3 and 4."""
    models = tiny_model(), tiny_model(layers=2)
    batch = {"prompts": 3, "group_size": 2, "prompt": 2, "response": 3}
    work = work_of_step(*models, **batch, sharing=("teacher", "update"))
    weights, output = 160, 6 * 3 * 2 * 4 * 10
    reading = (3 * 2 + 6 * 2) * 2 * weights + 4 * 4 * (3 * (1 + 2) + 6 * (3 + 4))
    assert work["teacher"].operations == 2 * reading + output
    assert work["update"].operations == 3 * (reading + output)
    assert work["recomputation"].operations == reading
    alone = work_of_step(*models, **batch, sharing=("teacher",))
    assert alone["teacher"].operations == work["teacher"].operations < alone["update"].operations
    assert alone["update"].operations == work_of_step(*models, **batch)["update"].operations
    assert alone["sample"].operations == work["sample"].operations


def test_grouped_heads_make_products_smaller_and_attention_not():
    """3 prompts of 5 tokens, 2 samples of 4: 6 rows of 8 read tokens, 24 predicted ones."""
    model = LlamaForCausalLM(GROUPED)
    work = work_of_step(model, model, prompts=3, group_size=2, prompt=5, response=4)
    products = 6 * 8 * 2 * (2 * 480)
    attention = 4 * 6 * (2 * 4 * 2) * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8)  # 2 layers, 4 heads of queries, 2 wide
    assert work["teacher"].operations == products + attention + 24 * 2 * 80


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_sampling_equal_a_count_by_hand(tied):
    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED.to_diff_dict(), "tie_word_embeddings": tied}))
    # Layers 2 · (480 + 16), the last norm 8, the output layer 80; read for each of 4 tokens.
    weights = 4 * (2 * (480 + 16) + 8 + 80)
    # Keys and values of 2 layers, 2 heads, 2 wide; tokens 1 to 3 of 6 rows look back at 5, 6 and 7 others.
    cached = 6 * (2 * 2 * 2 * 2) * (5 + 6 + 7)
    batch = {"prompts": 3, "group_size": 2, "prompt": 5, "response": 4}
    assert bytes_of_sampling(model, **batch, dtype=torch.bfloat16) == 2 * (weights + cached)
    assert bytes_of_sampling(model, **batch, dtype=torch.float32) == 4 * (weights + cached)


def test_a_floor_is_operations_by_rate():
    rates = MatrixRates()
    product = Product(rows=3, inner=5, columns=7, count=11)
    work = Work([product], attention=100)
    assert work.operations == 2 * 3 * 5 * 7 * 11 + 100
    assert rates.floor(work) == pytest.approx(work.operations / rates.best)
    own = product.operations / rates.rate(product) + 100 / rates.best
    assert rates.floor_of_own_shapes(work) == pytest.approx(own)
    assert rates.floor_of_own_shapes(work) >= rates.floor(work)
    assert rates.floor_of_mm(work) == pytest.approx(work.operations / rates.best_of_mm)
    assert rates.best_of_mm <= rates.best


@pytest.mark.parametrize(
    "dtype, slow, suits, faster",
    [
        (torch.float32, True, True, True),
        (torch.float32, True, False, False),
        (torch.float32, False, True, False),
        (torch.bfloat16, True, True, False),
    ],
)
def test_the_faster_library_gives_the_rate_where_the_loop_uses_it(dtype, slow, suits, faster, monkeypatch):
    monkeypatch.setattr("tgpo_lab.operations.mkl_is_slow", lambda: slow)
    monkeypatch.setattr("tgpo_lab.operations.suits_onednn", lambda rows, inner, columns: suits)
    monkeypatch.setattr("tgpo_lab.operations.product_by_onednn", lambda left, right: time.sleep(1e-3))
    monkeypatch.setattr("tgpo_lab.operations.SQUARE", 1024)  # 2 · 10⁹ operations, which no CPU makes in that time
    rates = MatrixRates("cpu", dtype)
    assert (rates.best > 2 * rates.best_of_mm) == faster
    assert (rates.best == rates.best_of_mm) != faster


class OutputTypes(TorchDispatchMode):
    """Types of all that matrix products give."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if operation.overloadpacket == torch.ops.aten.mm:
            self.found.add(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_of_products_in_the_precision_asked_for(dtype, monkeypatch):
    monkeypatch.setattr("tgpo_lab.operations.SQUARE", 64)
    with OutputTypes() as seen:
        MatrixRates("cpu", dtype)
    assert seen.found == {dtype}


def test_utilisation_by_hand():
    work = {"update": Work([], attention=600), "recomputation": Work([], attention=150)}
    assert utilisation(work, seconds=3.0, rate=1000.0, checkpointing=False) == {
        "model_utilisation": pytest.approx(0.2),
        "hardware_utilisation": pytest.approx(0.2),
    }
    twice = utilisation(work, seconds=3.0, rate=1000.0, checkpointing=True)
    assert twice == {"model_utilisation": pytest.approx(0.2), "hardware_utilisation": pytest.approx(0.25)}


# ── Cases ────────────────────────────────────────────────────────────────────────────────────────


def test_real_cases_have_the_weights_of_the_published_models():
    """Published: Qwen2.5 0.5B 494,032,768, 1.5B 1,543,714,304, 7B 7,615,616,512 weights."""
    half, one_and_a_half, seven = 494_032_768, 1_543_714_304, 7_615_616_512
    seven -= 2 * (152_064 - 151_936) * 3584  # embeddings and output layer have fewer rows here
    # Biases of queries, keys and values that a Llama lacks; norms of a head's queries and keys that a Qwen3 has.
    biases = {half: 24 * (896 + 2 * 128), one_and_a_half: 28 * (1536 + 2 * 256), seven: 28 * (3584 + 2 * 512)}
    for name, student, teacher in (("real-0.5b", half, one_and_a_half), ("real-1.5b", one_and_a_half, seven)):
        configurations = CASES[name].pair.configurations()
        assert shape_of(configurations["student"]).weights == student - biases[student]
        assert shape_of(configurations["teacher"]).weights == teacher - biases[teacher] + 28 * 2 * 128
    # By hand: V·H tied, then of 24 layers queries and output, keys and values, feed-forward, two norms; the last norm.
    layer = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 2 * 896
    assert half - biases[half] == 151_936 * 896 + 24 * layer + 896


def test_real_cases_are_trained_as_told():
    for name in ("real-0.5b", "real-1.5b", "real-small"):
        case = CASES[name]
        config = case.config()
        assert (config.precision, config.gradient_checkpointing) == ("bfloat16", True)
        rows = config.prompts_per_step * config.group_size
        assert config.micro_batch_tokens * 2 == rows * (case.pair.prompt_tokens + config.max_new_tokens)
    assert not CASES["real-small"].config(gradient_checkpointing=False).gradient_checkpointing
    assert CASES["real-small"].config(**ENGINES["compiled"]).compile_decoding
    vllm = CASES["real-small"].config(**ENGINES["vllm"])
    assert (vllm.engine, vllm.vllm_sleep) == ("vllm", True)
    assert bench.BenchOptions().cases == ("tiny", "small", "larger")


def test_weights_are_written_in_the_precision_asked_for(tmp_path):
    paths = write_random_pair(PAIR, tmp_path, precision="bfloat16")
    for name in ("student", "teacher"):
        with safe_open(Path(paths[name]) / "model.safetensors", "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert load_without_weights(paths[name]).generation_config.eos_token_id == 64  # no token, so nothing ends


def test_a_case_that_does_not_fit_is_refused_in_one_sentence_before_anything_is_written(tmp_path, monkeypatch):
    # Were it not refused, this test would write tens of gigabytes.
    monkeypatch.setattr(bench, "measure_case", lambda *args, **options: pytest.fail("It was not refused."))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 8 * 10**9}))
    with pytest.raises(InputError, match=r"real-1\.5b needs about \d+\.\d GB of memory, but there are 8\.0 GB") as told:
        bench.bench_command(["--cases", "tiny", "real-1.5b", "--output", str(tmp_path / "out")])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_disk_holds_both_models_and_two_checkpoints():
    case = CASES["real-0.5b"]
    student, teacher = (shape_of(c).weights for c in case.pair.configurations().values())
    # Models in bfloat16; a checkpoint in float32 without moments, and one with two.
    needed = 2 * (student + teacher) + 4 * student + 12 * student
    require_memory_and_disk(case, available_memory=10**12, free_disk=needed)
    with pytest.raises(InputError, match=r"writes 12\.0 GB of weights .*, but .* has 12\.0 GB free"):
        require_memory_and_disk(case, available_memory=10**12, free_disk=needed - 1)


def test_memory_is_that_of_all_programs_held_at_once():
    case = CASES["real-small"]
    require_memory_and_disk(case, runs=1, available_memory=2 * 10**9, free_disk=10**12)
    with pytest.raises(InputError, match=r"for each of 40 programs, .* hold one program at a time"):
        require_memory_and_disk(case, runs=40, available_memory=2 * 10**9, free_disk=10**12)
    require_memory_and_disk(CASES["tiny"], available_memory=0, free_disk=0)  # a shipped pair is not estimated


@pytest.mark.parametrize("share, programs", [(0.3, 3), (0.2, 4)])
def test_vllm_takes_its_share_of_the_memory_there_is(share, programs):
    # So many programs fit and no more: beside that share each needs little of 100 GB.
    machine = {"available_memory": 10**11, "free_disk": 10**12, **ENGINES["vllm"], "vllm_memory_share": share}
    require_memory_and_disk(CASES["small"], runs=programs, **machine)
    needed = rf"about {100 * share:.0f}\.\d GB of .* for each of {programs + 1} programs, but there are 100\.0 GB"
    with pytest.raises(InputError, match=needed):
        require_memory_and_disk(CASES["small"], runs=programs + 1, **machine)


def test_a_missing_vllm_is_told_before_anything_is_written(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tgpo_lab.benchmark.in_own_process", lambda *arguments, **options: pytest.fail("It began."))
    with pytest.raises(InputError, match="vLLM is not installed"):
        measure_case(CASES["small"], steps=1, warmup_steps=1, **ENGINES["vllm"])


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────


def test_a_small_case_is_measured_through_the_loop(in_this_process):
    result = measure_case(CASE, steps=1, warmup_steps=1)
    assert result["response_tokens"] == 6  # no response ends before the limit
    assert result["prompt_tokens"] == 5
    assert result["peak_resident_bytes"] > 0
    assert set(result["rows"]) == {*PHASES, "step", "measured step"}
    for row in result["rows"].values():
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 6 / row["seconds"])
        assert row["ratio_to_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["floor_seconds"] <= row["floor_of_own_shapes_seconds"]
        assert row["ratio_to_floor_of_mm"] == pytest.approx(row["seconds"] / row["floor_of_mm_seconds"])
        assert row["ratio_to_floor_of_mm"] <= row["ratio_to_floor"]


def test_the_floor_of_sampling(in_this_process, monkeypatch):
    """On a GPU the larger one of operations and bytes; on a CPU, whose cache may hold all bytes, of operations."""
    assert [floor_of_sampling(torch.device("cuda"), 2.0, reading) for reading in (1.0, 3.0)] == [2.0, 3.0]
    assert [floor_of_sampling(torch.device("cpu"), 2.0, reading) for reading in (1.0, 3.0)] == [2.0, 2.0]
    for speed in (1e3, 1e30):  # bytes a second
        monkeypatch.setattr(benchmark, "bandwidth", lambda device, speed=speed: speed)
        monkeypatch.setattr(benchmark, "floor_of_sampling", lambda device, *seconds: max(seconds))  # as on a GPU
        result = measure_case(CASE, steps=1, warmup_steps=1)
        sampling, floor = result["sampling"], result["rows"]["sample"]["floor_seconds"]
        assert sampling["byte_floor_seconds"] == sampling["bytes"] / speed
        assert floor == max(sampling["byte_floor_seconds"], sampling["operation_floor_seconds"])
        assert (floor == sampling["byte_floor_seconds"]) == (speed == 1e3)
        others = sum(result["rows"][phase]["floor_seconds"] for phase in ("teacher", "update"))
        assert result["rows"]["step"]["floor_seconds"] == pytest.approx(floor + others)


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    monkeypatch.setattr("tgpo_lab.bandwidth.seconds_of", lambda call, device: 0.5)
    monkeypatch.setattr("tgpo_lab.bandwidth.COPIED", 1000)
    assert bandwidth("cpu") == 2 * 1000 / 0.5


def held_by_a_child() -> int:
    return peak_memory()["peak_resident_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="only there a child is said to have held what its parent did")
def test_peak_memory_is_not_that_of_the_parent():
    held = torch.ones(2**28)  # 1 GiB
    assert peak_memory()["peak_resident_bytes"] > 2**30
    assert in_own_process(held_by_a_child) < 2**30
    assert held[0] == 1


def test_the_command_measures_a_real_case_in_small(tmp_path, capsys):
    arguments = ["--cases", "real-small", "--steps", "1", "--warmup-steps", "1", "--output", str(tmp_path)]
    assert bench.bench_command(arguments) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["made_by"]["versions"]["torch"]
    result = written["cases"][0]
    assert (result["case"], result["response_tokens"], result["prompt_tokens"]) == ("real-small", 32, 16)
    assert (result["config"]["precision"], result["config"]["gradient_checkpointing"]) == ("bfloat16", True)
    rows, sampling, update = result["rows"], result["sampling"], result["update"]
    assert sampling["tokens_per_second"] == pytest.approx(2 * 4 * 32 / rows["sample"]["seconds"])
    assert sampling["ratio_to_byte_floor"] == pytest.approx(rows["sample"]["seconds"] / sampling["byte_floor_seconds"])
    assert update["model_utilisation"] == pytest.approx(
        rows["update"]["operations"] / rows["update"]["seconds"] / result["rates"]["best"]
    )
    # Once forward and twice backward is three; the layers once more makes less than four, as the output layer is not.
    assert 1 < update["hardware_utilisation"] / update["model_utilisation"] < 4 / 3
    assert result["teacher_share"] == pytest.approx(rows["teacher"]["seconds"] / rows["step"]["seconds"])
    assert result["peak_resident_bytes"] > 0
    said = capsys.readouterr().out
    assert "bfloat16, gradient checkpointing" in said
    header, *rows = [line for line in said.splitlines() if line.startswith((" phase", " step", " measured step"))]
    assert all(name in header for name in ("tokens/s", "× floor", "× own", "× mm"))
    assert len(rows) == 2 and not any("…" in line for line in (header, *rows))
    assert torch.cuda.is_available() or "Measured on a CPU: these numbers say nothing about a GPU." in said
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 100


def test_an_unknown_case_is_refused():
    with pytest.raises(InputError, match="Unknown case 'huge'"):
        bench.bench_command(["--cases", "huge"])
