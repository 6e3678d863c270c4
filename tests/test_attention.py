"""Attention as plain products gives what one query after the other gives, written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgpo_lab.models.attention import MOST_SCORES, attention


def by_hand(query, key, value, visible):
    """softmax(q·kᵀ / √width)·v, one query of one head of one row at a time."""
    (batch, heads, queries, width), shared = query.shape, query.shape[1] // key.shape[1]
    mixed = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(queries):
                seen = [
                    s for s in range(key.shape[2]) if visible is None or visible.expand(batch, 1, -1, -1)[b, 0, r, s]
                ]
                scores = [
                    float(query[b, h, r].double() @ key[b, h // shared, s].double()) / math.sqrt(width) for s in seen
                ]
                total = sum(math.exp(score) for score in scores)
                for score, s in zip(scores, seen, strict=True):
                    mixed[b, h, r] += math.exp(score) / total * value[b, h // shared, s].double()
    return mixed


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["all", "one mask", "a mask for each row"]),
    st.integers(0, 1000),
)
def test_it_is_the_softmax_of_scaled_scores_over_visible_keys(batch, heads, queries, keys, mask, seed):
    generator = torch.Generator().manual_seed(seed)
    # As projections give them: tokens before heads.
    query, key, value = (
        torch.randn(batch, length, number, 3, generator=generator).transpose(1, 2)
        for length, number in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    shape = {"all": None, "one mask": (queries, keys), "a mask for each row": (batch, 1, queries, keys)}[mask]
    visible = None if shape is None else torch.rand(shape, generator=generator) < 0.5
    if visible is not None:
        visible[..., 0] = True
    found = attention(query, key, value, visible)
    torch.testing.assert_close(found.double(), by_hand(query, key, value, visible), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_pytorchs_own_kernel():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    towards = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    own = torch.nn.functional.scaled_dot_product_attention
    for mask in (None, visible):
        expected = torch.autograd.grad((own(*tensors, mask) * towards).sum(), tensors)
        found = torch.autograd.grad((attention(*tensors, mask) * towards).sum(), tensors)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("length", "holds_scores"), [(int(MOST_SCORES**0.5), True), (int(MOST_SCORES**0.5) + 1, False)]
)
def test_long_sequences_do_not_hold_their_scores(length, holds_scores):
    saved = []
    tensors = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attention(*tensors, torch.ones(length, length, dtype=torch.bool).tril()).sum().backward()
    assert (2 * length**2 in saved) is holds_scores  # of two heads; the mask is half as large
