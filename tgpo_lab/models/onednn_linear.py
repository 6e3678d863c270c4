"""Linear layers whose large float32 products are made by oneDNN, on processors where PyTorch's own choice is slow.

On an x86 CPU PyTorch has Intel's MKL make products in float32. On the AMD processor measured here (EPYC of the fifth
generation, two threads) MKL uses half of a vector's width and makes 210 × 10⁹ operations a second; oneDNN, which comes
with PyTorch, makes 480. PyTorch hands oneDNN convolutions, and a product is one: of a list of positions, with a kernel
of width 1. Nothing is rounded to fewer digits.

oneDNN rearranges the weight for each product, in memory of its own: as much as the weight takes in the forward pass,
twice that in the backward pass. And it keeps the code that it makes for a shape, up to about 100 MiB in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..provenance import processor_name

LEAST_ROWS, LEAST_MULTIPLY_ADDS = 128, 2**25
"""Of a product that oneDNN makes sooner, if it has seen the shape: a new one takes about a millisecond more."""
LEAST_NUMBERS = 20_481
"""Of either factor that has the rows: PyTorch makes smaller convolutions of one picture by itself."""
LARGEST_WEIGHT = 2**23
"""Numbers; rearranging a larger weight takes longer than it saves."""
PICTURE_WIDTH = 64
"""Positions in a row of the picture of which a weight's gradient is made. Of a picture one position wide it takes up to
three times as long, if its height has few divisors."""


def mkl_is_slow() -> bool:
    """Whether PyTorch makes float32 products with MKL here, on a processor of AMD with AVX-512, and has oneDNN."""
    return (
        processor_name().startswith("AMD")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def use_onednn(model: nn.Module) -> None:
    """Have a model's linear layers compute as :class:`OneDnnLinear`; weights and names stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what ``torch.nn.Linear`` does and nothing else: neither quantised nor adapted."""
    return type(module) in (nn.Linear, OneDnnLinear)


class OneDnnLinear(nn.Linear):
    """``torch.nn.Linear``, but for rounding."""

    def forward(self, values: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs)."""
        return linear(values, self.weight, self.bias)


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by oneDNN if that suits.

    Args:
        values: (…, inputs).
        weight: (outputs, inputs).
        bias: (outputs,).

    Returns:
        (…, outputs).
    """
    outputs, inputs = weight.shape
    if (
        values.numel() * outputs >= LEAST_MULTIPLY_ADDS  # first what most products of sampling are decided by
        and not torch.compiler.is_compiling()  # a compiler chooses by itself, and cannot read what is asked here
        and values.device.type == "cpu"
        and values.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")  # under which oneDNN makes all products already, in bfloat16
        and suits_onednn(values.numel() // inputs, inputs, outputs)
    ):
        return product_by_onednn(values, weight, bias)
    return F.linear(values, weight, bias)


def suits_onednn(rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN is likely to make a float32 product (rows, inner) × (inner, columns) sooner than MKL.

    With one thread it is not: PyTorch does not hand it such convolutions then.
    """
    return (
        rows >= LEAST_ROWS
        and rows * inner * columns >= LEAST_MULTIPLY_ADDS
        and rows * min(inner, columns) >= LEAST_NUMBERS
        and inner * columns <= LARGEST_WEIGHT
        and torch.get_num_threads() > 1
    )


def product_by_onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What :func:`linear` computes, as a convolution, whether that suits or not."""
    rows = values.reshape(-1, values.shape[-1])
    return _Product.apply(rows, weight, bias).view(*values.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """values · weightᵀ + bias, all gradients by oneDNN as well."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        return _as_convolution(values, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # once for both products
        of_values, of_weight, of_bias = ctx.needs_input_grad
        return (
            _as_convolution(gradient, weight.t()) if of_values else None,
            _gradient_of_weight(values, gradient) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def _as_convolution(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = F.conv2d(_picture(values, 1), weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(len(values), -1)


def _gradient_of_weight(values: Tensor, gradient: Tensor) -> Tensor:
    """gradientᵀ · values: (N, inputs), (N, outputs) → (outputs, inputs)."""
    whole = len(values) - len(values) % PICTURE_WIDTH
    of_rest = gradient[whole:].t() @ values[whole:]
    if not whole:
        return of_rest
    image, upstream = (_picture(x[:whole], PICTURE_WIDTH) for x in (values, gradient))
    return conv2d_weight(image, (*of_rest.shape, 1, 1), upstream).view_as(of_rest) + of_rest


def _picture(values: Tensor, width: int) -> Tensor:
    """(N, channels) → (1, channels, N / width, width), with a position's channels side by side in memory as before."""
    return values.view(1, -1, width, values.shape[1]).permute(0, 3, 1, 2)
