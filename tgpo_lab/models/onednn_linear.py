"""Linear layers whose large float32 products are made by oneDNN, on processors where PyTorch's own choice is slow.

On an x86 CPU PyTorch has Intel's MKL make products in float32. On AMD's processors with AVX-512, MKL uses half of a
vector's width: in one trial (EPYC of the fifth generation, two threads) it made 210 × 10⁹ operations a second, and
oneDNN, which comes with PyTorch, 480. PyTorch hands oneDNN convolutions, and a product is one: of a list of
positions, with a kernel of width 1. Nothing is rounded to fewer digits, and no tensor is copied but the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..provenance import processor_name

LEAST_ROWS, LEAST_MULTIPLY_ADDS = 128, 2**25
"""Of a product that oneDNN makes sooner. A shape that has not been seen costs about 2 ms, forward and backward."""
LARGEST_WEIGHT = 2**23
"""Numbers. oneDNN rearranges the weight for each product, in memory of its own: 32 MiB at most."""


def mkl_is_slow() -> bool:
    """Whether PyTorch makes float32 products with MKL here, on a processor of AMD with AVX-512, and has oneDNN."""
    return (
        processor_name().startswith("AMD")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
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
        # Autocast has oneDNN make the products in bfloat16 in either case, and remembers only whole weights.
        exact = values.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        rows = values.numel() // self.in_features
        if exact and values.device.type == "cpu" and suits_onednn(rows, self.in_features, self.out_features):
            return product_by_onednn(values, self.weight, self.bias)
        return super().forward(values)


def suits_onednn(rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN is likely to make a float32 product (rows, inner) × (inner, columns) sooner than MKL.

    With one thread it is not: PyTorch does not hand it such convolutions then.
    """
    return (
        rows >= LEAST_ROWS
        and rows * inner * columns >= LEAST_MULTIPLY_ADDS
        and inner * columns <= LARGEST_WEIGHT
        and torch.get_num_threads() > 1
    )


def product_by_onednn(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` as a convolution: (…, inputs), (outputs, inputs), (outputs,) → (…, outputs)."""
    rows = values.reshape(-1, values.shape[-1])
    # A picture as high as there are rows and one position wide, whose channels lie side by side in memory.
    picture = rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)
    product = F.conv2d(picture, weight[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(*values.shape[:-1], -1)
