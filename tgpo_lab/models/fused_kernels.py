"""Fused kernels of Liger (arXiv 2410.10989) in a model's layers: root-mean-square norms and gated feed-forward layers.

Each becomes one Triton kernel, which computes the same with fewer passes over the memory of a GPU. Two of Liger's
parts are left out. Its rotary embedding replaces a function for every model of the process, also for those on a CPU,
where Triton does not run. Its losses hold one formula each; :mod:`tgpo_lab.loop.student_pass` takes any loss in chunks.

Tried in Triton's interpreter on a CPU, which computes what the kernels compute (tests/test_fused_kernels.py). It has
not been run on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from transformers import PreTrainedModel

from ..errors import InputError

PARTS = {"rms_norm": True, "swiglu": True, "geglu": True,
         "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}  # fmt: skip
"""What Liger calls its parts, and which of them a model gets."""


def require_fused_kernels(device: torch.device) -> None:
    """Refuse to go on where Liger's kernels cannot run.

    Args:
        device: of the student.

    Raises:
        InputError: Liger is not installed, or ``device`` is no GPU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError("fused_kernels needs the package liger-kernel: pip install 'tgpo-lab[liger]'.")
    if device.type != "cuda":
        raise InputError(f"fused_kernels needs a GPU, but the student is on {device}. Leave fused_kernels out.")


def require_known_to_liger(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose layers Liger has no kernels for.

    Args:
        model: stays as it is.
        name: of the model, for the error.

    Raises:
        InputError: Liger does not know its architecture.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"Liger has no kernels for {name}, whose architecture is {model.config.model_type}. "
            "Leave fused_kernels out."
        )


def fuse_layers(model: PreTrainedModel, name: str) -> None:
    """Put Liger's kernels into the layers of one model, and of no other.

    Args:
        model: changed in place; its weights stay where they are.
        name: of the model, for the error.

    Raises:
        InputError: Liger has no kernels for this architecture.
    """
    from transformers.integrations.liger import apply_liger_kernel

    require_known_to_liger(model, name)
    # Liger also replaces the classes in the architecture's module, so that models made later would have its layers.
    module = sys.modules[type(model).__module__]
    own = dict(vars(module))
    apply_liger_kernel(model, PARTS)
    vars(module).update(own)
