"""The doctor's look at a teacher behind a server, in place of looks at its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..config import TrainConfig
from ..models.pairs import Pair
from ..models.shared_vocabulary import PROBES
from ..rollouts import Rollouts
from ..teachers.sources import longest_sequence, server_of
from .diagnosis import Diagnosis


def check_server(
    found: Diagnosis, config: TrainConfig, pair: Pair, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> None:
    """Reach the server, compare its tokenizer with the teacher's, and ask how the teacher opens.

    Args:
        found: is added to.
        config: the run.
        pair: loaded without the teacher's weights.
        tokenizer: the teacher's, as loaded here.
        prompts: some that the run will ask about.

    Raises:
        InputError: the server cannot answer for this run.
        TeacherServerError: it has failed since it was examined.
    """
    server = server_of(config, pair)
    name = server.check(longest_sequence(config, pair, prompts), config.method.top_k)
    found.add("ok", "teacher server", f"{server.url} serves {name!r} and gives log-probabilities of prompts.")
    theirs = server.texts_to_tokens(list(PROBES))
    if theirs is None:
        found.add(
            "warning", "teacher server",
            "It does not say how it cuts texts into tokens, so its tokenizer was not compared.",
            f"See yourself that it serves {tokenizer.name_or_path}.",
        )  # fmt: skip
    else:
        ours = [tokenizer.encode(text, add_special_tokens=False) for text in PROBES]
        if differing := [text for text, one, two in zip(PROBES, ours, theirs, strict=True) if one != two]:
            found.add(
                "refused", "teacher server",
                f"It cuts {differing[0]!r} into other tokens than the tokenizer of {tokenizer.name_or_path} does: it "
                "serves another model.", "Serve the teacher that the run names, or name the one that is served.",
            )  # fmt: skip
        else:
            found.add("ok", "teacher server", f"It cuts texts as {tokenizer.name_or_path} does.")

    encoded = pair.encode(list(prompts))
    nothing = torch.zeros(len(encoded), 1, dtype=torch.long)
    opening = Rollouts(encoded, nothing, torch.ones_like(nothing, dtype=torch.bool), nothing[:, 0] > 0, 0)
    first = Counter(server.ask(opening).tokens[:, 0].tolist()).most_common(1)[0][0]
    found.add("ok", "opening", f"Of shared tokens the teacher opens most often with {tokenizer.decode([first])!r}.")
    found.add(
        "warning", "divergence",
        "It was not measured: a server gives no whole distributions and writes no responses, so a run measures no "
        "divergence either, only agreement and the log-ratio of sampled tokens.",
        f"If {tokenizer.name_or_path} fits here, run the doctor without teacher_server.",
    )  # fmt: skip
