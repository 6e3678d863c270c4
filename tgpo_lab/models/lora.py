"""Low-rank adapters through peft (LoRA, arXiv 2106.09685): W + (α/r)·B·A, with W frozen and r small.

The adapters are put INTO the student's layers, so that it stays a model of its own class for sampling and loss. Only
they are trained: gradients, optimiser state and checkpoints have their size. They are float32 whatever W is.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import InputError
from ..randomness import derived_seed

CONFIGURATION = "configuration"
"""Folder of the configuration in a checkpoint that holds adapters alone."""
ADAPTER = "adapter"
"""Folder of the adapters in a checkpoint that holds the merged model."""


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora_rank above 0 needs the package peft: pip install 'tgpo-lab[lora]'.")


def add_adapters(student: PreTrainedModel, rank: int, alpha: float, seed: int) -> None:
    """Put new adapters on every linear layer but the output layer, and freeze all else. B is zero: nothing changes yet.

    Args:
        student: changed in place.
        rank: r.
        alpha: α; the adapters' product is scaled by α/r.
        seed: decides A.
    """
    from peft import LoraConfig

    student.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "adapters"))
        student.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
        )
    _as_trained(student)
    base = Path(student.name_or_path)
    if base.is_dir():  # the checkpoint refers to it, from wherever it will be read
        student.peft_config["default"].base_model_name_or_path = str(base.resolve())


def load_adapters(student: PreTrainedModel, checkpoint: Path) -> None:
    """Put a checkpoint's adapters into a student that has none, to be trained on."""
    student.requires_grad_(False)
    folder = checkpoint / ADAPTER if (checkpoint / ADAPTER).is_dir() else checkpoint
    student.load_adapter(str(folder), is_trainable=True)
    _as_trained(student)


def save_adapters(student: PreTrainedModel, folder: Path) -> None:
    """Write the adapters and, in ``folder/configuration``, the configuration that they were trained with: the base may
    have other positions. Beside the adapters, transformers would take it for that of a whole model."""
    student.save_pretrained(folder)
    student.config.save_pretrained(folder / CONFIGURATION)


def save_merged(student: PreTrainedModel, folder: Path) -> None:
    """Write W + (α/r)·B·A as an ordinary model, and the adapters themselves in ``folder/adapter`` for a resume.

    The base is loaded once more for it, on the CPU, because merging cannot be undone without rounding.
    """
    from peft import PeftModel

    save_adapters(student, folder / ADAPTER)
    base = AutoModelForCausalLM.from_pretrained(
        student.peft_config["default"].base_model_name_or_path, config=student.config,
        dtype=student.dtype, use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that peft uses and transformers gives up
        merged = PeftModel.from_pretrained(base, str(folder / ADAPTER)).merge_and_unload()
    merged.generation_config = student.generation_config
    merged.save_pretrained(folder)


def _as_trained(student: PreTrainedModel) -> None:
    student.eval()  # new modules are in training mode
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(student.device, torch.float32)
