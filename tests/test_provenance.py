"""What is said of how a result was made: a command that anyone could type, with no path of this machine."""

import sys

import pytest

from tgpo_lab.provenance import command_line, provenance


@pytest.mark.parametrize(
    "words, said",
    [
        (["/home/me/lab/tgpo_lab/__main__.py", "study", "map"], "tgpo-lab study map"),
        (["/usr/bin/tgpo-lab", "train", "--output", "/home/me/runs/a"], "tgpo-lab train --output a"),
        (["benchmarks/against_trl.py", "--rounds", "6"], "against_trl.py --rounds 6"),
        (["tgpo-lab", "train", "--output", "runs/a"], "tgpo-lab train --output runs/a"),
    ],
)
def test_the_command_is_one_to_type(monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == said
    assert provenance()["command"] == said
