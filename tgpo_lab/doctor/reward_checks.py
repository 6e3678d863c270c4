"""The doctor's look at the reward: whether it can judge, and whether a right answer can be right under it."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TrainConfig
from ..tasks.rewards import PLAIN_INTEGER, math_verify, require_readable_answers, reward_function
from .diagnosis import Diagnosis

LOOKED_AT = 32
"""Right answers, at most, that are read by a reward which takes its time."""


def check_answers(found: Diagnosis, config: TrainConfig, answers: Sequence[str]) -> None:
    """Whether the reward can read the right answers of all prompts.

    Raises:
        ExaminationEnded: last_number cannot.
    """
    with found.refused_as("reward"):
        require_readable_answers(config.reward, answers)
    if config.reward == "marked_answer":
        unreachable = [answer for answer in answers if not PLAIN_INTEGER.fullmatch(answer)]
        if unreachable:
            found.add(
                "warning", "reward",
                f"marked_answer compares integers, but {len(unreachable)} of {len(answers)} right answers are none, "
                f"such as {unreachable[0][-80:]!r}: no response to those prompts gets a reward.",
                "Choose another reward (last_number, math_verify, exact_match), or say where the answer stands: "
                "--answer-column, --answer-after.",
            )  # fmt: skip
    if config.reward == "math_verify":
        # Each may take seconds; where a column holds something else, it does so in most rows.
        looked = answers[:: -(-len(answers) // LOOKED_AT)]
        unreadable = [answer for answer in looked if not math_verify(f"\\boxed{{{answer}}}", answer)]
        if unreadable:
            found.add(
                "warning", "reward",
                f"math_verify does not find {len(unreadable)} of {len(looked)} right answers equal to themselves, such "
                f"as {unreadable[0][-80:]!r}: it can read no response as equal to them.",
                "Choose another reward (last_number, exact_match), or say where the answer stands: --answer-column, "
                "--answer-after.",
            )  # fmt: skip


def check_reward(found: Diagnosis, config: TrainConfig, responses: Sequence[str], answers: Sequence[str]) -> None:
    """Let the reward judge some responses, and the right answers as if they were responses.

    Training judges only what was not cut; but a response that was cut here, or is wrong, may end there.

    Args:
        found: is added to.
        config: the run.
        responses: texts.
        answers: the right one to each.

    Raises:
        ExaminationEnded: a reward of the user's own raised, or gave no finite number.
    """
    judge = reward_function(config.reward)
    with found.refused_as("reward"):
        for response, answer in zip(responses, answers, strict=True):
            for text in (response, answer):
                judge(text, answer)
