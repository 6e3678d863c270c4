"""What a run is made from beside its configuration: prompts and frozen weights, by digests that a resume compares."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .config import TrainConfig
from .errors import InputError
from .models.pairs import Pair
from .runs import CONFIG_FILE

NUMBERS_OF_A_TENSOR = 64
"""So many of each tensor of a model are looked at."""
ENCODED_PROMPTS = 16
"""So many of the prompts are looked at as tokens."""


def weights_digests(config: TrainConfig, pair: Pair) -> dict[str, str]:
    """Digests of the weights that a run leaves as they are: the teacher's, and under adapters the student's.

    Args:
        config: the run.
        pair: as loaded, before anything is adapted, shared out or moved. A teacher behind a server has no digest.
    """
    digests = {} if config.teacher_server is not None else {"teacher": weights_digest(pair.teacher)}
    return digests | ({"student": weights_digest(pair.student)} if config.lora_rank else {})


def prompts_digests(pair: Pair, *splits: Dataset) -> dict[str, str]:
    """Digests of what a run learns from and is measured on: prompts and answers, in their order, and how they become
    tokens, which tokenizer, chat template, end tokens and shared vocabulary decide."""
    texts = [list(split[column]) for split in splits for column in ("prompt", "answer")]
    encoded = pair.encode(texts[0][:ENCODED_PROMPTS])
    tokens = [encoded, pair.end_tokens, pair.vocabulary_size]
    return {"prompts": _short(json.dumps(texts).encode()), "tokens": _short(json.dumps(tokens).encode())}


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """Digest of names, shapes and some numbers of all tensors of a model, which tells it from others and from what
    further training makes of it."""
    parts = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):  # what some quantised layers keep beside their weights
            continue
        flat = tensor.reshape(-1)
        count = min(NUMBERS_OF_A_TENSOR, len(flat))
        places = torch.arange(count) * (len(flat) - 1) // max(1, count - 1)
        numbers = flat[places.to(flat.device)].float().tolist()
        parts.append([name, list(tensor.shape), [number.hex() for number in numbers]])
    return _short(json.dumps(parts).encode())


def require_same_inputs(config: TrainConfig, pair: Pair, digests: dict[str, str]) -> None:
    """Refuse to go on with a run on other prompts or weights. Of a run without digests everything is taken as it is.

    Args:
        config: the run, in ``config.output``.
        pair: its pair.
        digests: those of now.

    Raises:
        InputError: they are others than when the run began.
    """
    directory = Path(config.output)
    noted = json.loads((directory / CONFIG_FILE).read_text()).get("digests", {})
    for what, digest in digests.items():
        if noted.get(what, digest) != digest:
            named, things = {
                "prompts": (config.dataset or pair.prompts, "prompts or answers"),
                "tokens": (pair.name, "tokens, chat template or end tokens"),
                "teacher": (config.teacher or f"The teacher of {config.student}", "weights"),
                "student": (config.student, "weights"),
            }[what]
            raise InputError(
                f"{named} has other {things} than when {directory} began. An exact resume needs the same: restore them "
                f"({CONFIG_FILE} names the versions of packages that read them then), or start a run in another folder."
            )


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
