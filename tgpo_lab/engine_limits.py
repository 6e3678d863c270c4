"""What a run may not ask of the engine that samples the student's responses."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import InputError


def require_possible_engine(
    engine: str,
    temperatures: Mapping[str, float],
    *,
    importance_cap: float | None,
    compile_decoding: bool,
    vllm_memory_share: float,
    vllm_sleep: bool,
) -> None:
    """Refuse options that are none, or are the other engine's.

    Args:
        engine: of a run.
        temperatures: those that it samples at, by the name of their option.
        importance_cap, compile_decoding, vllm_memory_share, vllm_sleep: options of the run.

    Raises:
        InputError: names the option.
    """
    if engine not in ("own", "vllm"):
        raise InputError(f"engine must be own or vllm, but is {engine!r}.")
    if importance_cap is not None and not importance_cap >= 1:
        raise InputError(
            f"importance_cap must be 1 or more (inf for no cap), but is {importance_cap}: a smaller one would "
            "shrink terms of tokens on which engine and update agree."
        )
    if not 0 < vllm_memory_share <= 1:
        raise InputError(f"vllm_memory_share must be above 0 and at most 1, but is {vllm_memory_share}.")
    if engine == "vllm" and compile_decoding:
        raise InputError("compile_decoding is an option of the own engine, but engine is vllm. Leave one out.")
    for name, value in temperatures.items():
        if engine == "vllm" and value and not 0.01 <= value <= 2:
            raise InputError(f"{name} must be from 0.01 to 2 with vllm, which takes no other, but is {value}.")
    if engine == "own" and vllm_sleep:
        raise InputError(
            "vllm_sleep is an option of vllm, but engine is own. Set engine to vllm, or leave vllm_sleep out."
        )
