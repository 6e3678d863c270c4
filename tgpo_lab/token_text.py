"""The text of a token, made visible."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


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
    return "".join(VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
