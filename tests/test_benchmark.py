"""The benchmark measures the real loop; its operations are counted by hand here. Times are never asserted."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tgpo_lab.benchmark import Case, RandomPair, Shape, measure_case
from tgpo_lab.cli import bench
from tgpo_lab.errors import InputError
from tgpo_lab.operations import PHASES, MatrixRates, Product, Work, work_of_step

PAIR = RandomPair(Shape(16, 1, 2), Shape(32, 1, 2), vocabulary_size=64, prompt_tokens=5)
CASE = Case("test", PAIR, {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6})


def tiny_model(layers: int = 1) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2)
    )


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


def test_a_floor_is_operations_by_rate():
    rates = MatrixRates()
    product = Product(rows=3, inner=5, columns=7, count=11)
    work = Work([product], attention=100)
    assert work.operations == 2 * 3 * 5 * 7 * 11 + 100
    assert rates.floor(work) == pytest.approx(work.operations / rates.best)
    own = product.operations / rates.rate(product) + 100 / rates.best
    assert rates.floor_of_own_shapes(work) == pytest.approx(own)
    assert rates.floor_of_own_shapes(work) >= rates.floor(work)


def test_a_small_case_is_measured_through_the_loop():
    result = measure_case(CASE, steps=1, warmup_steps=1)
    assert result["response_tokens"] == 6  # no response ends before the limit
    assert result["prompt_tokens"] == 5
    assert result["peak_resident_bytes"] > 0
    assert set(result["rows"]) == {*PHASES, "step", "measured step"}
    for row in result["rows"].values():
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 6 / row["seconds"])
        assert row["ratio_to_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])


def test_the_command_writes_its_numbers_with_where_they_come_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CASES", {"test": CASE})
    monkeypatch.setattr(bench, "measure_in_own_process", measure_case)
    assert (
        bench.bench_command(["--cases", "test", "--steps", "1", "--warmup-steps", "1", "--output", str(tmp_path)]) == 0
    )
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["made_by"]["versions"]["torch"]
    assert written["cases"][0]["case"] == "test"
    assert written["cases"][0]["rows"]["sample"]["operations"] > 0
    assert "teacher" in capsys.readouterr().out


def test_an_unknown_case_is_refused():
    with pytest.raises(InputError, match="Unknown case 'huge'"):
        bench.bench_command(["--cases", "huge"])
