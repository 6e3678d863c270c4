"""Responses that the teacher wrote to prompts, kept on disk: written once, read in every later step and run.

What a trace is depends on the teacher's weights, the prompt, the limits of sampling and the seed, and on nothing else:
not on the step, nor on which other prompts stood in the batch (but for the rounding of a product over other rows). So
a file that is lost or damaged is written anew with the same tokens, and a run that finds some traces and writes the
others ends like one that wrote them all.

    folder / <teacher and sampling, 16 digits> / about.json                    what the digits stand for
                                               / <prompt, 64 digits>.safetensors
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..errors import InputError
from ..files import require_name, require_writable_folder, write_bytes
from ..randomness import generator_for
from ..rollouts import Rollouts

Draw = Callable[[list[list[int]], Tensor], Rollouts]
"""(prompts, (prompts × samples, limit) uniform numbers) → the rollouts that the teacher writes with them."""


def teacher_identity(model: PreTrainedModel) -> str:
    """What tells a teacher's weights from others': a hub name with its revision, or the digest of a folder's files.
    Where there are adapters that is their base's, and a digest of their own follows.

    Args:
        model: with its weights on a device: those of one that is offloaded are nowhere.

    Raises:
        InputError: the model was loaded from neither.
    """
    adapters = getattr(model, "peft_config", None)
    return _identity_of_base(model) + (f"+adapters:{_digest_of_adapters(model, adapters)}" if adapters else "")


def _digest_of_adapters(model: PreTrainedModel, configurations: dict[str, Any]) -> str:
    """Of their weights and of peft's configurations, by name. peft is an extra, so its types are not named."""
    total = hashlib.sha256()
    for name, configuration in sorted(configurations.items()):
        settings = configuration.to_dict()
        settings.pop("base_model_name_or_path")  # where the base lies changes nothing
        total.update(json.dumps([name, settings], sort_keys=True, default=sorted).encode())  # sets alone are no JSON
        for key, tensor in sorted(model.get_adapter_state_dict(name).items()):
            total.update(key.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _identity_of_base(model: PreTrainedModel) -> str:
    folder = Path(model.name_or_path)
    if folder.is_dir():
        total = hashlib.sha256()
        for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
        return f"sha256:{total.hexdigest()}"
    try:
        # transformers no longer says which revision it loaded. It loads what is newest, from the cache of downloads,
        # where a file lies in the folder of its revision.
        downloaded = cached_file(model.name_or_path, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Nothing tells the weights of {model.name_or_path!r} from others, so its responses cannot be kept. Leave "
            "teacher_cache out, or give the teacher as a folder."
        ) from error
    return f"{model.name_or_path}@{Path(downloaded).parent.name}"


class TraceCache:
    """Traces by prompt, for one teacher, one way to sample and one seed."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        *,
        max_new_tokens: int,
        end_tokens: list[int],
        vocabulary_size: int,
        pad_token: int,
        seed: int,
        keep: bool = True,
    ):
        """Open the cache, or make it.

        Args:
            folder: may be shared by runs with any teachers and settings.
            model: the teacher.
            max_new_tokens, end_tokens, vocabulary_size: see :func:`tgpo_lab.sampling.cached_sampling.sample_responses`.
            pad_token: fills rollouts; no part of a trace.
            seed: of the run.
            keep: False leaves no folder behind: it is only proved that the cache can be made.

        Raises:
            InputError: the folder cannot be written, or the teacher has no identity.
        """
        self._settings = {
            "teacher": teacher_identity(model),
            "precision": str(model.dtype).removeprefix("torch."),
            "temperature": 1.0,
            "max_new_tokens": max_new_tokens,
            "end_tokens": sorted(end_tokens),
            "vocabulary_size": vocabulary_size,
            "seed": seed,
        }
        self._limit, self._ends, self._vocabulary_size = max_new_tokens, set(end_tokens), vocabulary_size
        self._pad_token, self._seed = pad_token, seed
        digits = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()[:16]
        try:
            self.folder = require_writable_folder(require_name(Path(folder)) / digits, keep=keep)
        except InputError as error:
            raise InputError(f"teacher_cache: {error}") from error
        if keep:
            write_bytes(self.folder / "about.json", (json.dumps(self._settings, indent=2) + "\n").encode())

    def responses(self, prompts: list[list[int]], samples: int, draw: Draw) -> Rollouts:
        """Traces of prompts, ``samples`` of each: those on disk, and the others from ``draw``, which are then kept.

        Returns:
            Rollouts of len(prompts) × samples rows, groups together, on the CPU.
        """
        known = {self._file(prompt): self._read(prompt, samples) for prompt in prompts}
        missing = list({self._file(p): p for p in prompts if known[self._file(p)] is None}.values())
        if missing:
            drawn = draw(missing, torch.stack([self._numbers(p, i) for p in missing for i in range(samples)]))
            rows = [row[mask].tolist() for row, mask in zip(drawn.responses.cpu(), drawn.mask.cpu(), strict=True)]
            for number, prompt in enumerate(missing):
                known[self._file(prompt)] = traces = rows[number * samples : (number + 1) * samples]
                self._write(prompt, traces)
        every = [trace for prompt in prompts for trace in known[self._file(prompt)][:samples]]
        width = max(map(len, every))
        mask = torch.arange(width) < torch.tensor([[len(trace)] for trace in every])
        return Rollouts(
            [prompt for prompt in prompts for _ in range(samples)],
            torch.tensor([trace + [self._pad_token] * (width - len(trace)) for trace in every]),
            mask,
            torch.tensor([trace[-1] in self._ends for trace in every]),
            self._pad_token,
        )

    def _numbers(self, prompt: list[int], sample: int) -> Tensor:
        """(limit,) uniform numbers of one trace."""
        return torch.rand(self._limit, generator=generator_for(self._seed, "trace", self._file(prompt).stem, sample))

    def _file(self, prompt: list[int]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(prompt).encode()).hexdigest()}.safetensors"

    def _read(self, prompt: list[int], samples: int) -> list[list[int]] | None:
        """The traces of a prompt; None if there are too few, or the file is missing, damaged or another prompt's."""
        try:
            with safe_open(self._file(prompt), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("prompt", "tokens", "lengths")}
                whole = (file.metadata() or {}).get("digest") == _digest(tensors)
        except (SafetensorError, OSError):
            return None
        lengths = tensors["lengths"].tolist()
        if not whole or tensors["prompt"].tolist() != prompt or len(lengths) < samples:
            return None
        return [trace.tolist() for trace in tensors["tokens"].split(lengths)]

    def _write(self, prompt: list[int], traces: list[list[int]]) -> None:
        tensors = {
            "prompt": torch.tensor(prompt),
            "tokens": torch.tensor([token for trace in traces for token in trace]),
            "lengths": torch.tensor([len(trace) for trace in traces]),
        }
        try:
            write_bytes(self._file(prompt), save(tensors, {"digest": _digest(tensors)}))
        except OSError as error:
            raise InputError(
                f"The teacher's responses could not be kept in {self.folder} ({error.strerror}). Make room, or give "
                "another folder as teacher_cache."
            ) from error


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(json.dumps({name: tensors[name].tolist() for name in sorted(tensors)}).encode()).hexdigest()
