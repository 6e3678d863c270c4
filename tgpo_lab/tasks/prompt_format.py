"""From a prompt's text to the tokens that a model reads: plain, or as a turn of a chat."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import InputError

PLACE = "{prompt}"


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is put before a model."""

    chat_template: bool = False
    """As the user's turn in the chat template of the student's tokenizer, with the assistant's turn opened."""
    system_prompt: str | None = None
    """System message of the chat; None leaves it to the template, which may have its own."""
    prompt_template: str = PLACE
    """Text around every prompt; ``{prompt}`` stands for it."""
    chat_template_options: tuple[str, ...] = ()
    """What else the chat template is told: ``NAME=VALUE``, with a value in JSON or as text."""

    def __post_init__(self) -> None:
        if PLACE not in self.prompt_template:
            raise InputError(
                f"prompt_template must say where the prompt goes, but {self.prompt_template!r} has no {PLACE}."
            )
        if self.system_prompt is not None and not self.chat_template:
            raise InputError(
                "system_prompt is a message of a chat. Set chat_template as well, or put it in prompt_template."
            )
        if self.chat_template_options and not self.chat_template:
            raise InputError("chat_template_options are of a chat template. Set chat_template as well.")
        taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        for option in self.chat_template_options:
            name, equals, _ = option.partition("=")
            if not equals or not name.isidentifier() or name in taken or name == "messages":
                raise InputError(
                    "chat_template_options must be NAME=VALUE with a name that the template knows, such as "
                    f"enable_thinking=false, but there is {option!r}."
                )

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
        """Token ids of prompts, without padding.

        Raises:
            InputError: a chat template is asked for and there is none, or it cannot be filled.
        """
        texts = [self.text(tokenizer, prompt) for prompt in prompts]
        # A chat template writes every special token that it wants itself.
        return tokenizer(texts, add_special_tokens=not self.chat_template, verbose=False)["input_ids"]

    def text(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
        """What a model reads, as text.

        Raises:
            InputError: a chat template is asked for and there is none, or it cannot be filled.
        """
        # Not str.format: prompts and templates of mathematics are full of braces.
        text = self.prompt_template.replace(PLACE, prompt)
        if not self.chat_template:
            return text
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return self._render(tokenizer, [*system, {"role": "user", "content": text}], add_generation_prompt=True)

    def end_of_turn(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token with which the chat template ends the assistant's turn; None if it ends with ordinary text.

        Raises:
            InputError: there is no template, or it cannot be filled.
        """
        said = "tgpo-lab"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        text = self._render(tokenizer, turns, add_generation_prompt=False)
        after = text.rpartition(said)[2].lstrip()
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        ids = tokenizer.encode(after, add_special_tokens=False)
        return ids[0] if ids and ids[0] in special else None

    def _render(
        self, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, add_generation_prompt: bool
    ) -> str:
        if not tokenizer.chat_template:
            raise InputError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template. Leave chat_template out, or add a "
                "chat_template.jinja to its folder."
            )
        told = dict(_named_value(option) for option in self.chat_template_options)
        try:
            return tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **told
            )
        except Exception as error:  # a template is a program of its author's and may fail as any does
            raise InputError(
                f"The chat template of {tokenizer.name_or_path} cannot be filled ({error}). Leave system_prompt, "
                "chat_template_options or chat_template out."
            ) from error


PLAIN = PromptFormat()
"""The text as it is."""


def _named_value(option: str) -> tuple[str, object]:
    """``enable_thinking=false`` as a name and False; what is not JSON is text."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
