"""What is said of how a result was made: a command that anyone could type, with no path of this machine."""

import platform
import sys

import pytest
import torch

from tgpo_lab.provenance import command_line, processor_name, provenance


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


def test_a_processor_is_named_as_it_calls_itself(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"}, raising=False)
    assert provenance()["processor"] == processor_name() == "AMD EPYC"
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # without that name
    assert processor_name() == "arm"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older PyTorch
    assert processor_name() == "arm"
