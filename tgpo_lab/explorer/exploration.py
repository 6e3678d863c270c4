"""Responses to prompts under the students of one or more runs, step by step, and branches off them.

The part of the guidance explorer that computes. It needs no browser and no widget:

    exploration = Exploration(pair, [StudentHistory.of_run("runs/tgpo")], ["47+85+12="])
    first = exploration.responses(step=0)[0]
    branch = exploration.take_token(first.name, position=0)  # the teacher's token there
    branch.reward, branch.right_continuations, branch.frame()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.pairs import Pair, require_room
from ..randomness import generator_for
from ..rollouts import Rollouts
from ..sampling.cached_sampling import sample_responses
from ..tasks.rewards import reward_function, score
from .branching import continue_after
from .explored_response import BranchPoint, ExploredResponse
from .guidance_view import advantages_by_prompt, view_guidance
from .student_history import StudentHistory


class Exploration:
    """Responses and branches. Everything is computed when it is first asked for, and kept."""

    def __init__(
        self,
        pair: Pair,
        histories: Sequence[StudentHistory],
        prompts: Sequence[str] = (),
        answers: Sequence[str | None] | None = None,
        *,
        rollouts: Rollouts | None = None,
        samples: int = 8,
        max_new_tokens: int = 80,
        temperature: float = 1.0,
        top_k: int = 8,
        reward: str = "marked_answer",
        seed: int = 0,
    ):
        """Set up; nothing runs yet.

        Args:
            pair: brings the teacher, the tokenizer and, for :meth:`StudentHistory.of_pair`, the student.
            histories: whose students to look at, one or two.
            prompts: prompt texts, unless rollouts are given.
            answers: the right answer to each prompt (or to each row of the rollouts), None where it is not known.
            rollouts: look at these responses and sample none.
            samples: responses to each prompt, a group of GRPO; one if greedy.
            max_new_tokens: responses are cut after so many tokens.
            temperature: divides the student's logits, in sampling and in the loss alike; 0 is greedy.
            top_k: length of the two lists.
            reward: name of the reward.
            seed: decides the samples; every step and every run gets the same random numbers.

        Raises:
            InputError: nothing to look at, impossible numbers, or prompts that leave no room for a response.
        """
        self.pair, self.histories = pair, list(histories)
        self._judge = reward_function(reward)
        if not 1 <= len(self.histories) <= 2:
            raise InputError(f"The explorer shows one run or two side by side, not {len(self.histories)}.")
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise InputError(f"{name} must be 1 or more, but is {value}.")
        if not temperature >= 0:
            raise InputError(f"temperature must be 0 (greedy) or more, but is {temperature}.")
        if not 1 <= top_k <= pair.vocabulary_size:
            raise InputError(f"top_k must be from 1 to the {pair.vocabulary_size} tokens of the pair, but is {top_k}.")
        if rollouts is not None:
            if not len(rollouts) or not bool(rollouts.mask.any(-1).all()):
                raise InputError("There is nothing to look at: the rollouts have no rows, or a row without tokens.")
            prompts = pair.tokenizer.batch_decode(rollouts.prompts)
            max_new_tokens = max(max_new_tokens, rollouts.responses.shape[1])
        elif not prompts:
            raise InputError("There is nothing to look at: give a prompt, rollouts or the folder of a run.")
        answers = [None] * len(prompts) if answers is None else list(answers)
        if len(answers) != len(prompts):
            raise InputError(
                f"There must be one answer for each prompt, but there are {len(prompts)} and {len(answers)}."
            )
        require_room(pair, list(prompts), max_new_tokens)
        repeats = 1 if rollouts is not None or temperature == 0 else samples
        self._given = None if rollouts is None else rollouts.to(pair.teacher.device)
        self.prompts = list(prompts)
        """Texts of the prompts, one for each group of samples or each row of given rollouts."""
        self._prompts = [prompt for prompt in prompts for _ in range(repeats)]
        self._answers = [answer for answer in answers for _ in range(repeats)]
        self.samples, self.max_new_tokens, self.temperature = repeats, max_new_tokens, temperature
        self._continuations = 1 if temperature == 0 else samples
        self._top_k, self._seed = top_k, seed
        self._known: dict[tuple[int, int, int | None], list[ExploredResponse]] = {}
        self.branches: list[ExploredResponse] = []
        """Every branch taken and not undone, oldest first."""

    @property
    def steps(self) -> list[int]:
        """Steps of which at least one run has a student."""
        return sorted({step for history in self.histories for step in history.steps})

    @property
    def samples_anew(self) -> bool:
        """Whether fresh responses can be sampled at every step: not where rollouts were given."""
        return self._given is None

    def responses(self, step: int, written_at: int | None = None) -> list[ExploredResponse]:
        """Responses of each run at a step: a run without a student of that step shows its last one before.

        Args:
            step: of the students that judge.
            written_at: step of the students that wrote them; by default they are sampled afresh at ``step``.

        Raises:
            InputError: damaged checkpoints.
        """
        found = []
        for run, history in enumerate(self.histories):
            judge_step = history.nearest(step)
            writer_step = judge_step if written_at is None else history.nearest(written_at)
            key = (run, judge_step, None if writer_step == judge_step else writer_step)
            if key not in self._known:
                rollouts = None
                if writer_step != judge_step:
                    rollouts = self.responses(written_at)[len(found)].view.rollouts
                self._known[key] = self._look(run, judge_step, rollouts)
            found += self._known[key]
        return found

    def branches_at(self, step: int) -> list[ExploredResponse]:
        """Branches that were taken with the students of a step."""
        shown = {(run, history.nearest(step)) for run, history in enumerate(self.histories)}
        return [branch for branch in self.branches if (branch.run, branch.step) in shown]

    def find(self, name: str, step: int, written_at: int | None = None) -> ExploredResponse:
        """A response or branch of a step by its name.

        Raises:
            InputError: there is none of that name.
        """
        known = {found.name: found for found in [*self.responses(step, written_at), *self.branches_at(step)]}
        if name not in known:
            raise InputError(f"There is no response {name!r} at step {step}: there are {', '.join(known)}.")
        return known[name]

    def take_token(
        self, name: str, position: int, token: int | None = None, *, step: int = 0, written_at: int | None = None
    ) -> ExploredResponse:
        """Write another token at one place and let the student go on from there.

        Args:
            name: of a response or branch.
            position: of the token to replace, from 0.
            token: id of the token to take; by default the teacher's most probable.
            step, written_at: as in :meth:`responses`.

        Returns:
            The branch; its advantage is that of its group with the branch in the place of the sample it comes from.

        Raises:
            InputError: the response, the position or the token does not exist, or it is the token that stands there.
        """
        parent = self.find(name, step, written_at)
        if not 0 <= position < parent.length:
            raise InputError(f"There is no token {position} in this response: it has {parent.length}, counted from 0.")
        if token is None:
            token = int(parent.view.teacher_best[parent.row, position])
        if token == int(parent.view.rollouts.responses[parent.row, position]):
            raise InputError(
                f"Token {position} of {name} is that token already: a branch there would be another sample only. "
                "Choose a place or a token where the two differ."
            )
        history = self.histories[parent.run]
        model = history.student(self.pair, parent.step)
        rollouts = continue_after(
            self.pair,
            parent.view.rollouts,
            parent.row,
            position,
            token,
            max_new_tokens=self.max_new_tokens,
            model=model,
            continuations=self._continuations,
            temperature=self.temperature,
            seed=self._seed,
        )
        rewards = self._rewards(rollouts, [parent.answer] * len(rollouts))
        shown = rollouts.rows(torch.tensor([0], device=rollouts.responses.device))
        method, weight = history.guidance(parent.step)
        view = view_guidance(
            self.pair,
            shown,
            model=model,
            advantages=self._advantage_in_place(parent, rewards[0], step, written_at),
            temperature=self.temperature,
            method=method,
            guidance_weight=weight,
            top_k=self._top_k,
        )
        right = None if parent.answer is None else sum(reward > 0 for reward in rewards)
        taken = [b for b in self.branches if b.run == parent.run]
        number = 1 + max((int(b.name.partition(":b")[2]) for b in taken), default=0)
        branch = replace(
            parent,
            name=f"{parent.run}:b{number}",
            reward=rewards[0],
            view=view,
            row=0,
            branch=BranchPoint(name, position, token, right, len(rollouts)),
        )
        self.branches.append(branch)
        return branch

    def undo_branch(self) -> ExploredResponse | None:
        """Forget the newest branch and return it; None if there is none."""
        return self.branches.pop() if self.branches else None

    def _look(self, run: int, step: int, rollouts: Rollouts | None) -> list[ExploredResponse]:
        history = self.histories[run]
        model = history.student(self.pair, step)
        if rollouts is None:
            rollouts = self._given if self._given is not None else self._sample(model)
        rewards = self._rewards(rollouts, self._answers)
        method, weight = history.guidance(step)
        view = view_guidance(
            self.pair,
            rollouts,
            model=model,
            advantages=advantages_by_prompt(rollouts, torch.tensor([reward or 0.0 for reward in rewards])),
            temperature=self.temperature,
            method=method,
            guidance_weight=weight,
            top_k=self._top_k,
        )
        return [
            ExploredResponse(f"{run}:{row}", run, step, prompt, answer, reward, view, row, self.pair)
            for row, (prompt, answer, reward) in enumerate(zip(self._prompts, self._answers, rewards, strict=True))
        ]

    def _sample(self, model: PreTrainedModel) -> Rollouts:
        return sample_responses(
            model,
            self.pair.encode(self.prompts),
            self.max_new_tokens,
            self.pair.end_tokens,
            self.pair.pad_token,
            samples_per_prompt=self.samples,
            temperature=self.temperature,
            generator=generator_for(self._seed, "explored responses"),
            vocabulary_size=self.pair.vocabulary_size,
        )

    def _rewards(self, rollouts: Rollouts, answers: Sequence[str | None]) -> list[float | None]:
        scores = score(rollouts, [answer or "" for answer in answers], self._judge, self.pair.tokenizer).tolist()
        return [None if answer is None else reward for answer, reward in zip(answers, scores, strict=True)]

    def _advantage_in_place(
        self, parent: ExploredResponse, reward: float | None, step: int, written_at: int | None
    ) -> torch.Tensor:
        sample = parent
        while sample.branch is not None:
            sample = self.find(sample.branch.parent, step, written_at)
        group = [found for found in self.responses(step, written_at) if found.run == parent.run]
        rewards = torch.tensor([found.reward or 0.0 for found in group])
        rewards[sample.row] = reward or 0.0
        return advantages_by_prompt(sample.view.rollouts, rewards)[sample.row : sample.row + 1]
