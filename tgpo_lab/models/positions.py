"""A student for longer sequences than it was published for: more positions, and rotary frequencies to go with them."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from ..errors import InputError


def require_possible_positions(positions: int | None, theta: float | None, max_new_tokens: int) -> None:
    """Refuse numbers that no student could have.

    Args:
        positions: ``student_positions`` of a run.
        theta: ``student_rope_theta`` of a run.
        max_new_tokens: tokens of its longest response.

    Raises:
        InputError: positions that leave no room for a prompt, or a base that is no positive number.
    """
    if positions is not None and positions <= max_new_tokens:
        raise InputError(
            f"student_positions must be above max_new_tokens ({max_new_tokens}), to hold a prompt as well, but is "
            f"{positions}."
        )
    if theta is not None and not (theta > 0 and math.isfinite(theta)):
        raise InputError(f"student_rope_theta must be a finite number above 0, but is {theta}.")


def set_positions(config: PretrainedConfig, positions: int | None, theta: float | None, name: str) -> None:
    """Give a configuration other positions, in place, before a model is made from it.

    The frequencies of a rotary embedding of width d are θ^(−2i/d), i = 0 … d/2 − 1 (RoPE, arXiv 2104.09864). A larger θ
    turns all but the first more slowly, so that greater distances stay within angles that the model has seen.

    Args:
        config: of a causal language model.
        positions: tokens of the longest sequence; None leaves them.
        theta: θ; None leaves it.
        name: what messages call the model.

    Raises:
        InputError: its positions are not rotary, or several θ stand in it.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" not in rotary:
        why = "has several kinds of them" if rotary else "has none: more positions would need weights of their own"
        raise InputError(
            f"student_positions and student_rope_theta change rotary positions with one base, but {name} {why}. Leave "
            "both out."
        )
    if positions is not None:
        text.max_position_embeddings = positions
    if theta is not None:
        text.rope_parameters = {**rotary, "rope_theta": float(theta)}


def position_settings(config: PretrainedConfig) -> dict[str, object]:
    """What :func:`set_positions` changes, as the fields of a configuration file."""
    text = config.get_text_config()
    return {"max_position_embeddings": text.max_position_embeddings, "rope_parameters": dict(text.rope_parameters)}
