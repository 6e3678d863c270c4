"""Student/teacher pairs: the shipped ones by name, any other by two paths. Checked when they are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import InputError
from .files import require_name
from .policy import check_projection

_PACKAGE = Path(__file__).resolve().parent
# In a checkout the data stands beside the package, in an installed wheel inside it.
DATA = next((d for d in (_PACKAGE / "data", _PACKAGE.parent / "data") if d.is_dir()), _PACKAGE.parent / "data")


@dataclass
class Pair:
    """A student, its teacher and the tokenizer that both share."""

    name: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    """Ids from this one on are padded rows of a weight matrix, not tokens; they are cut away."""
    end_tokens: list[int]
    prompts: Path | None
    """Folder with the prompts that belong to the pair, if it brings any."""

    @property
    def pad_token(self) -> int:
        """Id that fills places without a token. Masks come from lengths, so any id serves."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens[0]

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of prompt texts, without padding.

        Raises:
            InputError: a prompt without any token.
        """
        encoded = self.tokenizer(list(prompts), add_special_tokens=True, verbose=False)["input_ids"]
        for text, ids in zip(prompts, encoded, strict=True):
            if not ids:
                raise InputError(f"The prompt {text!r} has no tokens. Give a prompt that is not empty.")
        return encoded


def shipped_pairs() -> list[str]:
    """Names of the pairs under ``data/pairs``."""
    return sorted(p.parent.name for p in (DATA / "pairs").glob("*/pair.json"))


def pair_paths(name: str) -> tuple[Path, Path, Path]:
    """Folders of the student, the teacher and the prompts of a shipped pair.

    Raises:
        InputError: no shipped pair has that name.
    """
    file = DATA / "pairs" / name / "pair.json"
    if not file.exists():
        raise InputError(
            f"Unknown pair {name!r}: the shipped ones are {', '.join(shipped_pairs())}. "
            "For another pair give the student's and the teacher's path (or hub name)."
        )
    entry = json.loads(file.read_text())
    return tuple((DATA / entry[key]).resolve() for key in ("student", "teacher", "prompts"))  # type: ignore[return-value]


def load_pair(
    name_or_student_path: str | Path,
    teacher_path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Pair:
    """Load a shipped pair by name, or any pair by the student's and the teacher's path or hub name.

    Args:
        name_or_student_path: ``"near"``, ``"mid"``, ``"far"``, ``"far-fragile"``, or the student.
        teacher_path: the teacher; left out for a shipped pair.
        dtype: of the teacher. The student's weights are float32: small updates vanish in bfloat16.
        device: where both go.

    Raises:
        InputError: unknown pair, a missing or damaged checkpoint, tokenizers or vocabularies that do
            not fit together.
    """
    prompts = None
    if teacher_path is None:
        student_path, teacher_path, prompts = pair_paths(str(name_or_student_path))
        name = str(name_or_student_path)
    else:
        student_path, name = name_or_student_path, f"{name_or_student_path} + {teacher_path}"
    tokenizer = load_tokenizer(student_path)
    vocabulary_size = _shared_vocabulary(tokenizer, load_tokenizer(teacher_path), str(student_path), str(teacher_path))
    student = load_model(student_path, torch.float32, device)
    teacher = load_model(teacher_path, dtype, device).requires_grad_(False)
    for model, path in ((student, student_path), (teacher, teacher_path)):
        rows = model.get_output_embeddings().weight.shape[0]
        if rows < vocabulary_size:
            raise InputError(
                f"{path} has {rows} vocabulary rows, but the tokenizer has {vocabulary_size} tokens: "
                "the checkpoint and the tokenizer do not belong together."
            )
        check_projection(model, str(path))
    return Pair(name, student, teacher, tokenizer, vocabulary_size, _end_tokens(student, tokenizer), prompts)


def require_room(
    pair: Pair, prompts: list[str], max_new_tokens: int, *, model: PreTrainedModel | None = None, prefix: int = 0
) -> None:
    """Refuse prompts that leave no room for the longest response in the longest sequence that a model was made for.

    Args:
        pair: brings the tokenizer and the models.
        prompts: prompt texts, at least one.
        max_new_tokens: responses are cut after so many tokens.
        model: the only model to read them; by default student and teacher do. One that names no limit has none.
        prefix: at most so many tokens stand between a prompt and the response.

    Raises:
        InputError: there is no room, or a prompt has no tokens.
    """
    longest = max(len(tokens) for tokens in pair.encode(prompts))
    models = {"student": pair.student, "teacher": pair.teacher}
    if model is not None:
        models = {"teacher" if model is pair.teacher else "student": model}
    named = {role: getattr(m.config.get_text_config(), "max_position_embeddings", None) for role, m in models.items()}
    limits = {role: limit for role, limit in named.items() if limit is not None and limit > 0}  # −1 for no limit, too
    role = min(limits, key=limits.__getitem__, default="")
    needed = longest + prefix + max_new_tokens
    if limits and needed > limits[role]:
        between = f", a prefix of up to {prefix} tokens" if prefix else ""
        raise InputError(
            f"The longest prompt ({longest} tokens){between} and max_new_tokens ({max_new_tokens}) make {needed}, but "
            f"the {role} was made for at most {limits[role]}. Lower max_new_tokens or leave out long prompts."
        )


def load_model(path: str | Path, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Load a causal language model in evaluation mode: safetensors only, no remote code.

    Raises:
        InputError: nothing there, a damaged file, or an architecture that is not a causal model.
    """
    transformers_logging.disable_progress_bar()  # downloads keep theirs
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if info["missing_keys"]:
            raise InputError(
                f"The weights in {path} lack {sorted(info['missing_keys'])[0]}. Copy the checkpoint again."
            )
    except SafetensorError as error:
        raise InputError(
            f"The weights in {path} are damaged or cut short ({error}). Copy or train the checkpoint again."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(_cannot_load("model", path, error)) from error
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        InputError: nothing there, or not a tokenizer.
    """
    try:
        require_name(Path(path))
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(_cannot_load("tokenizer", path, error)) from error


def _cannot_load(what: str, path: str | Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    try:
        there = Path(path).exists()
    except OSError:
        there = False
    if not there:
        return (
            f"No {what} at {path}: it is neither an existing folder nor a name that could be loaded from the hub "
            f"(shipped pairs: {', '.join(shipped_pairs())}). Check the path, the name and the network."
        )
    return f"The {what} in {path} could not be loaded ({reason}). Expected a Hugging Face folder with safetensors."


def _shared_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_path: str, teacher_path: str
) -> int:
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        token = different[0]
        raise InputError(
            f"The tokenizers differ: {student_path} has {len(ours)} tokens and {teacher_path} has {len(theirs)}; "
            f"{len(different)} disagree, for example {token!r} is {ours.get(token)} in the student and "
            f"{theirs.get(token)} in the teacher. Token-level distillation needs one tokenizer: choose a teacher "
            "with the student's tokenizer."
        )
    return max(ours.values()) + 1


def _end_tokens(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = student.generation_config.eos_token_id if student.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    ends = [e for e in (*ends, tokenizer.eos_token_id) if e is not None]
    if not ends:
        raise InputError(
            f"{tokenizer.name_or_path} names no end-of-sequence token, so a response could never end. "
            "Set eos_token in its tokenizer_config.json."
        )
    return sorted(set(ends))
