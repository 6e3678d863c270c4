"""Student/teacher pairs: the shipped ones by name, any other by two paths. Checked when they are loaded."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from ..allocation_errors import is_out_of_memory
from ..errors import InputError
from ..files import require_name
from ..parallel.placement import require_device
from ..progress_bars import hide_bars_of_weights
from ..tasks.prompt_format import PLAIN, PromptFormat
from .lora import CONFIGURATION
from .onednn_linear import mkl_is_slow, use_onednn
from .policy import check_projection
from .positions import set_positions
from .shared_vocabulary import named_end_tokens, share_vocabulary, shared_end_tokens

_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout the data stands beside the package, in an installed wheel inside it.
DATA = next((d for d in (_PACKAGE / "data", _PACKAGE.parent / "data") if d.is_dir()), _PACKAGE.parent / "data")

LONGEST_REASON = 300
"""Characters of what transformers says that stand in a refusal."""


@dataclass
class Pair:
    """A student, its teacher and the tokenizer that both share."""

    name: str
    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    """V: ids from this one on are padded rows of a weight matrix, or tokens that only one of the two has; they are cut
    away (see :mod:`tgpo_lab.models.shared_vocabulary`)."""
    end_tokens: list[int]
    """Any of these ends a response: those of the student and of the teacher."""
    prompts: Path | None
    """Folder with the prompts that belong to the pair, if it brings any."""
    prompt_format: PromptFormat = PLAIN
    """How prompts are put before the models."""
    student_end_tokens: tuple[int, ...] = ()
    """Those that the student named when it was loaded."""

    @property
    def pad_token(self) -> int:
        """Id that fills places without a token. Masks come from lengths, so any id serves."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens[0]

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of prompt texts, without padding.

        Raises:
            InputError: a prompt without any token, or with one that the teacher's tokenizer lacks.
        """
        encoded = self.prompt_format.encode(self.tokenizer, list(prompts))
        for text, ids in zip(prompts, encoded, strict=True):
            if not ids:
                raise InputError(f"The prompt {text!r} has no tokens. Give a prompt that is not empty.")
            if max(ids) >= self.vocabulary_size:
                stranger = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise InputError(
                    f"The prompt {text!r} becomes {stranger!r} among others ({max(ids)}), which student and teacher "
                    f"do not share: their shared ids end at {self.vocabulary_size}. Change the prompt or its format."
                )
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
    student_dtype: torch.dtype = torch.float32,
    teacher_device: str | torch.device | None = None,
    prompt_format: PromptFormat = PLAIN,
    student_positions: int | None = None,
    student_rope_theta: float | None = None,
) -> Pair:
    """Load a shipped pair by name, or any pair by the student's and the teacher's path or hub name.

    Args:
        name_or_student_path: ``"near"``, ``"mid"``, ``"far"``, ``"far-fragile"``, or the student.
        teacher_path: the teacher; left out for a shipped pair.
        dtype: of the teacher.
        device: where both go, or the student alone.
        student_dtype: of the student. Weights that are trained should be float32: small updates vanish in bfloat16.
        teacher_device: where the teacher goes, if elsewhere; meta loads its configuration without its weights.
        prompt_format: how prompts are put before the models.
        student_positions, student_rope_theta: change the student's rotary positions; see
            :func:`tgpo_lab.models.positions.set_positions`.

    Raises:
        InputError: unknown pair, a missing or damaged checkpoint, tokenizers or vocabularies that do
            not fit together, no such device, a student whose positions cannot be changed.
    """
    device = require_device(device)
    teacher_device = device if teacher_device is None else require_device(teacher_device)
    prompts = None
    if teacher_path is None:
        student_path, teacher_path, prompts = pair_paths(str(name_or_student_path))
        name = str(name_or_student_path)
    else:
        student_path, name = name_or_student_path, f"{name_or_student_path} + {teacher_path}"
    tokenizer, teacher_tokenizer = load_tokenizer(student_path), load_tokenizer(teacher_path)
    shared = share_vocabulary(tokenizer, teacher_tokenizer, str(student_path), str(teacher_path))
    changed = {}
    if student_positions is not None or student_rope_theta is not None:
        changed["config"] = load_configuration(student_path)
        set_positions(changed["config"], student_positions, student_rope_theta, str(student_path))
    student = load_model(student_path, student_dtype, device, **changed)
    if teacher_device.type == "meta":
        teacher = load_without_weights(teacher_path)
    else:
        teacher = load_model(teacher_path, dtype, teacher_device).requires_grad_(False)
    for model, path, own in ((student, student_path, tokenizer), (teacher, teacher_path, teacher_tokenizer)):
        check_vocabulary(model, own, shared.size, str(path))
    own_ends = end_tokens(student, tokenizer, prompt_format)
    teacher_ends = end_tokens(teacher, teacher_tokenizer, prompt_format)
    both = shared_end_tokens(shared.size, own_ends, teacher_ends, (tokenizer, teacher_tokenizer))
    if student.generation_config is not None and both != own_ends:
        _name_ends(student.generation_config, both)
    return Pair(name, student, teacher, tokenizer, shared.size, both, prompts, prompt_format, tuple(own_ends))


def _name_ends(generation: GenerationConfig, ends: list[int]) -> None:
    """Whoever generates with the trained student has to stop there."""
    generation.eos_token_id = ends
    if not generation.do_sample:
        # Without sampling they have no effect, but in a configuration that was changed transformers refuses them.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(generation, name, None) is not None:
                setattr(generation, name, None)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    """Refuse a model that lacks rows of the shared vocabulary, or whose logits this package would compute differently.

    Args:
        model: student or teacher.
        tokenizer: its own.
        size: V.
        name: what messages call the model.

    Raises:
        InputError: it is such a model.
    """
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < size:
        raise InputError(
            f"{name} has {rows} vocabulary rows, but the tokenizer has {len(tokenizer)} tokens: "
            "the checkpoint and the tokenizer do not belong together."
        )
    if model.device.type != "meta":
        check_projection(model, name)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[int]:
    """Ids that end a response of one model: those that it names and, in a chat, the end of the assistant's turn."""
    turn = prompt_format.end_of_turn(tokenizer) if prompt_format.chat_template and tokenizer.chat_template else None
    return sorted({*named_end_tokens(model, tokenizer), *([] if turn is None else [turn])})


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
            f"the {role} was made for at most {limits[role]}. Lower max_new_tokens or leave out long prompts"
            + (", or give the run more student_positions." if role == "student" else ".")
        )


