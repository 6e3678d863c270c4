"""Weights of a model's products in the precision of autocast, converted once for all tokens that are sampled.

Autocast converts a float32 weight for each product. Outside of inference mode it remembers what it has converted until
its context ends, but compiled layers do it anew whenever they are called: for one token of each row they would read a
weight in float32, write it in bfloat16 and read that, 8 bytes where 2 do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..models.onednn_linear import is_plain_linear


class ConvertedWeights:
    """Copies of the weights of a model's linear layers, as large as half of them. They stay where they are in memory,
    because a CUDA graph is bound to that."""

    def __init__(self, model: PreTrainedModel):
        """Nothing is copied yet.

        Args:
            model: whose linear layers in float32 are meant; all others are left as they are.
        """
        # Of an output layer that shares its weight with the embeddings, this one is replaced and that one is not:
        # embeddings are no product, and stay as exact as they are under autocast.
        self._layers = [m for m in model.modules() if is_plain_linear(m) and m.weight.dtype == torch.float32]
        self._copies: list[torch.nn.Parameter] = []

    @contextmanager
    def renewed(self, device_type: str) -> Iterator[None]:
        """Context in which the layers have their copies, renewed on entry; nothing happens without autocast.

        Args:
            device_type: of the autocast that is asked for its precision.
        """
        if not torch.is_autocast_enabled(device_type):
            yield
            return
        precision = torch.get_autocast_dtype(device_type)
        kept = [layer.weight for layer in self._layers]
        if not self._copies:
            self._copies = [torch.nn.Parameter(w.detach().to(precision), requires_grad=False) for w in kept]
        else:
            for copy, weight in zip(self._copies, kept, strict=True):
                copy.data.copy_(weight.detach())
        try:
            for layer, copy in zip(self._layers, self._copies, strict=True):
                layer.weight = copy
            yield
        finally:
            for layer, weight in zip(self._layers, kept, strict=True):
                layer.weight = weight
