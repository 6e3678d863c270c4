"""Attention as a few plain products, where that is faster than PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of a row and head that are held at once: those of 128 tokens that see each other.
MOST_SCORES = 2**14


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √width)·v.

    PyTorch's own kernel goes through the scores in tiles and never holds them all, which pays for long sequences. For
    short ones on a CPU its tiles are too small for fast products, and one batched product of all rows takes less time:
    two thirds to three quarters in trials with 64 to 105 keys, for one query as for as many, backward pass included.

    Args:
        query: (B, heads, R, width).
        key, value: (B, key-value heads, S, width); each is seen by heads / key-value heads heads.
        visible: (R, S) or (B, 1, R, S) bool, which keys a query sees, at least one; None for all.

    Returns:
        (B, heads, R, width).
    """
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    if (
        query.device.type != "cpu"
        or heads != key.shape[1]
        or queries * keys > MOST_SCORES
        or query.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
    ):
        return F.scaled_dot_product_attention(query, key, value, visible, enable_gqa=heads != key.shape[1])
    query, key, value = (x.reshape(batch * heads, -1, width) for x in (query, key, value))
    if visible is None:
        scores = torch.bmm(query * width**-0.5, key.transpose(1, 2))
    else:
        hidden = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
        if hidden.ndim > 2:
            hidden = hidden.expand(batch, heads, queries, keys).flatten(0, 1)
        scores = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), value).view(batch, heads, queries, width)
