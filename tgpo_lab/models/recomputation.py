"""Gradient checkpointing: activations are computed again in the backward pass, and no number changes."""

from __future__ import annotations

from transformers import PreTrainedModel


def enable_recomputation(model: PreTrainedModel) -> None:
    """Let a model's layers store their inputs alone, once :func:`recompute` has put them into training mode.

    transformers recomputes in training mode only. What such a module does at random there, such as dropout, is switched
    off for good: sampling and the update have to see one policy.
    """
    # The old name warns from transformers 5.23 on, the new one is missing before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for module in model.modules():
        if _recomputes(module):
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)


def recompute(model: PreTrainedModel) -> None:
    """Put the modules that compute their activations again into training mode, and all others into evaluation mode.

    In training mode as a whole, a model with dropout would give other log-probabilities in the update than those under
    which it sampled, and other ones at each pass.
    """
    for module in model.modules():
        module.training = _recomputes(module)


def _recomputes(module: object) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))
