"""From a Hugging Face causal language model to aligned logits: the shift by one happens here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import InputError
from ..rollouts import Rollouts
from .shared_prompts import can_share_prompts, states_with_shared_prompts

# Entries of a vocabulary that are looked at together: whole vectors of a processor, and a divisor of most
# vocabularies, so that they seldom have to be copied to fill the last block.
SEARCH_BLOCK = 64


def head_width(config: PretrainedConfig) -> int:
    """Numbers of one attention head, of a decoder's own configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def response_hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Hidden states that predict the response tokens, padding left out: (N, H), in row-major order.

    The state at position p predicts the token at p + 1. So response token t of a row with a prompt
    of length L belongs to position L − 1 + t. Indexing any (B, T) tensor with ``rollouts.mask`` gives
    its values in the same order.
    """
    if can_share_prompts(model):
        return states_with_shared_prompts(model, rollouts)
    tokens, prompt_lengths = rollouts.sequences()
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state  # (B, longest sequence, H)
    row, step = rollouts.mask.nonzero(as_tuple=True)
    return hidden[row, prompt_lengths[row] - 1 + step]


def positions_at_once(vocabulary_size: int, device: torch.device) -> int:
    """How many positions to project at a time: 512 MB of logits on a GPU; on a CPU 8 MB for its cache, or 512 of them.

    Fewer positions make slow products, and read and write the whole output layer once more. In trials on two cores
    (float32, forward and backward) 512 positions took 0.98, 0.98 and 0.95 of the time of 256 at V = 2,048, 8,192 and
    32,768, the teacher's pass 0.9. Of large vocabularies there are fewer, down to 256, so that the logits do not grow
    beyond 64 MB if it can be helped.
    """
    if device.type == "cuda":
        return max(256, 2**27 // vocabulary_size)
    return max(256, min(512, 2**24 // vocabulary_size), 2**21 // vocabulary_size)


def project_to_vocabulary(model: PreTrainedModel, hidden: Tensor, vocabulary_size: int | None = None) -> Tensor:
    """Logits of hidden states in float32, or float64 where the model computes in it: (…, H) → (…, V).

    ``vocabulary_size`` cuts padded vocabulary rows away, which are not tokens. Scaling and soft
    caps that some architectures put on their logits are applied as in their own forward pass.
    """
    logits = model.get_output_embeddings()(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    config = model.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = cap * torch.tanh(logits / cap)
    return logits if vocabulary_size is None else logits[..., :vocabulary_size]


def most_probable(logits: Tensor) -> Tensor:
    """The token of the largest logit, the first of equal ones: (N, V) → (N,) int64.

    The same as ``logits.argmax(-1)``, which takes several times as long on a CPU: the maximum of a block is
    vectorised there, its place is not. So the place is searched in the best block only.
    """
    vocabulary = logits.shape[-1]
    whole = vocabulary - vocabulary % SEARCH_BLOCK
    best = logits[:, :whole].unflatten(-1, (-1, SEARCH_BLOCK)).amax(-1)  # (N, whole blocks)
    if whole < vocabulary:
        best = torch.cat([best, logits[:, whole:].amax(-1, keepdim=True)], -1)
    start = best.argmax(-1, keepdim=True) * SEARCH_BLOCK  # (N, 1)
    places = (start + torch.arange(SEARCH_BLOCK, device=logits.device)).clamp(max=vocabulary - 1)  # (N, block)
    return (start + logits.gather(-1, places).argmax(-1, keepdim=True)).squeeze(-1)


@torch.no_grad()
def check_projection(model: PreTrainedModel, name: str) -> None:
    """Compare :func:`project_to_vocabulary` with the model's own logits on three tokens.

    Raises:
        InputError: the model's outputs are not finite, or the architecture treats its logits in a way this module does
            not know.
    """
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    own = model(tokens, use_cache=False).logits.float()
    # −∞ is how some mark rows that are no tokens. NaN differs from itself, which would look like another architecture.
    if own.isnan().any() or own.isposinf().any():
        raise InputError(
            f"The outputs of {name} on three tokens, in {str(model.dtype).removeprefix('torch.')}, are not finite: its "
            "weights are damaged, or the precision is too small for them. Copy or train the checkpoint again, or set "
            "precision float32."
        )
    hidden = getattr(model.base_model(tokens, use_cache=False), "last_hidden_state", None)
    ours = own[:0] if hidden is None else project_to_vocabulary(model, hidden)
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-2, atol=1e-2):
        raise InputError(
            f"{name} ({type(model).__name__}) computes its logits in a way that tgpo_lab does not know: "
            "expected hidden states times the output embeddings. Use another architecture."
        )
