"""One token after the other: from the tokens just drawn to the hidden states that predict the next ones.

The arithmetic of one token is small, so a step's time goes into the number of operations. For the decoder layers of
Llama, Mistral, Qwen2 and Qwen3 their own modules are called here with about half as many operations as in their
forward pass of transformers, which serves every other architecture.
"""

from __future__ import annotations

from typing import Protocol

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


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into one buffer and gives out views of the filled part.

    ``DynamicLayer`` copies the whole cache for every token; this one copies the token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, head width) states; return all states so far."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = (self._buffer(states) for states in (key_states, value_states))
        self._keys[:, :, start : self.filled] = key_states
        self._values[:, :, start : self.filled] = value_states
        self.keys, self.values = self._keys[:, :, : self.filled], self._values[:, :, : self.filled]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``, in that order, repeats allowed."""
        keys, values = self.keys[beam_idx], self.values[beam_idx]
        self._keys, self._values = self._buffer(keys), self._buffer(values)
        self._keys[:, :, : self.filled], self._values[:, :, : self.filled] = keys, values
        self.keys, self.values = self._keys[:, :, : self.filled], self._values[:, :, : self.filled]

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self.capacity, width)


def preallocated_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """A key-value cache for ``capacity`` tokens a row."""
    cache = DynamicCache(config=model.config)
    # Sliding-window and recurrent layers keep the cache that transformers gives them.
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class NextHidden(Protocol):
    """Reads one token for each row."""

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        """Append the tokens to the cache.

        Args:
            tokens: (B,) int64.
            positions: (B,) int64, position of each token in its own row.
            visible: (B, cached tokens with this one) 1 where a cached token is one and not padding; None without any.

        Returns:
            (B, H) hidden states that predict the next tokens.
        """


def next_hidden(model: PreTrainedModel, cache: DynamicCache, capacity: int) -> NextHidden:
    """The fastest known way to read single tokens into ``cache``, which holds a prompt already."""
    return KnownLayers(model, cache, capacity) if known_layers(model) else _OwnForwardPass(model, cache)


def known_layers(model: PreTrainedModel) -> bool:
    """Whether :class:`KnownLayers` computes what this model's own forward pass does."""
    return (
        type(model) in _KNOWN_MODELS
        and getattr(model.config, "rope_parameters", {}).get("rope_type") in _FIXED_ROTATIONS
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)  # no sliding window
        and model.device.type != "meta"  # an offloaded weight is there only while its module is called
    )


class _OwnForwardPass:
    """Single tokens through the model's forward pass, whatever its architecture."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache):
        self._model, self._cache = model, cache

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        return self._model.base_model(
            tokens.unsqueeze(-1),
            attention_mask=visible,
            position_ids=positions.unsqueeze(-1),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class KnownLayers:
    """Single tokens through the modules of a known decoder: pre-norm, rotary positions, gated feed-forward."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, capacity: int, *, join: bool = True):
        """Read tokens with the model's weights as they are now; without ``join`` as they are when it is called."""
        self._trunk, self._cache = model.base_model, cache
        everywhere = torch.arange(capacity, device=model.device).unsqueeze(0)
        weight = self._trunk.embed_tokens.weight
        cosine, sine = self._trunk.rotary_emb(weight[:1], everywhere)  # (1, capacity, head width)
        half = cosine.shape[-1] // 2
        # rotate_half(x)·sin is roll(x)·(−sin, sin): one operation instead of three.
        sine = torch.cat([-sine[..., :half], sine[..., half:]], -1)
        self._cosine, self._sine = cosine.squeeze(0), sine.squeeze(0)
        self._queries_keys_values = [
            _Joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, join=join)
            for layer in self._trunk.layers
        ]
        self._gates_and_values = [
            _Joined(layer.mlp.gate_proj, layer.mlp.up_proj, join=join) for layer in self._trunk.layers
        ]

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        rows = len(tokens)
        cosine, sine = self._cosine[positions].unsqueeze(1), self._sine[positions].unsqueeze(1)  # (B, 1, head width)
        mask = None if visible is None else visible.bool()[:, None, None]
        hidden = self._trunk.embed_tokens(tokens)  # (B, H)
        layers = zip(
            self._trunk.layers, self._cache.layers, self._queries_keys_values, self._gates_and_values, strict=True
        )
        for layer, cached, project_in, project_up in layers:
            attention, feed_forward = layer.self_attn, layer.mlp
            projected = project_in(_rms_norm(hidden, layer.input_layernorm))
            query, key, value = (x.unflatten(-1, (-1, attention.head_dim)) for x in projected)
            # (B, heads or key-value heads, head width) each
            if hasattr(attention, "q_norm"):
                query, key = _rms_norm(query, attention.q_norm), _rms_norm(key, attention.k_norm)
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
            keys, values = cached.update(key.unsqueeze(2), value.unsqueeze(2))  # (B, key-value heads, so far, width)
            # Heads that share keys stand as several queries of one head: each sees all that is cached.
            grouped = query.view(rows, keys.shape[1], -1, attention.head_dim).to(keys.dtype)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=attention.scaling)
            hidden = hidden + attention.o_proj(mixed.reshape(rows, -1))
            gate, value = project_up(_rms_norm(hidden, layer.post_attention_layernorm))
            hidden = hidden + feed_forward.down_proj(feed_forward.act_fn(gate) * value)
        return _rms_norm(hidden, self._trunk.norm)


class _Joined:
    """Several projections of the same input as one product: on a CPU, where the copy of the weights is small beside
    what a call costs, and where they are plain, as adapters and hooks have to be called."""

    def __init__(self, *projections: torch.nn.Module, join: bool):
        self._projections = projections
        self._joined = join and all(
            type(p) is torch.nn.Linear
            and p.weight.device.type == "cpu"
            and not (p._forward_hooks or p._forward_pre_hooks)
            for p in projections
        )
        if self._joined:
            self._widths = [p.out_features for p in projections]
            self._weight = torch.cat([p.weight for p in projections])
            biases = [p.bias for p in projections]
            self._bias = None if biases[0] is None else torch.cat(biases)
            if torch.is_autocast_enabled("cpu"):  # which remembers what it cast of parameters only
                self._weight = self._weight.to(torch.get_autocast_dtype("cpu"))

    def __call__(self, values: Tensor) -> tuple[Tensor, ...]:
        """(B, H) → what each projection gives."""
        if not self._joined:
            return tuple(project(values) for project in self._projections)
        return F.linear(values, self._weight, self._bias).split(self._widths, -1)


def _rms_norm(values: Tensor, norm: torch.nn.Module) -> Tensor:
    # Under autocast the projections are bfloat16 and the weights are not: mixed, PyTorch is slower, and warns of it.
    return F.rms_norm(values.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(values: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Rotary position embedding: (B, heads, head width) and (B, 1, head width)."""
    return torch.addcmul(values * cosine, values.roll(values.shape[-1] // 2, -1), signed_sine)
