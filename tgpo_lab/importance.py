"""Tokens drawn under other log-probabilities than the update computes, and what to do about it.

A policy gradient is an expectation over tokens drawn from π_old, as the update computes it. An engine draws from
π_engine: the same weights, but other kernels, another order of summation or another precision. So the tokens are off
policy even in the first update of a batch. With the weight π_old(y_t)/π_engine(y_t) a token's term is right in
expectation again, for each prefix; a cap bounds its variance at the price of a bias where the ratio exceeds it
(truncated importance sampling: Ionides 2008; for engines Yao et al. 2025, "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training"; TRL's ``vllm_importance_sampling_mode="token_truncate"``).
"""

from __future__ import annotations

from torch import Tensor


def truncated_importance_weights(logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old(y_t)/π_engine(y_t), cap), detached: (B, T) log-probabilities twice → (B, T).

    Args:
        logprobs: log π_old as the update computes it.
        engine_logprobs: those under which the tokens were drawn.
        cap: largest weight; infinite for none.

    Raises:
        ValueError: the cap is below 1, so that tokens on which both agree would lose weight.
    """
    if not cap >= 1:
        raise ValueError(f"cap must be 1 or more, but is {cap}.")
    return (logprobs - engine_logprobs).detach().exp().clamp(max=cap)
