"""Where a dataset has its prompts and answers, and how a row of it is read."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class PromptColumns:
    """Where prompts and answers stand in a dataset. openai/gsm8k: ``PromptColumns("question", "answer", "####")``."""

    prompt: str = "prompt"
    """Column with the prompt text."""
    answer: str = "answer"
    """Column with the right answer."""
    answer_after: str | None = None
    """The answer is what stands after the last of these marks in that column; None for all of it."""

    def __post_init__(self) -> None:
        if self.answer_after == "":
            raise InputError("answer_after is empty. Give a mark such as ####, or leave it out for the whole column.")

    def row(self, row: object, place: str) -> dict[str, str]:
        """A row of any dataset as ``{"prompt": …, "answer": …}``, both text.

        Raises:
            InputError: a column is missing, holds no text or no answer. ``place`` says where it was.
        """
        columns = (self.prompt, self.answer)
        if not isinstance(row, dict):
            raise InputError(
                f"{place}: expected a JSON object with the keys {columns}, but found {type(row).__name__}."
            )
        texts = {}
        for column, option in zip(columns, ("prompt_column", "answer_column"), strict=True):
            value = row.get(column)
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # what pandas makes of integers with gaps between them
            if not isinstance(value, (str, int)) or isinstance(value, bool) or str(value).strip() == "":
                found = f"{column}={value!r}"[:200] if column in row else f"the keys {sorted(row)}"
                advice = _advice(row, column, option)
                raise InputError(f"{place}: expected text under the key {column!r}, but found {found}. {advice}")
            texts[column] = str(value)
        return {"prompt": texts[self.prompt], "answer": self._answer(texts[self.answer], place)}

    def _answer(self, text: str, place: str) -> str:
        if self.answer_after is None:
            return text
        _, mark, answer = text.rpartition(self.answer_after)
        if not mark or not answer.strip():
            raise InputError(
                f"{place}: expected the answer after {self.answer_after!r} under the key {self.answer!r}, but found "
                f"{text[-60:]!r}. Change answer_after, or leave it out where the column holds the answer alone."
            )
        return answer.strip()


def _advice(row: dict, column: str, option: str) -> str:
    value = row.get(column)
    if column not in row:
        return f"Name the column with {option}."
    if isinstance(value, list) and any(isinstance(message, dict) for message in value):
        return (
            "Chat messages are not read: put the user's message there as text and set chat_template, and system_prompt "
            "for a system message."
        )
    if isinstance(value, float) and value == value:
        return "Write a number that is no integer as text."
    return f"Fill it in, remove the row, or name another column with {option}."
