"""One token after the other: from the tokens just drawn to the hidden states that predict the next ones.

The arithmetic of one token is small, so a step's time goes into the number of operations. Known decoders are read
with about half as many (:mod:`tgpo_lab.models.known_decoders`), every other architecture by its own forward pass.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..errors import InputError
from ..models.attention import attention
from ..models.known_decoders import Projection, is_known_decoder, read_layer, rms_norm, rotations
from ..models.onednn_linear import OneDnnLinear, is_plain_linear, linear
from ..parallel.placement import device_of

MOST_ROUNDING = 0.25
"""Of a hidden state's length; in bfloat16 rounding moves it by hundredths."""


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into one buffer and gives out views of the filled part.

    ``DynamicLayer`` copies the whole cache for every token; this one copies the token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, head width) states; return all states so far, keys as exact as values."""
        # Under autocast values are bfloat16 as projected, keys float32 as rotated. Attention would round keys alike,
        # but all of them again at every token.
        key_states = key_states.to(value_states.dtype)
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
    return KnownLayers(model, cache, capacity) if is_known_decoder(model) else _OwnForwardPass(model, cache)


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


@torch.no_grad()
def require_cached_reading(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that forgets what it has read: recurrent ones keep it elsewhere than in keys and values.

    Three tokens are read at once, and the last of them again after the first two. Some architectures take a cache that
    they do not know without a word, and each token would be drawn as if nothing stood before it.

    Args:
        model: whole on its device, in evaluation mode.
        name: what the message calls it.

    Raises:
        InputError: the hidden states are further apart than rounding takes them.
    """
    device = device_of(model)
    tokens = torch.tensor([[1, 2, 3]], device=device)
    whole = model.base_model(tokens, use_cache=False).last_hidden_state[:, -1]
    cache = preallocated_cache(model, 3)
    places = torch.arange(3, device=device)
    model.base_model(tokens[:, :2], position_ids=places[None, :2], past_key_values=cache, use_cache=True)
    after = next_hidden(model, cache, 3)(tokens[:, 2], places[2:], None)
    if not (after - whole).norm() <= MOST_ROUNDING * whole.norm():
        raise InputError(
            f"{name} ({type(model).__name__}) does not go on from a cache of keys and values, so responses cannot be "
            "sampled from it here. Use another architecture."
        )


class KnownLayers:
    """Single tokens through the layers of a known decoder."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, capacity: int, *, join: bool = True):
        """Read tokens with the model's weights as they are now; without ``join`` as they are when it is called."""
        self._trunk, self._cache = model.base_model, cache
        self._rotations = torch.stack(rotations(model, capacity), 1)  # (capacity, 2, head width)
        self._projections: list[tuple[Projection | None, Projection | None]] = [
            (_joined(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
             _joined(layer.mlp.gate_proj, layer.mlp.up_proj)) if join else (None, None)
            for layer in self._trunk.layers
        ]  # fmt: skip

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        cosine, sine = self._rotations[positions].split(1, 1)  # (B, 1, head width)
        mask = None if visible is None else visible.bool()[:, None, None]
        hidden = self._trunk.embed_tokens(tokens)  # (B, H)
        layers = zip(self._trunk.layers, self._cache.layers, self._projections, strict=True)
        for layer, cached, projections in layers:

            def attend(query: Tensor, key: Tensor, value: Tensor, cached: CacheLayerMixin = cached) -> Tensor:
                keys, values = cached.update(
                    key.unsqueeze(2), value.unsqueeze(2)
                )  # (B, key-value heads, so far, width)
                # Heads that share keys stand as several queries of one head: each sees all that is cached.
                grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
                return attention(grouped, keys, values, mask).reshape(len(query), -1)

            hidden = read_layer(layer, hidden, cosine, sine, attend, *projections)
        return rms_norm(hidden, self._trunk.norm)


def _joined(*projections: torch.nn.Module) -> Projection | None:
    """Several projections of the same input as one product: on a CPU, where the copy of the weights is small beside
    what a call costs, and where they are plain, as adapters and hooks have to be called."""
    if not all(
        is_plain_linear(p) and p.weight.device.type == "cpu" and not (p._forward_hooks or p._forward_pre_hooks)
        for p in projections
    ):
        return None
    widths = [p.out_features for p in projections]
    weight = torch.cat([p.weight for p in projections])
    biases = [p.bias for p in projections]
    bias = None if biases[0] is None else torch.cat(biases)
    if torch.is_autocast_enabled("cpu"):  # which remembers what it cast of parameters only
        weight = weight.to(torch.get_autocast_dtype("cpu"))
    product = linear if type(projections[0]) is OneDnnLinear else F.linear
    return lambda values: product(values, weight, bias).split(widths, -1)
