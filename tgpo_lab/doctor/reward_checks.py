"""The doctor's look at the reward: whether it can judge, and whether a right answer can be right under it."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TrainConfig
from ..tasks.rewards import PLAIN_INTEGER, last_number, reward_function
from .diagnosis import Diagnosis


def check_answers(found: Diagnosis, config: TrainConfig, answers: Sequence[str]) -> None:
    """Whether the reward can read the right answers of all prompts.

    Raises:
        ExaminationEnded: last_number cannot.
    """
    if config.reward == "last_number":
        with found.refused_as("reward"):
            for answer in answers:
                last_number("", answer)
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
