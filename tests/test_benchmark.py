"""The benchmark measures the real loop; its operations are counted by hand here. Times are never asserted."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tgpo_lab.benchmark import Case, RandomPair, Shape, measure_case
from tgpo_lab.operations import PHASES, work_of_step


def test_a_small_case_is_measured_through_the_loop():
    pair = RandomPair(Shape(16, 1, 2), Shape(32, 1, 2), vocabulary_size=64, prompt_tokens=5)
    case = Case("test", pair, {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 6})
    result = measure_case(case, steps=1, warmup_steps=1)
    assert result["response_tokens"] == 6  # no response ends before the limit
    assert result["prompt_tokens"] == 5
    assert set(result["rows"]) == {*PHASES, "step", "measured step"}
    for row in result["rows"].values():
        assert row["seconds"] > 0
        assert row["operations"] > 0


def test_more_of_everything_is_more_work():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    small = work_of_step(model, model, 2, 2, 5, 6)
    longer = work_of_step(model, model, 2, 2, 5, 12)
    wider = work_of_step(model, model, 4, 2, 5, 6)
    for phase in PHASES:
        assert longer[phase].operations > small[phase].operations
        assert wider[phase].operations == 2 * small[phase].operations
    # At least the output projection of every response token: 2 · H · V each.
    assert small["teacher"].operations >= 4 * 6 * 2 * 16 * 64
    assert torch.isfinite(torch.tensor(float(small["update"].operations)))
