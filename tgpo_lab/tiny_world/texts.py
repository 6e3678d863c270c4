"""Training texts of the tiny models, as token ids with a loss mask."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .arithmetic import THINK_OPEN, AdditionTask, prompt_text, terse_text, worked_text
from .recipes import StudentRecipe, TeacherRecipe

Tokens = list[int]


@dataclass(frozen=True)
class TextBatch:
    """Padded texts. L is the number of tokens of the longest text."""

    tokens: torch.Tensor
    """(B, L) int64, padded on the right."""
    loss_mask: torch.Tensor
    """(B, L) bool: True where the token is to be predicted."""
    opening_position: torch.Tensor
    """(B,) int64: position at which the worked text opens, or would open."""
    terse_tokens: torch.Tensor
    """(B, V) bool: tokens that a terse response can have at that position (student's texts alone)."""

    def to(self, device: torch.device) -> TextBatch:
        """The same batch there."""
        return TextBatch(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})


class TextSource:
    """Draws training texts for one recipe; the generator decides everything."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: AdditionTask, random: np.random.Generator):
        self.tokenizer, self.task, self.random = tokenizer, task, random
        self.end = tokenizer.eos_token_id
        self.think = tokenizer.convert_tokens_to_ids(THINK_OPEN)
        self.digits = self._encode("0123456789")
        self.terse_words = len(self._encode(terse_text(0))) - 1  # the words before the answer
        self.foreign_error = 15 * 10.0 ** (task.digits - 2)  # standard deviation, in answers that teachers continue
        # Junk is drawn from ordinary tokens: not from padding, end of text or unknown.
        special = set(tokenizer.all_special_ids)
        self.ordinary = np.array([i for i in range(len(tokenizer)) if i not in special])

    def student_batch(self, recipe: StudentRecipe, size: int, after_terse: float = 0.0) -> TextBatch:
        """(B, L) texts, half terse with a noisy answer, half worked without loss on the opening token.

        A share ``after_terse`` of the worked ones follows a terse answer or its beginning, without
        loss on that: so the skill does not hang on the place in the response where it starts.
        """
        rows, cuts = [], []
        for index in range(size):
            prompt, problem = self._prompt()
            noise = round(self.random.normal(0, recipe.answer_noise))
            terse = self._encode(terse_text(max(0, sum(problem) + noise)))
            cut = int(self.random.integers(1, len(terse) + 1)) if self.random.random() < after_terse else 0
            if index % 2:
                rows.append((prompt, [], [*terse, self.end]))
            else:
                worked = self._worked(problem)
                rows.append((prompt, terse[:cut] + worked[:1], worked[1:]))
            cuts.append((len(prompt) + cut, self._terse_tokens(terse, cut, recipe.task)))
        batch = self._pad(rows)
        return replace(
            batch,
            opening_position=torch.tensor([position for position, _ in cuts]),
            terse_tokens=torch.stack([tokens for _, tokens in cuts]),
        )

    def _terse_tokens(self, terse: Tokens, cut: int, task: AdditionTask) -> torch.Tensor:
        """Tokens that can come after ``cut`` tokens of a terse answer: the next word, or digits and the end."""
        possible = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        digits_said = cut - self.terse_words
        if digits_said < 0:
            possible[terse[cut]] = True
        else:
            possible[self.end] = True
            if digits_said < len(str(task.operands * (10**task.digits - 1))):
                possible[self.digits] = True
        return possible

    def teacher_batch(self, recipe: TeacherRecipe, size: int) -> TextBatch:
        """(B, L) texts in worked style, ``foreign_share`` of them after a prefix with no loss on it."""
        kinds = np.array([self._terse_prefix, self._junk_prefix, self._slip_prefix])
        shares = np.array([recipe.terse_prefix, recipe.junk_prefix, recipe.slip_prefix])
        rows = []
        for _ in range(size):
            prompt, problem = self._prompt()
            if self.random.random() < recipe.foreign_share:
                kind = kinds[self.random.choice(len(kinds), p=shares / shares.sum())]
                prefix, continuation = kind(problem)
            else:
                prefix, continuation = [], self._worked(problem)
            rows.append((prompt, prefix, continuation))
        return self._pad(rows)

    def terse_starts(self, size: int) -> tuple[list[Tokens], list[str]]:
        """Prompts followed by the beginning of a terse answer, as a student would write it, and the right answers."""
        starts, answers = [], []
        for _ in range(size):
            prompt, problem = self._prompt()
            starts.append(prompt + self._terse_prefix(problem)[0])
            answers.append(str(sum(problem)))
        return starts, answers

    def _terse_prefix(self, problem: tuple[int, ...]) -> tuple[Tokens, Tokens]:
        error = 0 if self.random.random() < 0.3 else round(self.random.normal(0, self.foreign_error))
        said = self._encode(terse_text(max(0, sum(problem) + error)))
        right = self._encode(terse_text(sum(problem)))
        cut = int(self.random.integers(1, len(said) + 1))
        # It finishes the terse answer as well as it can in its head, to the right number of digits (it cannot know
        # that a number has ended), and then checks it in writing. Were its answer to every foreign prefix "start
        # over", guidance would teach that one token everywhere.
        return said[:cut], right[cut:] + self._worked(problem)

    def _junk_prefix(self, problem: tuple[int, ...]) -> tuple[Tokens, Tokens]:
        junk = self._random_tokens(int(self.random.integers(1, 13)))
        if self.random.random() < 0.5:
            said = self._encode(terse_text(max(0, sum(problem) + int(self.random.normal(0, self.foreign_error)))))
            said = said[: int(self.random.integers(1, len(said) + 1))]
            where = int(self.random.integers(0, len(said) + 1))
            junk = said[:where] + junk[: int(self.random.integers(1, 4))] + said[where:]
        return junk, self._worked(problem)

    def _slip_prefix(self, problem: tuple[int, ...]) -> tuple[Tokens, Tokens]:
        worked = self._worked(problem)
        cut = int(self.random.integers(2, len(worked)))
        prefix = worked[:cut]
        for _ in range(int(self.random.integers(1, 4))):
            where = int(self.random.integers(1, cut))
            token = prefix[where]
            if self.tokenizer.convert_ids_to_tokens(token).isdigit() and self.random.random() < 0.7:
                token = self._encode(str(self.random.integers(0, 10)))[0]
            else:
                token = self._random_tokens(1)[0]
            prefix[where] = token
        return prefix, worked[cut:]

    def _prompt(self) -> tuple[Tokens, tuple[int, ...]]:
        problem = self.task.draw(self.random, "train")
        return self._encode(prompt_text(problem)), problem

    def _worked(self, problem: tuple[int, ...]) -> Tokens:
        return [*self._encode(worked_text(problem)), self.end]

    def _encode(self, text: str) -> Tokens:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _random_tokens(self, count: int) -> Tokens:
        return self.random.choice(self.ordinary, size=count).tolist()

    def _pad(self, rows: list[tuple[Tokens, Tokens, Tokens]]) -> TextBatch:
        longest = max(len(p) + len(x) + len(c) for p, x, c in rows)
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (prompt, prefix, continuation) in enumerate(rows):
            start = len(prompt) + len(prefix)
            end = start + len(continuation)
            tokens[i, :end] = torch.tensor(prompt + prefix + continuation)
            mask[i, start:end] = True
        opening = torch.tensor([len(prompt) for prompt, _, _ in rows])
        return TextBatch(tokens, mask, opening, torch.zeros(len(rows), len(self.tokenizer), dtype=torch.bool))
