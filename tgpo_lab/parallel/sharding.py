"""Fully sharded data parallelism (FSDP2) of the student: each process keeps a part of its weights, gradients, moments.

A decoder layer's weights are gathered just before it is computed, in the forward and the backward pass. Embeddings,
last norm and output matrix stay gathered from a forward pass to the end of its backward pass, because the loop
projects hidden states to the vocabulary, and differentiates that, between the two. For sampling all weights are
gathered once: gathering them for every token would take many times as long as computing it.

All processes must make the same number of passes through the layers; see
:class:`tgpo_lab.loop.student_pass.StudentPasses`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..errors import InputError


def wants_sharding() -> bool:
    """Whether accelerate was told to use FSDP.

    Raises:
        InputError: in a form that the loop does not know.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("The loop works under FSDP version 2 alone. Start it with accelerate launch --fsdp_version 2.")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise InputError("The loop does not offload under FSDP. Leave --fsdp_offload_params out.")
    return True


def shard(student: PreTrainedModel) -> None:
    """Share out the student's parameters among all processes, in place. Gradients are added up, not averaged.

    Raises:
        InputError: PyTorch is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(f"FSDP needs a newer PyTorch than {torch.__version__}. Install one, or start without FSDP.")
    trunk = student.base_model
    layers = set(getattr(student, "_no_split_modules", None) or ())
    for module in trunk.modules():
        if type(module).__name__ in layers:
            fully_shard(module)
    # The output matrix belongs to the group of the embeddings, with which it may share its weights. It is no part of
    # the trunk, but a group is made of one module and what is below it.
    trunk.add_module("_output", student.get_output_embeddings())
    fully_shard(trunk)
    del trunk._output
    for module in _sharded(student):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    with torch.no_grad():  # the first pass decides which module is the root
        trunk(torch.zeros(1, 1, dtype=torch.long, device=student.device), use_cache=False)
    trunk.reset_iter_state()


@contextmanager
def whole_weights(model: PreTrainedModel) -> Iterator[None]:
    """Context in which each process has all weights of a model, to compute with but not to train. All must enter it."""
    trunk = model.base_model
    if not isinstance(trunk, FSDPModule):
        yield
        return
    trunk.set_reshard_after_forward(False)
    for module in _sharded(model):
        module.unshard()
    try:
        yield
    finally:
        # Shards them again, and forgets the passes that were made: other processes may have made more, or none.
        trunk.reset_iter_state()
        trunk.set_reshard_after_forward(True)
        trunk.set_reshard_after_forward(False, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the form of a parameter: on its device, and sharded if it is. All processes must call it."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors by name, whole and on the CPU; without ``keep`` this process only helps. All processes must call it."""
    seen: dict[int, Tensor] = {}  # tied weights must stay one tensor
    for tensor in tensors.values():
        if id(tensor) not in seen:
            value = whole(tensor.detach())
            seen[id(tensor)] = value.cpu() if keep else value.new_empty(0)
    return {name: seen[id(tensor)] for name, tensor in tensors.items()}


def _sharded(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
