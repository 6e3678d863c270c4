"""Asking for memory to be kept, and for large pages: in a process of its own, for neither can be undone."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def printed_by(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_whether_it_was_done():
    found = printed_by("from tgpo_lab.loop.allocator import keep_freed_memory as keep; print(keep(), keep())")
    assert found in ("True True\n", "False False\n")  # a second request does no harm
    if platform.libc_ver()[0] == "glibc":
        assert found == "True True\n"


# What Linux was told of the memory that a tensor lies in: hg where it may use large pages.
FLAGS_OF_A_TENSOR = """
import torch
large, inside = torch.empty(2**24), False
for line in open("/proc/self/smaps"):
    first, _, rest = line.partition(" ")
    if "-" in first:
        start, end = (int(x, 16) for x in first.split("-"))
        inside = start <= large.data_ptr() < end
    elif inside and first == "VmFlags:":
        print("hg" in rest.split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="only Linux has large pages")
def test_large_tensors_lie_in_large_pages_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    # All that a run imports comes first: a tensor made while importing would be too early.
    asked = "from tgpo_lab.training import use_large_pages\nuse_large_pages()" + FLAGS_OF_A_TENSOR
    assert printed_by(FLAGS_OF_A_TENSOR) == "False\n"
    assert printed_by(asked) == "True\n"
    # A command that loads a pair before it trains has made tensors by then.
    loaded = "from tgpo_lab.cli import main\nmain(['pairs', 'list'])\nfrom tgpo_lab import load_pair\nload_pair('far')"
    assert printed_by(loaded + FLAGS_OF_A_TENSOR).endswith("\nTrue\n")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert printed_by(asked) == "False\n"
