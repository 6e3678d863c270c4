"""One response that is looked at, with its numbers, and the branch that it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from ..models.pairs import Pair
from .guidance_view import GuidanceView
from .token_text import visible_text


@dataclass(frozen=True)
class BranchPoint:
    """Where a branch leaves its parent."""

    parent: str
    """Name of the response it leaves."""
    position: int
    """Of the token that was replaced, from 0."""
    token: int
    """Id of the token that was taken."""
    right_continuations: int | None
    """How many of the student's continuations got a reward above 0; None where the answer is not known."""
    continuations: int
    """How many were sampled. The first is the branch that is shown."""


@dataclass(frozen=True)
class ExploredResponse:
    """One response with its numbers."""

    name: str
    """Unique: ``0:3`` is sample 3 of the first run, ``0:b1`` the first branch there."""
    run: int
    """Index of the run (the pair's own student is run 0)."""
    step: int
    """Step of the run's student that wrote or judges it."""
    prompt: str
    answer: str | None
    """The right answer, where it is known."""
    reward: float | None
    """None where the answer is not known."""
    view: GuidanceView
    row: int
    """Its row in the view."""
    pair: Pair
    branch: BranchPoint | None = None

    @property
    def length(self) -> int:
        """Number of response tokens."""
        return int(self.view.rollouts.lengths[self.row])

    @property
    def finished(self) -> bool:
        """It ended by itself and was not cut at the token limit."""
        return bool(self.view.rollouts.finished[self.row])

    @property
    def text(self) -> str:
        """The response as text, without the token that ended it."""
        return self.view.rollouts.rows(torch.tensor([self.row])).texts(self.pair.tokenizer)[0]

    @property
    def right_continuations(self) -> int | None:
        """See :class:`BranchPoint`; None for a response that is no branch."""
        return self.branch.right_continuations if self.branch else None

    def summary(self) -> dict[str, object]:
        """One row of a table of responses.

        ``response`` (its name), ``run``, ``step``, ``prompt``, ``text``, ``answer``, ``reward``, ``length`` in tokens
        and ``finished``; for a branch ``parent``, ``position``, ``taken`` (the token's text), ``right_continuations``
        and ``continuations``, None for another response.
        """
        branch = self.branch
        return {
            "response": self.name,
            "run": self.run,
            "step": self.step,
            "prompt": self.prompt,
            "text": self.text,
            "answer": self.answer,
            "reward": self.reward,
            "length": self.length,
            "finished": self.finished,
            "parent": branch.parent if branch else None,
            "position": branch.position if branch else None,
            "taken": visible_text(self.pair.tokenizer, branch.token) if branch else None,
            "right_continuations": self.right_continuations,
            "continuations": branch.continuations if branch else None,
        }

    def frame(self, positions: Sequence[int] | None = None) -> pd.DataFrame:
        """Its tokens as a table, see :meth:`GuidanceView.frame`.

        Raises:
            InputError: a position does not exist.
        """
        return self.view.frame(self.pair, self.row, None if positions is None else list(positions))
