"""The tokenizer of the tiny world: one token per word, digit or sign, 2,048 tokens in all.

Most tokens are words that the task never uses. They are there on purpose: with a vocabulary of 250
random exploration finds the teacher's tokens quickly and reverse KL repairs itself, so the size of
the vocabulary is part of the divergence.

The filler words are from the EFF large word list (Electronic Frontier Foundation, CC BY 3.0 US).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .arithmetic import ANSWER_MARK, COLUMN_NAMES, THINK_CLOSE, THINK_OPEN

VOCABULARY_SIZE = 2048
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"

# A word or sign carries the space before it, like the byte-level tokenizers of real models; digits
# are single tokens. Nothing is dropped, so decoding gives back the text that was encoded.
TOKEN_PATTERN = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer(words_file: str | Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from a file of filler words, one a line.

    Raises:
        ValueError: the file has too few words to fill the vocabulary.
    """
    task_words = [f" {w}" for w in ("the", "sum", "is", "write", "carry", *COLUMN_NAMES)]
    signs = ["+", "=", ";", " ", "\n", "-", "*", "?", ".", ",", ":", ANSWER_MARK, f" {ANSWER_MARK}"]
    tokens = [PAD, END, UNKNOWN, THINK_OPEN, THINK_CLOSE, *"0123456789", *signs, *task_words]
    for word in Path(words_file).read_text().split():
        if len(tokens) == VOCABULARY_SIZE:
            break
        if f" {word}" not in task_words:
            tokens.append(f" {word}")
    if len(tokens) < VOCABULARY_SIZE:
        raise ValueError(
            f"{words_file} has too few words: {len(tokens)} of {VOCABULARY_SIZE} tokens filled. Add words, one a line."
        )

    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, END, UNKNOWN])
    # Not special: a response keeps them when it is decoded with skip_special_tokens.
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in (THINK_OPEN, THINK_CLOSE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
