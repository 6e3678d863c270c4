"""Where a dataset has its prompts and answers, and how a row of it is read."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

_MISSING = object()


@dataclass(frozen=True)
class PromptColumns:
    """Where prompts and answers stand in a dataset. openai/gsm8k: ``PromptColumns("question", "answer", "####")``."""

    prompt: str = "prompt"
    """Column with the prompt: text, or the messages of a chat with one turn of the user."""
    answer: str = "answer"
    """Column with the right answer."""
    answer_after: str | None = None
    """The answer is what stands after the last of these marks in that column; None for all of it."""
    system_prompt: str | None = None
    """The system message that messages may begin with; None for none."""

    def __post_init__(self) -> None:
        if self.answer_after == "":
            raise InputError("answer_after is empty. Give a mark such as ####, or leave it out for the whole column.")

    def row(self, row: object, place: str) -> dict[str, str]:
        """A row of any dataset as ``{"prompt": …, "answer": …}``, both text. ``a.b`` is the field b of column a,
        where there is no column of that name.

        Raises:
            InputError: a column is missing, holds no text or no answer, or messages that are not one turn of the user.
                ``place`` says where it was.
        """
        columns = (self.prompt, self.answer)
        if not isinstance(row, dict):
            raise InputError(
                f"{place}: expected a JSON object with the keys {columns}, but found {type(row).__name__}."
            )
        texts = {}
        for column, option in zip(columns, ("prompt_column", "answer_column"), strict=True):
            value = _field(row, column)
            if option == "prompt_column" and _is_chat(value):
                value = self._turn_of_the_user(value, f"{place}, {column!r}")
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # what pandas makes of integers with gaps between them
            if not isinstance(value, (str, int)) or isinstance(value, bool) or str(value).strip() == "":
                found = _keys(row, column) if value is _MISSING else f"{column}={value!r}"[:200]
                advice = _advice(value, column, option)
                raise InputError(f"{place}: expected text under the key {column!r}, but found {found}. {advice}")
            texts[column] = str(value)
        return {"prompt": texts[self.prompt], "answer": self._answer(texts[self.answer], place)}

    def _turn_of_the_user(self, messages: list[dict], place: str) -> object:
        """What the user says in a chat. Its system message must be the run's own, which is given apart."""
        roles = [message.get("role") for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise InputError(
                f"{place}: expected one message of the user, after at most one of the system, but found the roles "
                f"{roles}. Leave such rows out, or name another column with prompt_column."
            )
        if len(messages) == 2 and messages[0].get("content") != self.system_prompt:
            raise InputError(
                f"{place}: the system message is {messages[0].get('content')!r}, but system_prompt is "
                f"{self.system_prompt!r}. Set chat_template, and system_prompt to that message."
            )
        return messages[-1].get("content")

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


def _field(row: dict, column: str) -> object:
    """A column's value, or that of a field within one; :data:`_MISSING` if it is not there."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _keys(row: dict, column: str) -> str:
    """The keys that there are where a column, or the first field of it that is missing, was looked for."""
    value, within = row, []
    for name in column.split("."):
        if not isinstance(value.get(name), dict):
            break
        value = value[name]
        within.append(name)
    return f"the keys {sorted(value)}" + (f" in {'.'.join(within)}" if within else "")


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _advice(value: object, column: str, option: str) -> str:
    if value is _MISSING:
        return f"Name the column with {option}."
    if isinstance(value, dict) and value:
        return f"Name one of its fields with {option}, such as {column}.{next(iter(value))}."
    if isinstance(value, float) and value == value:
        return "Write a number that is no integer as text."
    return f"Fill it in, remove the row, or name another column with {option}."
