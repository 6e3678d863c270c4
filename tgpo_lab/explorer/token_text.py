"""The text of a token, made visible, and the token of a text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ..errors import InputError

VISIBLE = {"\n": "↵", "\t": "⇥"}


def visible_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Text of one token: spaces as ␣, newlines as ↵, tabs as ⇥, other invisible characters as \\u and their code.

    A token that is only a part of a character, or has no text, is shown as it stands in the vocabulary.
    """
    raw = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.decode([token])
    if raw.startswith("▁"):  # SentencePiece drops the space of a token that stands alone
        text = raw.replace("▁", " ")
    if not text or "\ufffd" in text:
        text = raw
    return printable_text(text).replace(" ", "␣")


def printable_text(text: str) -> str:
    """The text with newlines as ↵, tabs as ⇥ and other invisible characters, such as one that turns the direction of
    writing, as \\u and their code; spaces stay."""
    return "".join(VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def token_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of the one token that has this text.

    Raises:
        InputError: the text is no token, or several.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"{text!r} is {len(ids)} tokens, not one. Give the id or the text of a single token.")
    return ids[0]
