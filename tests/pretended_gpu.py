"""A device cuda:0 on a machine without one: tensors that compute on the CPU and say that they are on a GPU.

An operation that gets tensors of both devices raises :class:`MixedDevices`, by PyTorch's own rules: a tensor without
dimensions goes with any device, indices may be on the CPU, and ``copy_`` copies from anywhere. What it cannot show are
numbers of a GPU, missing kernels, memory and streams. Such a tensor can be no part of inference mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
# Of these the first tensor decides; the others may lie on the CPU.
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """One operation got tensors of both devices."""


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; ``held`` is the one on the CPU that computes."""

    held: torch.Tensor
    device = GPU
    is_cuda, is_cpu = True, False

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor):
        """Take over ``held``, which has no gradient."""

    def __repr__(self, **_: object) -> str:
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        options = options or {}
        flat = [x for x in tree_flatten((arguments, options))[0] if isinstance(x, torch.Tensor)]
        ours = {id(x.held): x for x in flat if isinstance(x, cls)}
        elsewhere = [x for x in flat if not isinstance(x, cls) and x.ndim]
        if operation is _aten.stack.default:  # the backward pass of unbind, whose missing gradients the engine makes
            elsewhere = [x for x in elsewhere if bool(x.any())]
        if operation in _INDEXING:
            values = arguments[2:3] if operation is not _aten.index.Tensor else ()
            decisive = [x for x in (arguments[0], *values) if x.ndim]
            mixed = len({isinstance(x, cls) for x in decisive}) > 1 or not isinstance(arguments[0], cls)
        else:
            mixed = bool(elsewhere) and operation is not _aten.copy_.default
        if mixed:
            shapes = [(tuple(x.shape), "cuda" if isinstance(x, cls) else "cpu") for x in flat]
            raise MixedDevices(f"{operation}: {shapes}")

        def held(x: object) -> object:
            return x.held if isinstance(x, cls) else x

        options = {k: v for k, v in options.items() if k != "device"}
        result = operation(*tree_map(held, arguments), **tree_map(held, options))
        if operation is _aten.copy_.default and not isinstance(arguments[0], cls):
            return arguments[0]
        return tree_map(
            lambda x: (ours[id(x)] if id(x) in ours else cls(x)) if isinstance(x, torch.Tensor) else x, result
        )


class _Move(torch.autograd.Function):
    """From one device to the other, with its gradient the other way."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.held.clone() if isinstance(tensor, OnGPU) else OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Move.apply(gradient)


class _Functions(TorchFunctionMode):
    """What makes or moves tensors by the name of a device."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        name = getattr(function, "__name__", "")
        if function is torch.Tensor.device.__get__ and isinstance(arguments[0], OnGPU):
            return GPU
        if name in ("to", "cpu", "cuda", "tolist", "numpy") and arguments and isinstance(arguments[0], torch.Tensor):
            return self._moved(name, arguments, options, function)
        device = options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            made = function(*tree_map(_held, arguments), **{**options, "device": "cpu"})
            wanted = made.requires_grad
            return OnGPU(made.detach()).requires_grad_(wanted)
        return function(*arguments, **options)

    def _moved(self, name: str, arguments: tuple, options: dict, function) -> object:
        tensor, *rest = arguments
        if name in ("tolist", "numpy"):
            return function(tensor.detach().held if isinstance(tensor, OnGPU) else tensor, *rest, **options)
        target = {"cpu": torch.device("cpu"), "cuda": GPU}.get(name) or options.pop("device", None)
        kept = []
        for x in rest if name == "to" else ():
            if isinstance(x, torch.Tensor):
                target = x.device
                kept.append(x.dtype)
            elif isinstance(x, str | torch.device):
                target = torch.device(x)
            elif isinstance(x, torch.dtype):
                kept.append(x)
        if target is not None and (torch.device(target).type == "cuda") != isinstance(tensor, OnGPU):
            tensor = _Move.apply(tensor)
        return tensor.to(*kept, **options) if name == "to" and (kept or options) else tensor


def _held(x: object) -> object:
    return x.held if isinstance(x, OnGPU) else x


def moved_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights and buffers on the GPU, in place; tied ones stay one."""
    seen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, OnGPU):
                if id(parameter) not in seen:
                    made = torch.nn.Parameter(OnGPU(parameter.detach()), requires_grad=parameter.requires_grad)
                    seen[id(parameter)] = made
                module._parameters[name] = seen[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, OnGPU):
                module._buffers[name] = OnGPU(buffer)
    return model


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Context in which there is a device cuda:0, for what runs in this thread."""
    with _Functions():
        yield GPU
