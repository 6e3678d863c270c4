"""Gradient checkpointing computes layers again, and changes no number: not even where a model has dropout."""

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tgpo_lab.models.policy import response_hidden_states
from tgpo_lab.models.recomputation import enable_recomputation, recompute
from tgpo_lab.rollouts import Rollouts

# Dropout in modules of its own; in the layers' own forward pass, with whole layers left out; in attention alone.
MODELS = {
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    ),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.5)
    ),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    attention_dropout=0.5)
    ),
}  # fmt: skip


def gradients(model) -> dict[str, torch.Tensor]:
    responses = torch.tensor([[7, 8, 9], [10, 11, 0]])
    rollouts = Rollouts([[3, 4, 5], [6]], responses, responses > 0, torch.tensor([True, True]), 0)
    model.zero_grad()
    Accelerator(cpu=True).backward(response_hidden_states(model, rollouts).square().sum())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_without_it_and_layers_are_computed_twice(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected = gradients(model)
    enable_recomputation(model)
    recompute(model)
    layers = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    computed = []
    for layer in layers:
        next(m for m in layer.modules() if m is not layer).register_forward_hook(lambda *_: computed.append(1))
    found = gradients(model)
    assert len(layers) == 2
    assert len(computed) == 4
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key
    model.eval()
    assert not any(module.training for module in model.modules())
