"""One token after the other with every tensor of one shape, so that the layers can be compiled and replayed.

Growing views of a cache have a new shape at every token, which no CUDA graph can replay. Here a token's keys and values
go to a place in a buffer of fixed capacity that a tensor names, and attention reads the whole buffer with a mask: the
same sums, with zeros in them. Buffers and compiled code are kept from call to call, because a graph is bound to the
memory it was captured with. Rows that have finished stay in the batch: dropping them would change the shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..errors import InputError
from ..models.known_decoders import is_known_decoder
from .decoding import KnownLayers, NextHidden, PreallocatedLayer

CAPACITY_STEP = 64
"""Capacities are rounded up to a multiple of this, so that prompts of other lengths seldom need other buffers."""


class FixedShapeLayer(PreallocatedLayer):
    """A cache layer that gives out its whole buffer, and writes one token to the place that ``slot`` (1,) holds."""

    def __init__(self, like: PreallocatedLayer, capacity: int, slot: Tensor):
        super().__init__(capacity)
        self.lazy_initialization(like.keys, like.values)
        self._slot = slot
        # Zeros: what is masked gets the weight 0, and 0 times the NaN that unwritten memory may hold is NaN.
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], capacity, states.shape[3]) for states in (like.keys, like.values)
        )
        for buffer in (self.keys, self.values):
            torch._dynamo.mark_static_address(buffer)

    def begin(self, like: PreallocatedLayer) -> None:
        """Take over the states of the prompts, (B, heads, prompt, head width)."""
        for buffer, states in ((self.keys, like.keys), (self.values, like.values)):
            buffer.zero_()
            buffer[:, :, : states.shape[2]] = states

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, head width) states; return the buffers."""
        self.keys.index_copy_(2, self._slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self._slot, value_states.to(self.values.dtype))
        return self.keys, self.values


def require_known_layers(model: PreTrainedModel) -> None:
    """Refuse a student whose decoding cannot be compiled.

    Raises:
        InputError: it is of another architecture than those whose layers are read here.
    """
    if not is_known_decoder(model):
        raise InputError(
            f"compile_decoding knows the layers of Llama, Mistral, Qwen2 and Qwen3 without sliding window, but the "
            f"student is a {type(model).__name__}. Set compile_decoding to false."
        )


class FixedShapeDecoder:
    """Makes :class:`tgpo_lab.sampling.decoding.NextHidden` of fixed shape, one for each number of rows and capacity."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool):
        """Decode with a model.

        Args:
            model: of a known architecture without sliding window.
            compiled: by ``torch.compile``; on a GPU as a CUDA graph.

        Raises:
            InputError: another architecture.
        """
        require_known_layers(model)
        self._model, self._compiled = model, compiled
        self._readers: dict[tuple[int, int, torch.dtype], _Reader] = {}

    def begin(self, cache: DynamicCache, visible: Tensor, new_tokens: int) -> NextHidden:
        """Start from prompts that have been read.

        Args:
            cache: of :func:`tgpo_lab.sampling.decoding.preallocated_cache`, with their keys and values.
            visible: (B, prompt) 1 where a prompt token is one and not padding.
            new_tokens: at most so many will be read.
        """
        rows, prompt = visible.shape
        capacity = -(-(prompt + new_tokens) // CAPACITY_STEP) * CAPACITY_STEP
        key = (rows, capacity, cache.layers[0].keys.dtype)
        if key not in self._readers:
            self._readers.clear()  # its buffers are as large as a whole cache
            self._readers[key] = _Reader(self._model, cache, capacity, self._compiled)
        reader = self._readers[key]
        reader.begin(cache, visible)
        return reader


class _Reader:
    """Reads tokens into buffers of fixed shape."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, capacity: int, compiled: bool):
        rows = cache.layers[0].keys.shape[0]
        self._slot = torch.zeros(1, dtype=torch.long, device=model.device)
        self._mask = torch.zeros(rows, capacity, dtype=torch.bool, device=model.device)
        own = DynamicCache(config=model.config)
        own.layers = [FixedShapeLayer(layer, capacity, self._slot) for layer in cache.layers]
        self._layers = own.layers
        for tensor in (self._slot, self._mask):
            torch._dynamo.mark_static_address(tensor)
        self._read = KnownLayers(model, own, capacity, join=False)  # it outlives updates
        if compiled:
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"
            self._read = torch.compile(self._read, mode=mode, fullgraph=True, dynamic=False)

    def begin(self, cache: DynamicCache, visible: Tensor) -> None:
        prompt = visible.shape[1]
        self._slot.fill_(prompt)
        self._mask.zero_()
        self._mask[:, :prompt] = visible.bool()
        for own, read in zip(self._layers, cache.layers, strict=True):
            own.begin(read)

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        self._mask.index_fill_(1, self._slot, True)
        torch.compiler.cudagraph_mark_step_begin()
        hidden = self._read(tokens, positions, self._mask)
        self._slot += 1
        return hidden
