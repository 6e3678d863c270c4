"""How many bytes sampling has to read, and how fast this machine moves them.

With p prompts of P tokens, B = p·G rows of T response tokens, N weights in a model's layers (norms and biases with
them), an output layer of H·V, K = Σ over layers of 2 × key-value heads × head width, and b bytes in a value:

    bytes = b·T·(N + H·V) + b·B·K·Σ_{i=1…T−1} (P + i − 1)

Weights are read once for each token of a response: for the first one while all prompts are read, each once for all its
samples, and then once for each token that all rows take together. For a row's token i its keys and values of the tokens
before it are read; with grouped heads there are fewer of them than of queries. Each row reads those of its prompt for
itself. Left out are what is written, looked-up embeddings and activations, which are small beside the weights, so bytes
over the bandwidth are a floor. Of weights that are kept in float32 and computed with in bfloat16, b is 2.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .models.policy import head_width
from .operations import seconds_of

COPIED, COPIED_ON_GPU = 2**26, 2**30
"""Bytes of the copy that is timed: more than most caches hold."""


def bytes_of_sampling(
    model: PreTrainedModel, prompts: int, group_size: int, prompt: int, response: int, dtype: torch.dtype
) -> int:
    """Bytes that sampling has to read, for decoder models that attend to every token before.

    Args:
        model: the model that samples; it may be on the device meta.
        prompts: prompts of a batch.
        group_size: samples for each prompt.
        prompt: tokens of a prompt (P).
        response: tokens of a response (T).
        dtype: of products, and so of weights, keys and values as they are read.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = config.num_hidden_layers * 2 * heads * head_width(config)
    embeddings = model.get_input_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in model.base_model.parameters()) - embeddings
    output = model.get_output_embeddings().weight.numel()
    before = (response - 1) * prompt + (response - 1) * (response - 2) // 2
    return dtype.itemsize * (response * (layers + output) + prompts * group_size * cached * before)


def bandwidth(device: str | torch.device) -> float:
    """Bytes per second of a large copy, read and written; the best of several."""
    device = torch.device(device)
    source = torch.empty(COPIED_ON_GPU if device.type == "cuda" else COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
