"""Prompts read once for all their responses: states and gradients are those of each sequence alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_models import KNOWN, LLAMA3, PLAIN, SHAPE, VOCABULARY, known_models, with_random_weights
from transformers import Qwen2Config, Qwen2ForCausalLM

from tgpo_lab.models.policy import response_hidden_states
from tgpo_lab.models.shared_prompts import can_share_prompts, states_with_shared_prompts
from tgpo_lab.rollouts import Rollouts

TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def some_rollouts(draw):
    """Few prompts, so that rows share them, in any order; some of one length, some of several; responses of 1 to 6."""
    prompts = draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=3))
    rows = draw(
        st.lists(st.tuples(st.sampled_from(prompts), st.lists(TOKENS, min_size=1, max_size=6)), min_size=1, max_size=6)
    )
    return rollouts_of(rows)


def rollouts_of(rows):
    width = max(len(response) for _, response in rows)
    mask = torch.tensor([[t < len(response) for t in range(width)] for _, response in rows])
    responses = torch.tensor([[*response, *[7] * (width - len(response))] for _, response in rows])
    return Rollouts(
        [prompt for prompt, _ in rows], responses, mask, torch.ones(len(rows), dtype=torch.bool), pad_token=7
    )


def states_of_each_alone(model, rollouts):
    """One plain forward pass for each row, without padding."""
    states = []
    for prompt, response, length in zip(
        rollouts.prompts, rollouts.responses.tolist(), rollouts.lengths.tolist(), strict=True
    ):
        whole = model.base_model(torch.tensor([prompt + response[:length]]), use_cache=False).last_hidden_state[0]
        states.append(whole[len(prompt) - 1 : -1])
    return torch.cat(states)


@torch.no_grad()
@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), rollouts=some_rollouts())
def test_the_states_are_those_of_each_sequence_alone(family, data, rollouts):
    model = data.draw(known_models(family))
    found = states_with_shared_prompts(model, rollouts)
    torch.testing.assert_close(found, states_of_each_alone(model, rollouts), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), rollouts=some_rollouts(), seed=st.integers(0, 1000))
def test_the_gradients_are_those_of_each_sequence_alone(family, data, rollouts, seed):
    model = data.draw(known_models(family))
    weights = list(model.base_model.parameters())
    gradients = []
    for states in (states_with_shared_prompts(model, rollouts), states_of_each_alone(model, rollouts)):
        towards = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad((states * towards).sum(), weights))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max().clamp(min=1)), rtol=1e-4)


def test_a_prompt_passes_through_the_layers_once():
    model = with_random_weights(KNOWN["Qwen3"](**SHAPE, rope_parameters=PLAIN))
    read = []
    model.base_model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, _: read.append(len(inputs[0])))
    # Two prompts of 4 and 3 tokens, padded to 4; five responses of up to 6, of which the last token is not read.
    first, second = [1, 2, 3, 4], [5, 6, 8]
    response_hidden_states(
        model, rollouts_of([(first, [9] * 6), (second, [9] * 2), (first, [9]), (first, [9]), (second, [9])])
    )
    assert read == [2 * 4 + 5 * 5]


@pytest.mark.parametrize("changed", ["none", "checkpointing", "dropout", "window", "architecture", "float64", "hook"])
def test_other_models_are_read_by_their_own_forward_pass(changed):
    model = with_random_weights(KNOWN["Llama"](**SHAPE, rope_parameters=LLAMA3))
    if changed == "checkpointing":
        model.activation_checkpointing_enable()
    elif changed == "dropout":
        model.config.attention_dropout = 0.5
        model.train()
    elif changed == "window":
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    elif changed == "architecture":
        model.__class__ = type("Changed", (type(model),), {})
    elif changed == "float64":
        model.double()
    elif changed == "hook":
        model.base_model.layers[1].post_attention_layernorm.register_forward_hook(lambda module, inputs, output: output)
    assert can_share_prompts(model) == (changed == "none")
    with torch.no_grad():
        assert can_share_prompts(model) == (changed in ("none", "checkpointing"))  # nothing to store, nothing to repeat


@torch.no_grad()
@pytest.mark.parametrize("family", KNOWN)
def test_in_bfloat16_the_states_are_as_near_to_those_in_float32_as_the_models_own_are(family):
    rollouts = rollouts_of([([1, 2, 3], [4, 5, 6, 7, 8]), ([1, 2, 3], [9, 10]), ([11], [12, 13, 14])])
    errors = torch.zeros(2)
    for seed in range(8):
        model = with_random_weights(KNOWN[family](**SHAPE, rope_parameters=LLAMA3), seed)
        truth = states_of_each_alone(model, rollouts)
        with torch.autocast("cpu", torch.bfloat16):
            for which, states in enumerate((states_with_shared_prompts, states_of_each_alone)):
                errors[which] += (states(model, rollouts) - truth).norm() / truth.norm() / 8
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < 0.04
