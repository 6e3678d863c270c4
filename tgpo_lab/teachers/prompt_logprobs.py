"""What an OpenAI-compatible server says about the tokens of a prompt: the request, and the check of what comes back.

The form is that of vLLM's completions with ``prompt_logprobs``: the class CompletionRequest in
https://docs.vllm.ai/en/latest/api/vllm/entrypoints/openai/completion/protocol/ lists the fields of the request,
CompletionResponseChoice those of the answer. (OpenAI's own ``echo`` with ``logprobs`` names tokens by their text, which
two tokens can share; SGLang's ``input_top_logprobs`` belongs to an interface of its own.)

    sent        {"model": …, "prompt": [3, 14, 15], "prompt_logprobs": 1, "max_tokens": 1, …}
    answered    {"choices": [{"prompt_logprobs": [null, {"14": {"logprob": -0.2, "rank": 1, …}},
                                                  {"15": {"logprob": -4.0, "rank": 7, …}, "9": {"logprob": …}}], …}]}

Entry t holds the k most probable tokens after the prefix of t tokens and, beside them if it is not among them, the
token that stands in the prompt. Tokens are ids in both directions, so no text is ever cut into tokens again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RunError

NOT_A_PROBABILITY = 1e-3
"""Nats above 0, and excess of a sum of probabilities over 1, that are still rounding."""


class TeacherServerError(RunError):
    """A teacher's server failed, or answered with what makes no sense."""


@dataclass(frozen=True)
class PrefixAnswer:
    """What the server says after one prefix."""

    logprob: float
    """Of the token that stands in the prompt, in nats."""
    top: list[tuple[int, float]]
    """The most probable tokens with their log-probabilities, most probable first; of equal ones the lowest id."""

    def within(self, vocabulary_size: int) -> PrefixAnswer:
        """The same with tokens from ``vocabulary_size`` on cut away, as a local teacher's are.

        The others are divided by 1 − (probability of the listed tokens that were cut). What is cut but not listed
        stays unknown; no single token of it is as probable as the last one listed.
        """
        cut = sum(math.exp(logprob) for token, logprob in self.top if token >= vocabulary_size)
        gained = -math.log1p(-min(cut, 1 - 1e-6))
        kept = [(token, logprob + gained) for token, logprob in self.top if token < vocabulary_size]
        return PrefixAnswer(self.logprob + gained, kept)


def completion_request(model: str, tokens: list[int], count: int) -> dict:
    """The body of a request for the ``count`` most probable tokens after every prefix of ``tokens``."""
    return {
        "model": model,
        "prompt": tokens,
        "prompt_logprobs": count,
        "max_tokens": 1,  # 0 is refused without echo; what is written is not looked at
        "temperature": 1.0,  # a server's own default may be another, and some divide by it here too
        "return_token_ids": True,
    }


def read_completion(answer: object, tokens: list[int], start: int, count: int) -> list[PrefixAnswer]:
    """Check an answer and take what it says about the positions from ``start`` on.

    Args:
        answer: the server's answer, parsed from JSON.
        tokens: what was sent.
        start: first position of interest, at least 1: nothing stands before token 0.
        count: number of most probable tokens that were asked for.

    Returns:
        ``len(tokens) − start`` answers.

    Raises:
        TeacherServerError: the answer has another form, is of other tokens, or its numbers are no log-probabilities.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    entries = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if not isinstance(entries, list):
        raise _nonsense("no choices[0].prompt_logprobs", "it must serve completions with prompt_logprobs, as vLLM does")
    echoed = choice.get("prompt_token_ids")
    if len(entries) != len(tokens) or (echoed is not None and echoed != tokens):
        raise _nonsense(
            f"{len(entries)} positions for a prompt of {len(tokens)} tokens"
            if len(entries) != len(tokens)
            else "another prompt than the one that was sent",
            "it must not cut prompts short, nor add tokens to them",
        )
    return [_read_entry(entries[position], tokens[position], count) for position in range(start, len(tokens))]


def _read_entry(entry: object, token: int, count: int) -> PrefixAnswer:
    try:
        found = {int(key): float(value["logprob"]) for key, value in entry.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _nonsense(
            f"a position that is no table of log-probabilities ({error!r})", "see what it serves"
        ) from error
    if token not in found or len(found) < count or min(found) < 0:
        raise _nonsense(
            f"the tokens {sorted(found)[:4]} where token {token} was sent and {count} tokens were asked for",
            "the token that was sent must always be among them",
        )
    if not all(math.isfinite(value) for value in found.values()):
        raise _nonsense("a log-probability that is not finite", "look for overflow in its precision, or at its weights")
    total = sum(math.exp(min(value, 1.0)) for value in found.values())
    if max(found.values()) > NOT_A_PROBABILITY or total > 1 + len(found) * NOT_A_PROBABILITY:
        raise _nonsense(
            f"numbers up to {max(found.values()):.3g} as log-probabilities, which make a probability of {total:.3g}",
            "it may be set to give logits (vLLM's --logprobs-mode); it must give raw_logprobs",
        )
    top = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    # One more than asked for: the sampled token, which is then less probable than all that were asked for, and others
    # that were not listed may stand between.
    return PrefixAnswer(found[token], top[:count])


def _nonsense(what: str, advice: str) -> TeacherServerError:
    return TeacherServerError(f"The teacher's server answered with {what}; {advice}.")
