"""Tiny random models of the architectures whose layers are read by :mod:`tgpo_lab.models.known_decoders`."""

import torch
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, END, PAD = 50, 49, 0
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": END,
    "tie_word_embeddings": False,  # tied, random models repeat themselves
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

# The four known architectures, each with the biases that it can have.
KNOWN = {
    "Llama": lambda **s: LlamaForCausalLM(LlamaConfig(**s, attention_bias=True, mlp_bias=True)),
    "Mistral": lambda **s: MistralForCausalLM(MistralConfig(**s, sliding_window=None)),
    "Qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**s)),
    "Qwen3": lambda **s: Qwen3ForCausalLM(Qwen3Config(**s, attention_bias=True)),
}


def with_random_weights(model, seed: int = 0):
    """Every weight and bias random, those of the norms too: left as they are, ones and zeros would hide an omission."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.5 * noise if is_norm else 0.3 * noise)
    return model.eval()


@st.composite
def known_models(draw, family: str):
    """A random tiny model of one family."""
    shape = {
        **SHAPE,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([4, 8, 12])),  # 8 is hidden_size / heads
        "rope_parameters": draw(st.sampled_from([PLAIN, LLAMA3, YARN, LINEAR])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return with_random_weights(KNOWN[family](**shape), draw(st.integers(0, 1000)))
