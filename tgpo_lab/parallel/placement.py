"""Where a model computes: on one device or another, with its weights there or on the CPU between its layers' turns."""

from __future__ import annotations

import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel

from ..errors import InputError


def device_of(model: PreTrainedModel) -> torch.device:
    """The device on which a model computes.

    It is asked for where the output embeddings lie, which :func:`offload` leaves in place. ``model.device`` would be
    that of the first weight, and an offloaded one is nowhere (on the device meta) until its module is called.
    """
    return model.get_output_embeddings().weight.device


def usual_device() -> str:
    """Where models compute if nobody says where: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is no such device on this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # CUDA that is not compiled in is an AssertionError
        count = torch.cuda.device_count()
        gpus = "no GPU" if not count else f"the GPUs cuda:0 to cuda:{count - 1}" if count > 1 else "the GPU cuda:0"
        raise InputError(
            f"There is no device {str(name)!r} here: this machine has the device cpu and {gpus}."
        ) from error
    return device


def offload(model: PreTrainedModel, device: str | torch.device) -> None:
    """Keep a model's weights on the CPU and bring each module's to ``device`` while the module computes.

    The output embeddings stay on ``device``: hidden states are projected by them a few positions at a time, and each
    time they would be brought again. So of the model's weights ``device`` holds one V × H matrix and those of the
    module at work. The model must be on the CPU; it is changed in place, by accelerate's hooks.
    """
    cpu_offload(model.base_model, execution_device=torch.device(device))
    model.get_output_embeddings().to(device)
