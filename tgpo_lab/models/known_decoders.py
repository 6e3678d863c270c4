"""Llama, Mistral, Qwen2 and Qwen3 with fewer operations than in their forward pass of transformers.

Their own modules are called: pre-norm, rotary positions, gated feed-forward. What a layer's attention sees is left to
the caller, which has a cache (:mod:`tgpo_lab.sampling.decoding`) or whole sequences (:mod:`tgpo_lab.models.policy`).
Every other architecture is served by its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

_KNOWN_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
# Kinds of rotary position embedding whose frequencies do not change with the length of the sequence.
_FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn"}

Projection = Callable[[Tensor], tuple[Tensor, ...]]
"""(N, H) → one tensor for each of several projections of the same input."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (N, heads, head width), keys and values (N, key-value heads, head width) → (N, heads × head width)."""


def has_known_layers(model: PreTrainedModel) -> bool:
    """Whether a model is of an architecture that :func:`read_layer` reads, wherever its weights are."""
    return (
        type(model) in _KNOWN_MODELS
        and (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") in _FIXED_ROTATIONS
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)  # no sliding window
    )


def is_known_decoder(model: PreTrainedModel) -> bool:
    """Whether :func:`read_layer` computes what this model's own forward pass does."""
    # An offloaded weight is on the device meta but while its module is called.
    return model.device.type != "meta" and has_known_layers(model)


def modules_left_out(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Modules of a known decoder that are not called by those who read its layers with :func:`read_layer`."""
    yield model.base_model
    yield from (norm for norm in model.base_model.modules() if type(norm).__name__.endswith("RMSNorm"))
    for layer in model.base_model.layers:
        yield from (layer, layer.self_attn, layer.mlp)


def rotations(model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the first positions, (length, head width) each, for :func:`rotate`."""
    trunk = model.base_model
    weight = trunk.embed_tokens.weight
    cosine, sine = trunk.rotary_emb(weight[:1], torch.arange(length, device=weight.device).unsqueeze(0))
    half = cosine.shape[-1] // 2
    # rotate_half(x)·sin is roll(x)·(−sin, sin): one operation instead of three.
    return cosine.squeeze(0), torch.cat([-sine[..., :half], sine[..., half:]], -1).squeeze(0)


def rotate(values: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Rotary position embedding of (N, heads, head width), with (N, 1, head width) of :func:`rotations`."""
    return torch.addcmul(values * cosine, values.roll(values.shape[-1] // 2, -1), signed_sine)


def rms_norm(values: Tensor, norm: torch.nn.Module) -> Tensor:
    """What a norm of these architectures computes of (…, H)."""
    # Under autocast the projections are bfloat16 and the weights are not: mixed, PyTorch is slower, and warns of it.
    return F.rms_norm(values.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.variance_epsilon)


def read_layer(
    layer: torch.nn.Module,
    hidden: Tensor,
    cosine: Tensor,
    sine: Tensor,
    attend: Attend,
    project_in: Projection | None = None,
    project_up: Projection | None = None,
) -> Tensor:
    """One decoder layer over N tokens: (N, H) → (N, H).

    Args:
        layer: of a known decoder.
        hidden: (N, H) the residual stream.
        cosine, sine: (N, 1, head width) of :func:`rotations` at each token's position.
        attend: mixes the values that each token sees.
        project_in: queries, keys and values, if not by the layer's own modules.
        project_up: gate and value of the feed-forward part, likewise.
    """
    attention, feed_forward = layer.self_attn, layer.mlp
    project_in = project_in or _by(attention.q_proj, attention.k_proj, attention.v_proj)
    project_up = project_up or _by(feed_forward.gate_proj, feed_forward.up_proj)
    projected = project_in(rms_norm(hidden, layer.input_layernorm))
    query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected)
    if hasattr(attention, "q_norm"):
        query, key = rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)
    mixed = attend(rotate(query, cosine, sine), rotate(key, cosine, sine), value)
    hidden = hidden + attention.o_proj(mixed)
    gate, value = project_up(rms_norm(hidden, layer.post_attention_layernorm))
    return hidden + feed_forward.down_proj(feed_forward.act_fn(gate) * value)


def _by(*projections: torch.nn.Module) -> Projection:
    return lambda values: tuple(project(values) for project in projections)
