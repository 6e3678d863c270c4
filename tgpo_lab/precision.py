"""The two precisions of a run, float32 and bfloat16, in PyTorch's terms."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def dtype_of(precision: Precision) -> torch.dtype:
    """Type of weights in that precision."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def products_in(precision: Precision, device: torch.device) -> torch.autocast:
    """Context in which products on ``device`` are made in that precision, whatever the weights are stored in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
