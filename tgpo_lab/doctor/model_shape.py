"""What of a model's configuration decides how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..models.known_decoders import has_known_layers
from ..models.policy import head_width


@dataclass(frozen=True)
class Shape:
    """What counts of a model: numbers of values, not bytes."""

    weights: int
    layers: int
    hidden: int
    """Width of the residual stream."""
    kept: int
    """Values that one layer keeps of one token for the backward pass, without the residual stream."""
    keys_and_values: int
    """Values in the cache for one token in one layer."""
    vocabulary: int
    """Rows of the output layer."""
    linear: int
    """Σ (inputs + outputs) over the linear layers: an adapter of rank r has r times as many weights."""
    outside: int
    """Weights outside the decoder layers: embeddings, last norm, output layer."""
    largest: int
    """Weights of the largest module, the output layer left out."""
    normed: int = 0
    """Values of one token that a layer's norms keep in float32 besides, where products are bfloat16."""
    plain_heads: int = 0
    """Heads of which plain attention on a CPU may hold all scores."""
    eager_heads: int = 0
    """Heads of which eager attention holds all scores."""

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        return (self.weights - self.outside) // self.layers


def shape_of(config: PretrainedConfig) -> Shape:
    """Shape of a causal language model with this configuration; no weight is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = head_width(text)
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    key_value = key_value_heads * width
    # Of experts, only the chosen ones compute on a token.
    experts = getattr(text, "num_experts_per_tok", None)
    inner = getattr(text, "moe_intermediate_size", None) if experts else None
    inner = inner * experts if inner else getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    output = model.get_output_embeddings()
    normed = heads * width + key_value if any(name.endswith("q_norm") for name, _ in model.named_modules()) else 0
    weights = sum(p.numel() for p in model.parameters())  # shared ones once
    names = set(getattr(model, "_no_split_modules", None) or ())  # of the classes that FSDP takes for decoder layers
    inside = sum(p.numel() for m in model.modules() if type(m).__name__ in names for p in m.parameters())
    return Shape(
        weights=weights,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        # Two norms' outputs; queries, keys and values before and after rotation; attention's output; of the gated
        # feed-forward the gate, its activation, the other half and their product. Queries and keys before their norms.
        kept=2 * text.hidden_size + 3 * heads * width + 3 * key_value + 4 * inner + normed,
        keys_and_values=2 * key_value,
        vocabulary=output.weight.shape[0],
        linear=sum(
            m.in_features + m.out_features
            for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not output
        ),
        outside=weights - inside,
        largest=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules() if m is not output),
        normed=2 * text.hidden_size + normed,
        plain_heads=heads if has_known_layers(model) and key_value_heads == heads else 0,
        eager_heads=heads if model.config._attn_implementation == "eager" else 0,
    )  # fmt: skip
