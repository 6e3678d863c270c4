"""From a Hugging Face causal language model to aligned logits: the shift by one happens here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import InputError
from .rollouts import Rollouts


def response_hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Hidden states that predict the response tokens, padding left out: (N, H), in row-major order.

    The state at position p predicts the token at p + 1. So response token t of a row with a prompt
    of length L belongs to position L − 1 + t. Indexing any (B, T) tensor with ``rollouts.mask`` gives
    its values in the same order.
    """
    tokens, prompt_lengths = rollouts.sequences()
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state  # (B, longest sequence, H)
    row, step = rollouts.mask.nonzero(as_tuple=True)
    return hidden[row, prompt_lengths[row] - 1 + step]


def positions_at_once(vocabulary_size: int, device: torch.device) -> int:
    """How many positions to project at a time: 4 MB of logits, for a CPU's cache, or 512 MB on a GPU."""
    logits = 2**27 if device.type == "cuda" else 2**20
    return max(64, logits // vocabulary_size)


def project_to_vocabulary(model: PreTrainedModel, hidden: Tensor, vocabulary_size: int | None = None) -> Tensor:
    """Logits of hidden states in float32: (…, H) → (…, V).

    ``vocabulary_size`` cuts padded vocabulary rows away, which are not tokens. Scaling and soft
    caps that some architectures put on their logits are applied as in their own forward pass.
    """
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = cap * torch.tanh(logits / cap)
    return logits if vocabulary_size is None else logits[..., :vocabulary_size]


@torch.no_grad()
def check_projection(model: PreTrainedModel, name: str) -> None:
    """Compare :func:`project_to_vocabulary` with the model's own logits on three tokens.

    Raises:
        InputError: the architecture treats its logits in a way this module does not know.
    """
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    own = model(tokens, use_cache=False).logits.float()
    ours = project_to_vocabulary(model, model.base_model(tokens, use_cache=False).last_hidden_state)
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise InputError(
            f"{name} ({type(model).__name__}) computes its logits in a way that tgpo_lab does not know: "
            "expected hidden states times the output embeddings. Use another architecture."
        )