def load_model(
    path: str | Path, dtype: torch.dtype | str, device: str | torch.device | None, **options: object
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode: safetensors only, no remote code.

    Adapters of a checkpoint come with the configurations that they were trained with, where transformers alone would
    take the base's, whose positions and end tokens may be others.

    Args:
        path: folder or hub name.
        dtype: of the weights; "auto" for that of the checkpoint.
        device: where it goes; None leaves it where it was loaded.
        options: further arguments of ``from_pretrained``, such as ``revision`` or ``attn_implementation``.

    Raises:
        InputError: nothing there, a damaged file, an architecture that is not a causal model, or weights whose
            quantisation needs a package that is not installed.
    """
    hide_bars_of_weights()
    if (Path(path) / CONFIGURATION / CONFIG_NAME).is_file():
        options = {"config": load_configuration(path), **options}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
        if info["missing_keys"]:
            raise InputError(
                f"The weights in {path} lack {sorted(info['missing_keys'])[0]}. Copy the checkpoint again."
            )
        if (Path(path) / ADAPTER_CONFIG_NAME).is_file() and (Path(path) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(path))
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"The weights in {path} are damaged or cut short ({error}). Copy or train the checkpoint again."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(_cannot_load("model", path, error)) from error
    model = (model if device is None else model.to(device)).eval()
    if model.device.type == "cpu" and mkl_is_slow():
        use_onednn(model)
    return model


def load_without_weights(path: str | Path) -> PreTrainedModel:
    """A model's shapes and settings on the device meta, which holds no numbers.

    Raises:
        InputError: nothing there, or an architecture that is not a causal model.
    """
    config = load_configuration(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(_cannot_load("configuration", path, error)) from error
    with contextlib.suppress(OSError):  # without that file, the one made from the configuration holds
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Raises:
        InputError: nothing there, or not a tokenizer.
    """
    try:
        require_name(Path(path))
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise InputError(_cannot_load("tokenizer", path, error)) from error


def load_configuration(path: str | Path) -> PretrainedConfig:
    """Load a model's configuration; of adapters, the one that they were trained with.

    Raises:
        InputError: nothing there, or no architecture that is known here.
    """
    adapters = Path(path) / CONFIGURATION
    try:
        folder = adapters if (adapters / CONFIG_NAME).is_file() else path
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(_cannot_load("configuration", path, error)) from error


def _cannot_load(what: str, path: str | Path, error: Exception) -> str:
    first = str(error).strip().split("\n")[0].rstrip(".")
    reason = first if len(first) <= LONGEST_REASON else first[:LONGEST_REASON].rpartition(" ")[0] + " …"
    if isinstance(error, ImportError):  # of quantised weights, or of a tokenizer that is no tokenizer.json
        return (
            f"The {what} of {path} needs a package that is not installed here ({reason}). Install it, or give a model "
            "whose weights are not quantised and whose tokenizer is a tokenizer.json."
        )
    try:
        there = Path(path).exists()
    except OSError:
        there = False
    if not there:
        return (
            f"No {what} at {path}: it is neither an existing folder nor a name that could be loaded from the hub "
            f"({reason}; shipped pairs: {', '.join(shipped_pairs())}). Check the path, the name, the network and, of a "
            "gated model, the login."
        )
    return f"The {what} in {path} could not be loaded ({reason}). Expected a Hugging Face folder with safetensors."
